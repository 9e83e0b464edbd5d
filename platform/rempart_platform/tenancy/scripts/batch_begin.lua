-- Counts a delivery, when its worker has heard of it: what Redis gave out and nobody heard of was not tried. Again is
-- harmless.
-- ARGV: job, task, token, the most deliveries
-- Reply: how often it was delivered since a line of it was answered; 0 when another worker has it
local MAX_DEAD = 10000
local job, task, token, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
if not holds(job, task, token) then
  return { 0 }
end
if task_field(job, task, 'begun') == token then
  return { tonumber(task_field(job, task, 'deliveries')) }
end
redis.call('HSET', key('tasks', job), task .. ' begun', token)
local deliveries = redis.call('HINCRBY', key('tasks', job), task .. ' deliveries', 1)
if deliveries == most + 1 then
  local tenant = job_field(job, 'tenant')
  redis.call('XADD', key('dead'), 'MAXLEN', '~', MAX_DEAD, '*', 'job', job, 'task', task, 'tenant', tenant)
end
return { deliveries }
