-- Removes the record of a final job.
-- ARGV: job, tenant
-- Reply: 1
local job, tenant = ARGV[1], ARGV[2]
redis.call('DEL', key('job', job))
redis.call('ZREM', key('jobs', tenant), job)
redis.call('ZREM', key('kept'), tenant .. ' ' .. job)
return { 1 }
