-- Ends a reservation: frees what it held, corrects the window to what was used, charges the budgets, adds the usage.
-- Once; again is harmless.
-- ARGV: id, window_us, memory_us, tokens to count for, money, model, prompt tokens, completion tokens, cached tokens
-- Reply: 1 when this call settled it, 0 when it was settled before; now_us
local id, window_us, memory_us, used = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local money, model = tonumber(ARGV[5]), ARGV[6]

if not mark_settled(id, memory_us) then
  return { 0, now_us }
end

for _, account in ipairs(accounts) do
  sweep_window(account, window_us)
  local held = redis.call('HGET', account.amounts, id)
  if held then
    redis.call('HSET', account.amounts, id, integer(used))
    redis.call('INCRBY', account.spent, integer(used - tonumber(held)))
  end
  local before = budgets_used(account)
  redis.call(
    'HSET', account.budgets,
    'day', today,
    'day_tokens', integer(before.tokens_per_day + used),
    'day_money', integer(before.money_per_day + money),
    'month', string.sub(today, 1, 7),
    'month_tokens', integer(before.tokens_per_month + used),
    'month_money', integer(before.money_per_month + money)
  )
  redis.call('PEXPIREAT', account.budgets, integer(next_month(now_s) * 1000))
end

local counters = {
  requests = 1, prompt_tokens = ARGV[7], completion_tokens = ARGV[8], cached_tokens = ARGV[9],
  cost_nanos = integer(money),
}
for counter, count in pairs(counters) do
  redis.call('HINCRBY', usage_key, today .. ' ' .. counter .. ' ' .. model, count)
end
return { 1, now_us }
