-- Makes a job; its first task is to validate the input.
-- ARGV: job, tenant, input file, the most open jobs of the tenant, then names and values of the record
-- Reply: "created", "full", or "no_file"
local job, tenant, file, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
if redis.call('HGET', key('file', file), 'tenant') ~= tenant then
  return { 'no_file' }
end
if redis.call('ZCARD', key('open', tenant)) >= most then
  return { 'full' }
end
local number = next_number('number')
redis.call('HSET', key('job', job), 'number', number, unpack(ARGV, 5))
redis.call('ZADD', key('jobs', tenant), number, job)
redis.call('SADD', key('users', file), job)
open_job(job, tenant)
add_task(job, 'validate')
return { 'created' }
