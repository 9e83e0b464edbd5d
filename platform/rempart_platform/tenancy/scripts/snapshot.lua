-- What counts for a tenant now.
-- ARGV: window_us
-- Reply: requests, tokens, leases; now_us
sweep_window(tonumber(ARGV[1]))
sweep_leases()
return { redis.call('ZCARD', window_key), spent_tokens(), redis.call('ZCARD', leases_key), now_us }
