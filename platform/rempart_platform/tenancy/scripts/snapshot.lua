-- What counts in one account now.
-- ARGV: window_us
-- Reply: requests and tokens of the window; requests, tokens and money in flight; tokens and money that were settled
--   this day, and this month; now_us
local account = accounts[1]
sweep_window(account, tonumber(ARGV[1]))
sweep_leases(account)
local held_tokens, held_money = held_sums(account)
local used = budgets_used(account)
return {
  redis.call('ZCARD', account.window), spent_tokens(account),
  redis.call('ZCARD', account.leases), held_tokens, held_money,
  used.tokens_per_day, used.money_per_day, used.tokens_per_month, used.money_per_month,
  now_us,
}
