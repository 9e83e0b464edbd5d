-- What the scripts of the ledger share. KEYS are of one tenant and so of one slot: three of its own, then six of each
-- account in which a request counts: the tenant's, its model's and its key's, in this order.
-- Times are microseconds of this server's clock: no router's clock is ever trusted. Money is in billionths.
local tenant_key, settled_key, usage_key = KEYS[1], KEYS[2], KEYS[3]
local accounts = {}
for i = 4, #KEYS, 6 do
  accounts[#accounts + 1] = {
    window = KEYS[i], amounts = KEYS[i + 1], spent = KEYS[i + 2],
    leases = KEYS[i + 3], held = KEYS[i + 4], budgets = KEYS[i + 5],
  }
end

local time_reply = redis.call('TIME')
local now_s = tonumber(time_reply[1])
local now_us = now_s * 1000000 + tonumber(time_reply[2])

-- tostring() would round a time to 14 digits.
local function integer(number)
  return string.format('%.0f', number)
end

-- "2026-11-23" of a time since the epoch: days are counted in eras of 400 years that begin on 1 March, so that the
-- leap day is the last of its year.
local function utc_day(seconds)
  local days = math.floor(seconds / 86400) + 719468
  local era = math.floor(days / 146097)
  local day_of_era = days - era * 146097
  local year_of_era = math.floor(
    (day_of_era - math.floor(day_of_era / 1460) + math.floor(day_of_era / 36524) - math.floor(day_of_era / 146096))
      / 365
  )
  local day_of_year = day_of_era - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local month_from_march = math.floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - math.floor((153 * month_from_march + 2) / 5) + 1
  local month = month_from_march < 10 and month_from_march + 3 or month_from_march - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02d', year, month, day)
end

local today = utc_day(now_s)

-- The first second of the next UTC month.
local function next_month(seconds)
  local midnight = seconds - seconds % 86400
  local first = midnight - (tonumber(string.sub(utc_day(seconds), 9)) - 1) * 86400
  local in_next_month = first + 31 * 86400
  return in_next_month - (tonumber(string.sub(utc_day(in_next_month), 9)) - 1) * 86400
end

-- Tokens that count for the window now.
local function spent_tokens(account)
  return tonumber(redis.call('GET', account.spent) or '0')
end

-- Takes what is older than the window out of it. Each reservation is taken out once, so the cost is amortised.
local function sweep_window(account, window_us)
  local horizon = integer(now_us - window_us)
  while true do
    local ids = redis.call('ZRANGEBYSCORE', account.window, '-inf', horizon, 'LIMIT', 0, 500)
    if #ids == 0 then
      return
    end
    local gone = 0
    for _, amount in ipairs(redis.call('HMGET', account.amounts, unpack(ids))) do
      gone = gone + tonumber(amount)
    end
    redis.call('ZREM', account.window, unpack(ids))
    redis.call('HDEL', account.amounts, unpack(ids))
    redis.call('DECRBY', account.spent, integer(gone))
  end
end

-- Tokens and money of all reservations in flight. The two sums lie beside what they add up; no id begins with a blank.
local function held_sums(account)
  local sums = redis.call('HMGET', account.held, ' tokens', ' money')
  return tonumber(sums[1] or '0'), tonumber(sums[2] or '0')
end

-- Begins or renews a lease, which holds tokens and money. The keys outlive their leases for a while, so that those of
-- a router that is gone are still counted when they are swept; both must go in the same millisecond.
local function lease(account, id, tokens, money, lease_us)
  if redis.call('ZADD', account.leases, integer(now_us + lease_us), id) == 1 then
    local held_tokens, held_money = held_sums(account)
    redis.call(
      'HSET', account.held, id, integer(tokens) .. ' ' .. integer(money),
      ' tokens', integer(held_tokens + tokens), ' money', integer(held_money + money)
    )
  end
  local end_ms = integer(math.ceil((now_us + 10 * lease_us) / 1000))
  redis.call('PEXPIREAT', account.leases, end_ms)
  redis.call('PEXPIREAT', account.held, end_ms)
end

-- Ends leases and gives back what they held; again is harmless.
local function release(account, ids)
  local tokens, money = held_sums(account)
  local num_held = 0
  for _, held in ipairs(redis.call('HMGET', account.held, unpack(ids))) do
    if held then
      local held_tokens, held_money = string.match(held, '^(%d+) (%d+)$')
      tokens, money, num_held = tokens - held_tokens, money - held_money, num_held + 1
    end
  end
  if num_held > 0 then
    redis.call('HSET', account.held, ' tokens', integer(tokens), ' money', integer(money))
    redis.call('HDEL', account.held, unpack(ids))
  end
  redis.call('ZREM', account.leases, unpack(ids))
end

-- Ends the leases that nobody renewed: their router is gone. Returns how many.
local function sweep_leases(account)
  local num_swept = 0
  while true do
    local ids = redis.call('ZRANGEBYSCORE', account.leases, '-inf', integer(now_us), 'LIMIT', 0, 500)
    if #ids == 0 then
      return num_swept
    end
    release(account, ids)
    num_swept = num_swept + #ids
  end
end

-- What was settled in this UTC day and in this month: tokens and money of the day, tokens and money of the month.
local function budgets_used(account)
  local stored = redis.call(
    'HMGET', account.budgets, 'day', 'day_tokens', 'day_money', 'month', 'month_tokens', 'month_money'
  )
  local is_today, is_this_month = stored[1] == today, stored[4] == string.sub(today, 1, 7)
  return {
    tokens_per_day = is_today and tonumber(stored[2]) or 0,
    money_per_day = is_today and tonumber(stored[3]) or 0,
    tokens_per_month = is_this_month and tonumber(stored[5]) or 0,
    money_per_month = is_this_month and tonumber(stored[6]) or 0,
  }
end

-- Remembers that a reservation is over, for `memory_us`. Returns false when it was over already.
local function mark_settled(id, memory_us)
  redis.call('ZREMRANGEBYSCORE', settled_key, '-inf', integer(now_us - memory_us))
  local is_new = redis.call('ZADD', settled_key, 'NX', integer(now_us), id) == 1
  redis.call('PEXPIRE', settled_key, integer(math.ceil(memory_us / 1000)))
  for _, account in ipairs(accounts) do
    release(account, { id })
  end
  return is_new
end

