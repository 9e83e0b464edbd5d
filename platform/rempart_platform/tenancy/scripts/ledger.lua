-- What the scripts of the ledger share. Every one of them gets the same KEYS, all of one tenant and so of one slot.
-- Times are microseconds of this server's clock: no router's clock is ever trusted.
local tenant_key, window_key, amounts_key, spent_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local leases_key, settled_key, usage_key = KEYS[5], KEYS[6], KEYS[7]

local time_reply = redis.call('TIME')
local now_s = tonumber(time_reply[1])
local now_us = now_s * 1000000 + tonumber(time_reply[2])

-- tostring() would round a time to 14 digits.
local function integer(number)
  return string.format('%.0f', number)
end

-- Tokens that count for the window now.
local function spent_tokens()
  return tonumber(redis.call('GET', spent_key) or '0')
end

-- Takes what is older than the window out of it. Each reservation is taken out once, so the cost is amortised.
local function sweep_window(window_us)
  local horizon = integer(now_us - window_us)
  while true do
    local ids = redis.call('ZRANGEBYSCORE', window_key, '-inf', horizon, 'LIMIT', 0, 500)
    if #ids == 0 then
      return
    end
    local gone = 0
    for _, amount in ipairs(redis.call('HMGET', amounts_key, unpack(ids))) do
      gone = gone + tonumber(amount)
    end
    redis.call('ZREM', window_key, unpack(ids))
    redis.call('HDEL', amounts_key, unpack(ids))
    redis.call('DECRBY', spent_key, integer(gone))
  end
end

-- Begins or renews a lease. The key outlives its leases for a while, so that those of a router that is gone are still
-- counted when they are swept.
local function lease(id, lease_us)
  redis.call('ZADD', leases_key, integer(now_us + lease_us), id)
  redis.call('PEXPIRE', leases_key, integer(math.ceil(10 * lease_us / 1000)))
end

-- Ends the leases that nobody renewed: their router is gone. Returns how many.
local function sweep_leases()
  return redis.call('ZREMRANGEBYSCORE', leases_key, '-inf', integer(now_us))
end

-- Remembers that a reservation is over, for `memory_us`. Returns false when it was over already.
local function mark_settled(id, memory_us)
  redis.call('ZREMRANGEBYSCORE', settled_key, '-inf', integer(now_us - memory_us))
  local is_new = redis.call('ZADD', settled_key, 'NX', integer(now_us), id) == 1
  redis.call('PEXPIRE', settled_key, integer(math.ceil(memory_us / 1000)))
  redis.call('ZREM', leases_key, id)
  return is_new
end

