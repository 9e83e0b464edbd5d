-- Puts tasks of an open job that are neither done nor in its stream into the stream: the record says which there must
-- be. Again, or by several, is harmless.
-- ARGV: job
-- Reply: how many were put there
local job = ARGV[1]
local tenant, status = job_field(job, 'tenant'), job_field(job, 'status')
if not tenant or FINAL[status] then
  redis.call('ZREM', key('open'), job)
  return { 0 }
end
open_job(job, tenant)
local is_there = {}
for _, entry in ipairs(redis.call('XRANGE', key('work', job), '-', '+')) do
  is_there[entry[2][2]] = true
end
local num_added = 0
local function require_task(task)
  if not is_there[task] then
    add_task(job, task)
    num_added = num_added + 1
  end
end
local num_shards = job_number(job, 'num_shards')
if num_shards == 0 then
  require_task('validate')
elseif job_number(job, 'num_done') == num_shards then
  require_task('finalize')
else
  for shard = 0, num_shards - 1 do
    if not task_field(job, shard, 'done') then
      require_task(tostring(shard))
    end
  end
end
return { num_added }
