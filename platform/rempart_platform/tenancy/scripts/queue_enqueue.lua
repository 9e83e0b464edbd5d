-- Grants a request at once when nothing waits and there is room; else it waits, or is refused when too many do.
-- ARGV: id, router, class, tenant, weight, charge, rows, tokens, timeout_us,
--       capacity: rows, tokens, reserved rows, reserved tokens, lasts_us; age_us, most that may wait: of all, of the
--       tenant; order inside a flow: 'fifo' or 'deadline'
-- Reply: outcome, fence, requests ahead, estimate of the wait in us, entries and leases swept
--   outcome: 'granted', 'waiting', 'unknown' (the router must renew first), 'full' or 'tenant_full'
local id, router = ARGV[1], ARGV[2]
local entry = {
  class = tonumber(ARGV[3]), tenant = ARGV[4], weight = tonumber(ARGV[5]), charge = tonumber(ARGV[6]),
  rows = tonumber(ARGV[7]), tokens = tonumber(ARGV[8]), deadline = now_us + tonumber(ARGV[9]), router = router,
}
local age_us, max_waiting, max_waiting_of_tenant = tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17])

if not is_living(router) then
  return { 'unknown', 0, 0, 0, 0 }
end
tell_capacity(10)
local num_swept = sweep()
promote(age_us)

-- An answer that was lost is given again.
local lease = load_entry(leases_key, id)
if lease then
  return { 'granted', lease.fence, 0, 0, num_swept }
end
local known = load_entry(waiting_key, id)
if known then
  local num_ahead = num_ahead_of(id, known)
  return { 'waiting', 0, num_ahead, estimate_us(num_ahead), num_swept }
end

if redis.call('ZCARD', order_key) == 0 and has_room(entry) then
  local virtual_time = grant(id, entry, start_of(entry.class, entry.tenant))
  park(entry.class, entry.tenant, virtual_time)
  return { 'granted', entry.fence, 0, 0, num_swept }
end

local function refusal()
  if redis.call('ZCARD', order_key) >= max_waiting then
    return 'full'
  end
  return num_waiting_of(entry.tenant) >= max_waiting_of_tenant and 'tenant_full'
end

if refusal() then
  dispatch()
  local outcome = refusal()
  if outcome then
    local waiting = outcome == 'full' and redis.call('ZCARD', order_key) or num_waiting_of(entry.tenant)
    return { outcome, 0, waiting, estimate_us(0), num_swept }
  end
end

entry.rank = rank(ARGV[18], entry.deadline, redis.call('HINCRBY', state_key, 'number', 1))
enter(id, entry, age_us)
redis.call('ZADD', owned_key, 0, router .. ' w ' .. id)
dispatch()
lease = load_entry(leases_key, id)
if lease then
  return { 'granted', lease.fence, 0, 0, num_swept }
end
local num_ahead = num_ahead_of(id, entry)
return { 'waiting', 0, num_ahead, estimate_us(num_ahead), num_swept }
