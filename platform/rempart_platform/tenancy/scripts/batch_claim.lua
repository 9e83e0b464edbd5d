-- Gives a worker one task: of the tenant whose turn it is, of its oldest job that has one, first what another worker
-- holds no longer. Looks at few tenants and jobs, so that it is short whatever there is to do, and gives each tenant
-- that it looked at a later turn, so that the next call looks at others. The oldest jobs of a tenant may all be in other
-- hands, so of a tenant it looks at all: there are few, by `max_open_batches_per_tenant`.
-- ARGV: worker, lease_ms, then "<tenant> <model>" of whom the worker takes no more
-- Reply: job, task, entry and token; or, when those that it looked at have none, how many tenants these were, and how
--   many there are
local MAX_TENANTS, MAX_JOBS = 16, 128
local worker, lease_ms = ARGV[1], ARGV[2]
local is_full = {}
for i = 3, #ARGV do
  is_full[ARGV[i]] = true
end

local function unheld_entry(work)
  local pending = redis.pcall('XPENDING', work, GROUP, 'IDLE', lease_ms, '-', '+', 1)
  if pending.err then
    return nil, true
  end
  local claimed = pending[1] and redis.call('XCLAIM', work, GROUP, worker, lease_ms, pending[1][1])
  if claimed and claimed[1] then
    return claimed[1]
  end
  local read = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', 1, 'STREAMS', work, '>')
  return read and read[1][2][1]
end

local function take(job)
  local entry, has_no_group = unheld_entry(key('work', job))
  if has_no_group then
    ensure_group(job)
    entry = unheld_entry(key('work', job))
  end
  return entry
end

local num_tenants, num_jobs = 0, 0
for _, tenant in ipairs(redis.call('ZRANGE', key('turns'), 0, MAX_TENANTS - 1)) do
  redis.call('ZADD', key('turns'), next_number('turn'), tenant)
  num_tenants = num_tenants + 1
  for _, job in ipairs(redis.call('ZRANGE', key('open', tenant), 0, -1)) do
    if not is_full[tenant .. ' ' .. (job_field(job, 'model') or '')] then
      local entry = take(job)
      if entry then
        local task = entry[2][2]
        local token = worker .. ':' .. redis.call('HINCRBY', key('job', job), 'fence', 1)
        redis.call('HSET', key('tasks', job), task .. ' holder', token)
        return { job, task, entry[1], token }
      end
      num_jobs = num_jobs + 1
    end
  end
  if num_jobs >= MAX_JOBS then
    break
  end
end
return { num_tenants, redis.call('ZCARD', key('turns')) }
