-- Renews the lease of a task.
-- ARGV: job, task, token, entry, worker
-- Reply: 0 when another worker has it, or 1 and the job's status
local job, task, token, entry, worker = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if not holds(job, task, token) then
  return { 0 }
end
if redis.pcall('XCLAIM', key('work', job), GROUP, worker, 0, entry, 'JUSTID').err then
  return { 0 } -- the stream is lost, and a janitor makes it again
end
return { 1, job_field(job, 'status') }
