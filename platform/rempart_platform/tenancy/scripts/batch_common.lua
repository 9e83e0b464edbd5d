-- What the scripts of batch jobs share. KEYS[1] is the root of all their keys; the hash tag in it puts them in one slot.
-- A task is "validate", the number of a shard, or "finalize"; it is an entry of its job's stream until it is done.
local root = KEYS[1]
local GROUP = 'workers'

local function key(part, name)
  return root .. ':' .. part .. (name and ':' .. name or '')
end

local function next_number(counter)
  return redis.call('INCR', key(counter))
end

local function job_field(job, field)
  return redis.call('HGET', key('job', job), field)
end

local function job_number(job, field)
  return tonumber(job_field(job, field) or '0')
end

local function task_field(job, task, field)
  return redis.call('HGET', key('tasks', job), task .. ' ' .. field)
end

-- A worker that was thought dead must not write: another has the task by then, with another token.
local function holds(job, task, token)
  return task_field(job, task, 'holder') == token
end

local function ensure_group(job)
  redis.pcall('XGROUP', 'CREATE', key('work', job), GROUP, '0', 'MKSTREAM') -- an error says that it is there
end

local function add_task(job, task)
  redis.call('XADD', key('work', job), '*', 'task', task)
end

local function end_task(job, task, entry)
  redis.call('XACK', key('work', job), GROUP, entry)
  redis.call('XDEL', key('work', job), entry)
  redis.call('HDEL', key('tasks', job), task .. ' holder', task .. ' begun', task .. ' deliveries')
end

local FINAL = { failed = true, completed = true, expired = true, cancelled = true }

local function open_job(job, tenant)
  local number = job_field(job, 'number')
  redis.call('ZADD', key('open'), number, job)
  redis.call('ZADD', key('open', tenant), number, job)
  redis.call('ZADD', key('turns'), 'NX', next_number('turn'), tenant)
  ensure_group(job)
end

-- Makes a job final. Its tasks are all done by then, so nothing that somebody still works on goes with the stream.
local function close_job(job, status, now_s)
  local tenant = job_field(job, 'tenant')
  redis.call('HSET', key('job', job), 'status', status, status .. '_s', now_s)
  redis.call('ZREM', key('open'), job)
  redis.call('ZREM', key('open', tenant), job)
  if redis.call('EXISTS', key('open', tenant)) == 0 then
    redis.call('ZREM', key('turns'), tenant)
  end
  redis.call('SREM', key('users', job_field(job, 'input_file_id')), job)
  redis.call('ZADD', key('ended'), now_s, tenant .. ' ' .. job)
  redis.call('UNLINK', key('work', job), key('tasks', job))
end
