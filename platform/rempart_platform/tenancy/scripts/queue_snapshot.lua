-- How a queue stands, and where one request is in it.
-- ARGV: id, or ''; tenant, or ''
-- Reply: requests that wait; rows and tokens in leases; most rows and tokens; Jain's index of the last whole window;
--        of the tenant: requests that wait; of the request: 1 when it waits, requests ahead, estimate of the wait in us;
--        then of each class: requests that wait, tenants that wait, lag in virtual time between first and last of them
local entry = load_entry(waiting_key, ARGV[1])
local num_ahead = entry and num_ahead_of(ARGV[1], entry) or 0
local reply = {
  redis.call('ZCARD', order_key), state('rows'), state('tokens'), state('max_rows'), state('max_tokens'),
  redis.call('HGET', state_key, 'jain') or '1', num_waiting_of(ARGV[2]),
  entry and 1 or 0, num_ahead, entry and estimate_us(num_ahead) or 0,
}
for class = 1, NUM_CLASSES do
  local first = redis.call('ZRANGE', ready_keys[class], 0, 0, 'WITHSCORES')
  local last = redis.call('ZRANGE', ready_keys[class], -1, -1, 'WITHSCORES')
  reply[#reply + 1] = redis.call('ZLEXCOUNT', order_key, '[' .. class, '(' .. (class + 1))
  reply[#reply + 1] = redis.call('ZCARD', ready_keys[class])
  reply[#reply + 1] = first[2] and exact(tonumber(last[2]) - tonumber(first[2])) or '0'
end
return reply
