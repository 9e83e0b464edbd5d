-- Admits a request and counts its worst case, or refuses it and counts nothing.
-- ARGV: id, tokens, window_us, lease_us, default limits: requests, tokens, concurrency (0 = unlimited)
-- Reply: outcome, wait_us, now_us, leases swept, then limit and use of requests, tokens, concurrency, then reset_us
--   outcome: 'admitted', 'settled' (it was given up before this script came), 'impossible' (more tokens than the limit)
--            or the limit that refuses longest: 'requests', 'tokens', 'concurrency'
--   wait_us: until the window has room for this request; 0 when only concurrency refuses, for nobody knows its end
--   reset_us: until the window is empty
local id, tokens, window_us, lease_us = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

sweep_window(window_us)
local num_swept = sweep_leases()

local own = redis.call('HMGET', tenant_key, 'requests_per_minute', 'tokens_per_minute', 'concurrency')
local max_requests = tonumber(own[1] or ARGV[5])
local max_tokens = tonumber(own[2] or ARGV[6])
local max_concurrency = tonumber(own[3] or ARGV[7])

local num_requests = redis.call('ZCARD', window_key)
local num_tokens = spent_tokens()
local num_leases = redis.call('ZCARD', leases_key)

-- Until the reservation with this time of admission leaves the window.
local function wait_for(admitted_us)
  return tonumber(admitted_us) + window_us - now_us
end

-- Until enough of the oldest reservations have left the window to free `missing` tokens.
local function wait_for_tokens(missing)
  local first, chunk = 0, 50
  while true do
    local entries = redis.call('ZRANGE', window_key, first, first + chunk - 1, 'WITHSCORES')
    local ids = {}
    for i = 1, #entries, 2 do
      ids[#ids + 1] = entries[i]
    end
    for i, amount in ipairs(redis.call('HMGET', amounts_key, unpack(ids))) do
      missing = missing - tonumber(amount)
      if missing <= 0 then
        return wait_for(entries[2 * i])
      end
    end
    first, chunk = first + chunk, 500
  end
end

local function decide()
  if redis.call('ZSCORE', settled_key, id) then
    return 'settled', 0
  end
  if redis.call('HEXISTS', amounts_key, id) == 1 then
    return 'again', 0
  end
  if max_tokens > 0 and tokens > max_tokens then
    return 'impossible', 0
  end
  local outcome, wait_us = 'admitted', 0
  if max_concurrency > 0 and num_leases >= max_concurrency then
    outcome = 'concurrency'
  end
  if max_requests > 0 and num_requests >= max_requests then
    local last_in_the_way = num_requests - max_requests
    local entry = redis.call('ZRANGE', window_key, last_in_the_way, last_in_the_way, 'WITHSCORES')
    outcome, wait_us = 'requests', wait_for(entry[2])
  end
  if max_tokens > 0 and num_tokens + tokens > max_tokens then
    local wait_for_these_us = wait_for_tokens(num_tokens + tokens - max_tokens)
    if wait_for_these_us > wait_us then
      outcome, wait_us = 'tokens', wait_for_these_us
    end
  end
  return outcome, wait_us
end

local outcome, wait_us = decide()
if outcome == 'admitted' then
  redis.call('ZADD', window_key, integer(now_us), id)
  redis.call('HSET', amounts_key, id, integer(tokens))
  redis.call('INCRBY', spent_key, integer(tokens))
  lease(id, lease_us)
  num_requests, num_tokens, num_leases = num_requests + 1, num_tokens + tokens, num_leases + 1
  -- An idle tenant leaves nothing behind. The three keys of the window must go in the same millisecond.
  local window_end_ms = integer(math.ceil((now_us + window_us) / 1000))
  for _, key in ipairs({ window_key, amounts_key, spent_key }) do
    redis.call('PEXPIREAT', key, window_end_ms)
  end
elseif outcome == 'again' then
  outcome = 'admitted'
end

local newest = redis.call('ZRANGE', window_key, -1, -1, 'WITHSCORES')
local reset_us = newest[2] and wait_for(newest[2]) or 0
return {
  outcome, wait_us, now_us, num_swept,
  max_requests, num_requests, max_tokens, num_tokens, max_concurrency, num_leases, reset_us,
}
