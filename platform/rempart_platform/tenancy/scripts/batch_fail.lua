-- Ends a job whose input was refused.
-- ARGV: job, task, token, entry, now_s, errors
-- Reply: 1, or 0 when another worker has the task
local job, task, token, entry, now_s, errors = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if not holds(job, task, token) then
  return { 0 }
end
end_task(job, task, entry)
local status = job_field(job, 'status') == 'cancelling' and 'cancelled' or 'failed'
redis.call('HSET', key('job', job), 'errors', errors)
for shard = 0, job_number(job, 'num_shards') - 1 do -- one of them may have failed while others were worked on
  redis.call('UNLINK', key('lines', job .. ':' .. shard))
end
close_job(job, status, now_s)
return { 1 }
