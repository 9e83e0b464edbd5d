-- Ends a job whose result files are listed.
-- ARGV: job, token, entry, now_s, output file or "", error file or ""
-- Reply: 1, or 0 when another worker finalizes it
local job, token, entry, now_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if not holds(job, 'finalize', token) then
  return { 0 }
end
end_task(job, 'finalize', entry)
redis.call('HSET', key('job', job), 'output_file_id', ARGV[5], 'error_file_id', ARGV[6])
local status = 'completed'
if job_field(job, 'status') == 'cancelling' then
  status = 'cancelled'
elseif job_number(job, 'expired') > 0 then
  status = 'expired'
end
close_job(job, status, now_s)
return { 1 }
