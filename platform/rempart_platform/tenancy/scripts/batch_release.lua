-- Gives a task back undone: another worker may have it at once, and it counts as never delivered.
-- ARGV: job, task, token, entry, worker, lease_ms
-- Reply: 1, or 0 when another worker has it
local job, task, token, entry, worker, lease_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if not holds(job, task, token) then
  return { 0 }
end
if redis.pcall('XCLAIM', key('work', job), GROUP, worker, 0, entry, 'IDLE', lease_ms, 'JUSTID').err then
  return { 0 } -- the stream is lost, and a janitor makes it again
end
local has_begun = task_field(job, task, 'begun') == token
redis.call('HDEL', key('tasks', job), task .. ' holder', task .. ' begun')
if has_begun and tonumber(task_field(job, task, 'deliveries') or '0') > 0 then
  redis.call('HINCRBY', key('tasks', job), task .. ' deliveries', -1)
end
return { 1 }
