-- Ends a reservation as if it had never been made. Also for one that may not have arrived yet: it will find itself
-- settled. Again is harmless.
-- ARGV: id, window_us, memory_us
-- Reply: 1 when this call refunded it, 0 when it was over before; now_us
local id, window_us, memory_us = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

if not mark_settled(id, memory_us) then
  return { 0, now_us }
end

for _, account in ipairs(accounts) do
  sweep_window(account, window_us)
  local held = redis.call('HGET', account.amounts, id)
  if held then
    redis.call('ZREM', account.window, id)
    redis.call('HDEL', account.amounts, id)
    redis.call('DECRBY', account.spent, held)
  end
end
return { 1, now_us }
