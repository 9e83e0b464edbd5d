-- Asks for the end of a job. Workers answer what is still open with an error.
-- ARGV: job, tenant, now_s
-- Reply: "cancelling", "missing", or "final"
local job, tenant, now_s = ARGV[1], ARGV[2], ARGV[3]
if job_field(job, 'tenant') ~= tenant then
  return { 'missing' }
end
if FINAL[job_field(job, 'status')] then
  return { 'final' }
end
redis.call('HSETNX', key('job', job), 'cancelling_s', now_s)
redis.call('HSET', key('job', job), 'status', 'cancelling')
return { 'cancelling' }
