-- Makes a job; its first task is to validate the input.
-- ARGV: job, tenant, input file, the most open jobs of the tenant, its most jobs of all, now_s, then names and values of
--       the record
-- Reply: "created", "full" of open jobs, "crowded" with others, "no_file", or "no_input" for a file of another purpose
local job, tenant, file, most_open, most, now_s =
  ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

-- Forgets the oldest job whose parts are gone. Of so many, one at least is not open.
local function forget_one()
  for _, old in ipairs(redis.call('ZRANGE', key('jobs', tenant), 0, most_open)) do
    if redis.call('ZREM', key('kept'), tenant .. ' ' .. old) == 1 then
      redis.call('DEL', key('job', old))
      redis.call('ZREM', key('jobs', tenant), old)
      return true
    end
  end
  return false
end

local record = redis.call('HMGET', key('file', file), 'tenant', 'purpose', 'expires_s')
local expires_s = tonumber(record[3] or '0')
if record[1] ~= tenant or (expires_s > 0 and expires_s <= now_s) then
  return { 'no_file' }
end
if record[2] ~= 'batch' then
  return { 'no_input' }
end
if redis.call('ZCARD', key('open', tenant)) >= most_open then
  return { 'full' }
end
if redis.call('ZCARD', key('jobs', tenant)) >= most and not forget_one() then
  return { 'crowded' }
end
local number = next_number('number')
redis.call('HSET', key('job', job), 'number', number, unpack(ARGV, 7))
redis.call('ZADD', key('jobs', tenant), number, job)
redis.call('SADD', key('users', file), job)
open_job(job, tenant)
add_task(job, 'validate')
return { 'created' }
