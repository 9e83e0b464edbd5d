-- What the scripts of the fair queue share. Every one of them gets the same KEYS, all of one model and so of one slot.
-- Times are microseconds of this server's clock; virtual times are tokens served per unit of weight.
--
--   entry  = a request that waits, in the flow of its class and tenant
--   flow   = in order of rank: of arrival, or of deadlines and then arrival; `order` holds all flows in one sorted set, by
--            name: "<class><tenant> <rank> <id>"
--   ready  = flows with entries, by their virtual time; idle = flows without, that still are ahead of the floor
--   lease  = a request that was granted and has not ended; running = what leases of a flow were charged, per weight, and
--            rows and tokens of all leases of a tenant
local state_key, waiting_key, order_key, ages_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local routers_key, owned_key, leases_key, service_key = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local running_key = KEYS[9]
-- The only keys that are made here, for a grant may be of any router: they lie in the slot of this one.
local inbox_prefix = KEYS[10]
local ready_keys = { KEYS[11], KEYS[12], KEYS[13], KEYS[14] }
local idle_keys = { KEYS[15], KEYS[16], KEYS[17], KEYS[18] }
local NUM_CLASSES = 4

-- One call stays short whatever is to be done; the calls that follow do the rest.
local MAX_GRANTS, MAX_PROMOTED, MAX_SWEPT, MAX_LISTED = 8, 8, 8, 100
local SERVICE_WINDOW_US = 60000000
local INBOX_MS = 60000

local time_reply = redis.call('TIME')
local now_us = tonumber(time_reply[1]) * 1000000 + tonumber(time_reply[2])

-- tostring() would round a time to 14 digits.
local function integer(number)
  return string.format('%.0f', number)
end

-- As the double it is.
local function exact(number)
  return string.format('%.17g', number)
end

local function state(field)
  return tonumber(redis.call('HGET', state_key, field) or '0')
end

local function flow(class, tenant)
  return class .. tenant .. ' '
end

-- Where a request is in its flow: digits that sort by name.
local function rank(order, deadline_us, number)
  local arrival = string.format('%016.0f', number)
  return order == 'deadline' and string.format('%016.0f', deadline_us) .. arrival or arrival
end

local function place_in_order(id, entry)
  return flow(entry.class, entry.tenant) .. entry.rank .. ' ' .. id
end

-- No name of a tenant holds what sorts between ' ' and '!'.
local function past_flow(class, tenant)
  return '(' .. class .. tenant .. '!'
end

local function num_in_flow(class, tenant)
  return redis.call('ZLEXCOUNT', order_key, '[' .. flow(class, tenant), past_flow(class, tenant))
end

local function first_of_flow(class, tenant)
  local found =
    redis.call('ZRANGEBYLEX', order_key, '[' .. flow(class, tenant), past_flow(class, tenant), 'LIMIT', 0, 1)
  return found[1] and string.match(found[1], '^%S+ %d+ (.+)$')
end

local function num_waiting_of(tenant)
  local count = 0
  for class = 1, NUM_CLASSES do
    count = count + num_in_flow(class, tenant)
  end
  return count
end

local function load_entry(key, id)
  local packed = redis.call('HGET', key, id)
  return packed and cmsgpack.unpack(packed)
end

-- Where a flow begins that was idle: no better than the flow that is served next, so that idleness earns nothing. Of
-- that one counts what has ended: it still runs the rest, and may have been charged far too much for it.
local function floor_of(class)
  local lowest = redis.call('ZRANGE', ready_keys[class], 0, 0, 'WITHSCORES')
  if not lowest[1] then
    return state('floor' .. class)
  end
  return tonumber(lowest[2]) - tonumber(redis.call('HGET', running_key, flow(class, lowest[1])) or '0')
end

local function start_of(class, tenant)
  return math.max(floor_of(class), tonumber(redis.call('ZSCORE', idle_keys[class], tenant) or '0'))
end

-- Keeps the virtual time of a flow without entries while that is ahead of the floor. What the floor has passed goes;
-- each is put there once, so the cost is amortised.
local function park(class, tenant, virtual_time)
  local floor = floor_of(class)
  redis.call('ZREMRANGEBYSCORE', idle_keys[class], '-inf', exact(floor))
  if virtual_time > floor then
    redis.call('ZADD', idle_keys[class], exact(virtual_time), tenant)
  end
end

local function enter(id, entry, age_us)
  redis.call('HSET', waiting_key, id, cmsgpack.pack(entry))
  redis.call('ZADD', order_key, 0, place_in_order(id, entry))
  if not redis.call('ZSCORE', ready_keys[entry.class], entry.tenant) then
    local start = start_of(entry.class, entry.tenant)
    redis.call('ZREM', idle_keys[entry.class], entry.tenant)
    redis.call('ZADD', ready_keys[entry.class], exact(start), entry.tenant)
  end
  if entry.class > 1 then
    redis.call('ZADD', ages_key, integer(now_us + age_us), id)
  end
end

local function leave(id, entry)
  redis.call('HDEL', waiting_key, id)
  redis.call('ZREM', order_key, place_in_order(id, entry))
  redis.call('ZREM', ages_key, id)
  if num_in_flow(entry.class, entry.tenant) == 0 then
    local virtual_time = tonumber(redis.call('ZSCORE', ready_keys[entry.class], entry.tenant))
    redis.call('ZREM', ready_keys[entry.class], entry.tenant)
    park(entry.class, entry.tenant, virtual_time)
  end
end

local function give_up(id, entry)
  leave(id, entry)
  redis.call('ZREM', owned_key, entry.router .. ' w ' .. id)
end

local function count_running(entry, sign)
  local name = flow(entry.class, entry.tenant)
  local before = tonumber(redis.call('HGET', running_key, name) or '0')
  local after = before + sign * entry.charge / entry.weight
  if after > 1e-6 then
    redis.call('HSET', running_key, name, exact(after))
  else
    redis.call('HDEL', running_key, name)
  end
end

-- No class is called so.
local function holdings(tenant)
  return { 'rows ' .. tenant, 'tokens ' .. tenant }
end

local function count_holdings(entry, sign)
  local fields = holdings(entry.tenant)
  for i, amount in ipairs({ entry.rows, entry.tokens }) do
    if redis.call('HINCRBY', running_key, fields[i], integer(sign * amount)) <= 0 then
      redis.call('HDEL', running_key, fields[i])
    end
  end
end

local function hold_lease(id, entry)
  count_running(entry, 1)
  count_holdings(entry, 1)
  redis.call('HSET', leases_key, id, cmsgpack.pack(entry))
  redis.call('ZADD', owned_key, 0, entry.router .. ' g ' .. id .. ' ' .. integer(entry.fence))
  redis.call('HINCRBY', state_key, 'rows', integer(entry.rows))
  redis.call('HINCRBY', state_key, 'tokens', integer(entry.tokens))
end

local function end_lease(id, entry)
  count_running(entry, -1)
  count_holdings(entry, -1)
  redis.call('HDEL', leases_key, id)
  redis.call('ZREM', owned_key, entry.router .. ' g ' .. id .. ' ' .. integer(entry.fence))
  redis.call('HINCRBY', state_key, 'rows', integer(-entry.rows))
  redis.call('HINCRBY', state_key, 'tokens', integer(-entry.tokens))
end

-- Corrects what a flow was charged at its grant. One that is idle and behind the floor has nothing to win.
local function correct(entry, charge)
  local change = (charge - entry.charge) / entry.weight
  if change == 0 then
    return
  end
  local ready = redis.call('ZSCORE', ready_keys[entry.class], entry.tenant)
  if ready then
    redis.call('ZADD', ready_keys[entry.class], exact(tonumber(ready) + change), entry.tenant)
    return
  end
  local virtual_time = start_of(entry.class, entry.tenant) + change
  redis.call('ZREM', idle_keys[entry.class], entry.tenant)
  park(entry.class, entry.tenant, virtual_time)
end

-- Adds to what tenants were served in this window. Two sums give Jain's index of it: (sum x)^2 / (n * sum x^2).
local function count_service(entry, charge)
  if now_us >= state('service_end') then
    local sum, squares, count = state('service'), state('service_squares'), redis.call('HLEN', service_key)
    local jain = squares > 0 and sum * sum / (count * squares) or 1
    redis.call('UNLINK', service_key)
    redis.call('HSET', state_key, 'service', 0, 'service_squares', 0, 'jain', exact(jain), 'tenants', count)
    redis.call('HSET', state_key, 'service_end', integer(now_us + SERVICE_WINDOW_US))
  end
  local share = charge / entry.weight
  local before = tonumber(redis.call('HGET', service_key, entry.tenant) or '0')
  redis.call('HSET', service_key, entry.tenant, exact(before + share))
  redis.call('HSET', state_key, 'service', exact(state('service') + share))
  redis.call('HSET', state_key, 'service_squares', exact(state('service_squares') + share * (2 * before + share)))
end

-- What the engines take, as the router sees it that calls; its sight counts until it is old. 0 rows: it sees none.
-- ARGV: rows and tokens; those of them that are reserved; lasts_us
local function tell_capacity(first)
  local rows, tokens, lasts_us = tonumber(ARGV[first]), tonumber(ARGV[first + 1]), tonumber(ARGV[first + 4])
  if rows > 0 then
    redis.call(
      'HSET', state_key, 'max_rows', rows, 'max_tokens', tokens, 'reserved_rows', ARGV[first + 2],
      'reserved_tokens', ARGV[first + 3], 'seen_until', integer(now_us + lasts_us)
    )
  end
end

-- Whether several tenants were served in this window or the last. One that is alone leaves no reserve for others.
local function is_shared()
  return redis.call('HLEN', service_key) > 1 or state('tenants') > 1
end

-- Whether a grant that leaves so much granted, and so much held by its tenant, takes nothing that is kept for others.
-- A tenant may hold as much of that as is reserved. Of few rows that is most: there it may hold as much as the rest.
local function leaves_reserve(granted, held, max, reserved)
  return granted <= max - reserved or held <= math.min(reserved, max - reserved)
end

-- Whether an entry has room. What is larger than everything has it when nothing else runs. The reserve is for tenants
-- that hold no more than it: so one that floods leaves room for one that comes now and then.
local function has_room(entry)
  local told = redis.call(
    'HMGET', state_key, 'seen_until', 'rows', 'max_rows', 'reserved_rows', 'tokens', 'max_tokens', 'reserved_tokens'
  )
  for i = 1, #told do
    told[i] = tonumber(told[i] or '0')
  end
  local seen_until, rows, max_rows, reserved_rows, tokens, max_tokens, reserved_tokens = unpack(told)
  if seen_until <= now_us then
    return false
  end
  if rows == 0 then
    return true
  end
  rows, tokens = rows + entry.rows, tokens + entry.tokens
  if rows > max_rows or tokens > max_tokens then
    return false
  end
  if (rows <= max_rows - reserved_rows and tokens <= max_tokens - reserved_tokens) or not is_shared() then
    return true
  end
  local held = redis.call('HMGET', running_key, unpack(holdings(entry.tenant)))
  local held_rows, held_tokens = tonumber(held[1] or '0') + entry.rows, tonumber(held[2] or '0') + entry.tokens
  return leaves_reserve(rows, held_rows, max_rows, reserved_rows)
    and leaves_reserve(tokens, held_tokens, max_tokens, reserved_tokens)
end

-- Begins the lease of a request, charged at `start`. Returns the virtual time of its flow from now on.
local function grant(id, entry, start)
  entry.fence = redis.call('HINCRBY', state_key, 'fence', 1)
  redis.call('HSET', state_key, 'floor' .. entry.class, exact(start))
  hold_lease(id, entry)
  return start + entry.charge / entry.weight
end

-- How long one grant to a waiting request comes after another, as a moving mean: what a wait is estimated from.
local function note_pace()
  local last = redis.call('HGET', state_key, 'granted_at')
  if last then
    local mean = state('pace')
    redis.call('HSET', state_key, 'pace', exact(mean + (now_us - tonumber(last) - mean) / 16))
  end
  redis.call('HSET', state_key, 'granted_at', integer(now_us))
end

-- Grants what has room: the highest class first, in it the flow with the lowest virtual time, in that the oldest.
-- The first that has no room stops all behind it, or the large would starve. Returns how many were granted.
local function dispatch()
  local num_granted = 0
  for _ = 1, MAX_GRANTS do
    local class, next_flow
    for candidate = 1, NUM_CLASSES do
      next_flow = redis.call('ZRANGE', ready_keys[candidate], 0, 0, 'WITHSCORES')
      if next_flow[1] then
        class = candidate
        break
      end
    end
    if not class then
      -- The next wait has nothing to do with this one's pace.
      redis.call('HDEL', state_key, 'granted_at')
      break
    end
    local tenant, start = next_flow[1], tonumber(next_flow[2])
    local id = first_of_flow(class, tenant)
    local entry = load_entry(waiting_key, id)
    if entry.deadline <= now_us then
      give_up(id, entry)
    else
      if not has_room(entry) then
        break
      end
      note_pace()
      redis.call('ZADD', ready_keys[class], exact(grant(id, entry, start)), tenant)
      give_up(id, entry)
      local inbox = inbox_prefix .. entry.router
      redis.call('RPUSH', inbox, id .. ' ' .. integer(entry.fence))
      redis.call('PEXPIRE', inbox, INBOX_MS)
      num_granted = num_granted + 1
    end
  end
  return num_granted
end

-- Moves what has waited long enough to the class above.
local function promote(age_us)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', ages_key, '-inf', integer(now_us), 'LIMIT', 0, MAX_PROMOTED)) do
    local entry = load_entry(waiting_key, id)
    leave(id, entry)
    entry.class = entry.class - 1
    enter(id, entry, age_us)
  end
end

-- Takes away what routers held that no longer say that they live: their clients are gone. Returns how many.
local function sweep()
  local gone = redis.call('ZRANGEBYSCORE', routers_key, '-inf', integer(now_us), 'LIMIT', 0, 1)[1]
  if not gone then
    return 0
  end
  local owned = redis.call('ZRANGEBYLEX', owned_key, '[' .. gone .. ' ', '(' .. gone .. '!', 'LIMIT', 0, MAX_SWEPT)
  for _, member in ipairs(owned) do
    local kind, id = string.match(member, '^%S+ (%a) (%S+)')
    if kind == 'w' then
      give_up(id, load_entry(waiting_key, id))
    else
      end_lease(id, load_entry(leases_key, id))
    end
  end
  if #owned < MAX_SWEPT then
    redis.call('ZREM', routers_key, gone)
    redis.call('DEL', inbox_prefix .. gone)
  end
  return #owned
end

-- Whether a router has said in time that it lives. One that has not may have lost what it held.
local function is_living(router)
  return tonumber(redis.call('ZSCORE', routers_key, router) or '0') > now_us
end

-- Requests that are served before one, about: all of higher classes, and of its own as many of each flow as of its own.
local function num_ahead_of(id, entry)
  local own = '(' .. place_in_order(id, entry)
  local before = redis.call('ZLEXCOUNT', order_key, '[' .. flow(entry.class, entry.tenant), own)
  local higher = redis.call('ZLEXCOUNT', order_key, '-', '(' .. entry.class)
  local same = redis.call('ZLEXCOUNT', order_key, '[' .. entry.class, '(' .. (entry.class + 1))
  local flows = redis.call('ZCARD', ready_keys[entry.class])
  return higher + math.min((before + 1) * flows, same) - 1
end

local function estimate_us(num_ahead)
  return math.ceil((num_ahead + 1) * state('pace'))
end

