-- Keeps the answer of one line until its shard is done; the first one counts.
-- ARGV: job, task, token, line number, "completed" or "failed", answer
-- Reply: 1, or 0 when another worker has the shard
local job, task, token, line, outcome, answer = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if not holds(job, task, token) then
  return { 0 }
end
if redis.call('HSETNX', key('lines', job .. ':' .. task), line, answer) == 1 then
  redis.call('HINCRBY', key('tasks', job), task .. ' ' .. outcome, 1)
  redis.call('HINCRBY', key('job', job), outcome, 1)
  redis.call('HSET', key('tasks', job), task .. ' deliveries', 0)
end
return { 1 }
