-- Admits a request and counts its worst case in every account, or refuses it and counts nothing.
-- ARGV: id, tokens, money, window_us, lease_us, plan, model, key id (the last two '' when there is no such account),
--   then eight limits that the tenant inherits and eight that its model inherits, in the order of LIMITS (0 = unlimited),
--   and the longest window that is counted anew after this grant (0 = none)
-- Reply: outcome, wait_us, now_us, leases swept, then limit, use and reset_us of requests and of tokens, each of the
--   account with the least left, then what refused: its name, the limit, the account, 1 when some wait is unknown;
--   excess
--   outcome: 'admitted', 'settled' (it was given up before this script came), 'impossible' (more than a limit),
--            'plan' (the tenant's plan is another: its name is told as the name of what refused), or the limit that
--            refuses longest
--   wait_us: until the window has room for this request or the budget begins anew; 0 when the end is unknown: when
--            something in flight has to end first
--   reset_us: until the window is empty
--   excess: tokens of the window beyond the limit after this grant, where it was counted anew
local LIMITS = {
  'requests_per_minute', 'tokens_per_minute', 'concurrency', 'concurrent_tokens',
  'tokens_per_day', 'tokens_per_month', 'money_per_day', 'money_per_month',
}
local id, tokens, money = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local window_us, lease_us = tonumber(ARGV[4]), tonumber(ARGV[5])
local plan, model, key_id = ARGV[6], ARGV[7], ARGV[8]

-- The most specific value that is set: the tenant hash holds the tenant's own, ARGV what it inherits.
local function read_limits()
  local scopes = { { 'tenant', '', '' } }
  if model ~= '' then
    scopes[#scopes + 1] = { 'model', 'model ', ' ' .. model }
  end
  if key_id ~= '' then
    scopes[#scopes + 1] = { 'key', 'key ', ' ' .. key_id }
  end
  local inherits_from = { tenant = 8, model = 16 }
  local fields = {}
  for _, scope in ipairs(scopes) do
    for _, limit in ipairs(LIMITS) do
      fields[#fields + 1] = scope[2] .. limit .. scope[3]
    end
  end
  local own = redis.call('HMGET', tenant_key, unpack(fields))
  for s, scope in ipairs(scopes) do
    local account, inherited = accounts[s], inherits_from[scope[1]]
    account.name, account.limits = scope[1], {}
    for l, limit in ipairs(LIMITS) do
      account.limits[limit] = tonumber(own[(s - 1) * #LIMITS + l] or inherited and ARGV[inherited + l] or 0)
    end
  end
end

local function read_use(account)
  account.requests = redis.call('ZCARD', account.window)
  account.tokens = spent_tokens(account)
  account.concurrency = redis.call('ZCARD', account.leases)
  account.held_tokens, account.held_money = held_sums(account)
end

-- Until the reservation with this time of admission leaves the window.
local function wait_for(admitted_us)
  return tonumber(admitted_us) + window_us - now_us
end

-- Until enough of the oldest reservations have left the window to free `missing` tokens.
local function wait_for_tokens(account, missing)
  local first, chunk = 0, 50
  while true do
    local entries = redis.call('ZRANGE', account.window, first, first + chunk - 1, 'WITHSCORES')
    local ids = {}
    for i = 1, #entries, 2 do
      ids[#ids + 1] = entries[i]
    end
    for i, amount in ipairs(redis.call('HMGET', account.amounts, unpack(ids))) do
      missing = missing - tonumber(amount)
      if missing <= 0 then
        return wait_for(entries[2 * i])
      end
    end
    first, chunk = first + chunk, 500
  end
end

local refusal = { outcome = 'admitted', wait_us = 0, limit = 0, account = '', is_unknown = 0 }

local function refuse(account, outcome, limit, wait_us)
  if refusal.outcome == 'admitted' or wait_us > refusal.wait_us then
    refusal.outcome, refusal.wait_us, refusal.limit, refusal.account = outcome, wait_us, limit, account.name
  end
  if wait_us == 0 then
    refusal.is_unknown = 1
  end
end

-- What one request needs of each limit; more than the limit can never be admitted.
local NEEDS = {
  { 'tokens_per_minute', tokens }, { 'concurrent_tokens', tokens },
  { 'tokens_per_day', tokens }, { 'tokens_per_month', tokens },
  { 'money_per_day', money }, { 'money_per_month', money },
}
local SHORT_NAMES = { requests_per_minute = 'requests', tokens_per_minute = 'tokens' }

-- The first limit that this request alone exceeds.
local function find_impossible()
  for _, account in ipairs(accounts) do
    for _, need in ipairs(NEEDS) do
      local limit = account.limits[need[1]]
      if limit > 0 and need[2] > limit then
        return { SHORT_NAMES[need[1]] or need[1], limit, account.name }
      end
    end
  end
end

local function check_window(account)
  local max_requests, max_tokens = account.limits.requests_per_minute, account.limits.tokens_per_minute
  if max_requests > 0 and account.requests >= max_requests then
    local last_in_the_way = account.requests - max_requests
    local entry = redis.call('ZRANGE', account.window, last_in_the_way, last_in_the_way, 'WITHSCORES')
    refuse(account, 'requests', max_requests, wait_for(entry[2]))
  end
  if max_tokens > 0 and account.tokens + tokens > max_tokens then
    refuse(account, 'tokens', max_tokens, wait_for_tokens(account, account.tokens + tokens - max_tokens))
  end
end

-- What is in flight counts at its worst case. While that alone is in the way, its end is waited for and not the
-- budget's.
local function check_budget(account, used, name, need, held, next_period_s)
  local limit = account.limits[name]
  if limit == 0 or used[name] + held + need <= limit then
    return
  end
  refuse(account, name, limit, used[name] + need > limit and next_period_s * 1000000 - now_us or 0)
end

local function check_budgets(account)
  local limits = account.limits
  if limits.tokens_per_day + limits.tokens_per_month + limits.money_per_day + limits.money_per_month == 0 then
    return
  end
  local used = budgets_used(account)
  local tomorrow_s, next_month_s = now_s - now_s % 86400 + 86400, next_month(now_s)
  check_budget(account, used, 'tokens_per_day', tokens, account.held_tokens, tomorrow_s)
  check_budget(account, used, 'tokens_per_month', tokens, account.held_tokens, next_month_s)
  check_budget(account, used, 'money_per_day', money, account.held_money, tomorrow_s)
  check_budget(account, used, 'money_per_month', money, account.held_money, next_month_s)
end

local function check_flight(account)
  local max_requests, max_tokens = account.limits.concurrency, account.limits.concurrent_tokens
  if max_requests > 0 and account.concurrency >= max_requests then
    refuse(account, 'concurrency', max_requests, 0)
  end
  if max_tokens > 0 and account.held_tokens + tokens > max_tokens then
    refuse(account, 'concurrent_tokens', max_tokens, 0)
  end
end

local function is_counted(account)
  return redis.call('HEXISTS', account.amounts, id) == 1 or redis.call('HEXISTS', account.held, id) == 1
end

local function count(account)
  redis.call('ZADD', account.window, integer(now_us), id)
  redis.call('HSET', account.amounts, id, integer(tokens))
  redis.call('INCRBY', account.spent, integer(tokens))
  lease(account, id, tokens, money, lease_us)
  account.requests, account.tokens = account.requests + 1, account.tokens + tokens
  -- An idle tenant leaves nothing behind. The three keys of the window must go in the same millisecond.
  local window_end_ms = integer(math.ceil((now_us + window_us) / 1000))
  for _, key in ipairs({ account.window, account.amounts, account.spent }) do
    redis.call('PEXPIREAT', key, window_end_ms)
  end
end

local function until_empty(account)
  local newest = redis.call('ZRANGE', account.window, -1, -1, 'WITHSCORES')
  return newest[2] and wait_for(newest[2]) or 0
end

-- Limit, use and reset_us of the account with the least left; of the tenant's when none is limited.
local function tightest(limit, use)
  local found = accounts[1]
  for _, account in ipairs(accounts) do
    local limited, was_limited = account.limits[limit] > 0, found.limits[limit] > 0
    if limited and (not was_limited or account.limits[limit] - account[use] < found.limits[limit] - found[use]) then
      found = account
    end
  end
  return found.limits[limit], found[use], until_empty(found)
end

-- What admission goes by is a sum that many calls keep. This counts what really lies there.
local function excess_of(account, max_counted)
  local limit, tokens = account.limits.tokens_per_minute, 0
  if limit == 0 or redis.call('HLEN', account.amounts) > max_counted then
    return 0
  end
  for _, amount in ipairs(redis.call('HVALS', account.amounts)) do
    tokens = tokens + tonumber(amount)
  end
  return math.max(tokens - limit, 0)
end

local own_plan = redis.call('HGET', tenant_key, 'plan') or ''
if own_plan ~= plan then
  return { 'plan', 0, now_us, 0, 0, 0, 0, 0, 0, 0, own_plan, 0, '', 0, 0 }
end

local num_swept = 0
for a, account in ipairs(accounts) do
  sweep_window(account, window_us)
  local swept_here = sweep_leases(account)
  num_swept = a == 1 and swept_here or num_swept
  read_use(account)
end
read_limits()

local impossible = find_impossible()
local is_there = is_counted(accounts[1])
if redis.call('ZSCORE', settled_key, id) then
  refusal.outcome = 'settled'
elseif not is_there and impossible then
  refusal.outcome = 'impossible'
elseif not is_there then
  for _, check in ipairs({ check_window, check_budgets, check_flight }) do
    for _, account in ipairs(accounts) do
      check(account)
    end
  end
  if refusal.outcome == 'admitted' then
    for _, account in ipairs(accounts) do
      count(account)
    end
  end
end

local excess, max_counted = 0, tonumber(ARGV[25] or '0')
if refusal.outcome == 'admitted' and max_counted > 0 then
  for _, account in ipairs(accounts) do
    excess = math.max(excess, excess_of(account, max_counted))
  end
end

local max_requests, num_requests, requests_reset_us = tightest('requests_per_minute', 'requests')
local max_tokens, num_tokens, tokens_reset_us = tightest('tokens_per_minute', 'tokens')
local told = { refusal.outcome, refusal.limit, refusal.account }
if refusal.outcome == 'impossible' then
  told = impossible
end
return {
  refusal.outcome, refusal.wait_us, now_us, num_swept,
  max_requests, num_requests, requests_reset_us, max_tokens, num_tokens, tokens_reset_us,
  told[1], told[2], told[3], refusal.is_unknown, integer(excess),
}
