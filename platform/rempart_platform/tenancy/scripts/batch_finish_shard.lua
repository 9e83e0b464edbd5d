-- Counts a shard whose answers are stored; after the last one comes finalizing.
-- ARGV: job, shard, token, entry, now_s, completed, failed, expired
-- Reply: 1, or 0 when another worker has the shard
local job, shard, token, entry, now_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if not holds(job, shard, token) then
  return { 0 }
end
end_task(job, shard, entry)
redis.call('UNLINK', key('lines', job .. ':' .. shard))
if task_field(job, shard, 'done') then
  return { 1 }
end
-- What is stored is the truth; some of it may have been counted line by line.
for i, outcome in ipairs({ 'completed', 'failed' }) do
  local counted = tonumber(task_field(job, shard, outcome) or '0')
  redis.call('HINCRBY', key('job', job), outcome, tonumber(ARGV[5 + i]) - counted)
  redis.call('HDEL', key('tasks', job), shard .. ' ' .. outcome)
end
redis.call('HINCRBY', key('job', job), 'expired', ARGV[8])
redis.call('HSET', key('tasks', job), shard .. ' done', 1)
if redis.call('HINCRBY', key('job', job), 'num_done', 1) == job_number(job, 'num_shards') then
  redis.call('HSET', key('job', job), 'finalizing_s', now_s)
  if job_field(job, 'status') ~= 'cancelling' then
    redis.call('HSET', key('job', job), 'status', 'finalizing')
  end
  add_task(job, 'finalize')
end
return { 1 }
