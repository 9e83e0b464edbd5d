-- Renews the leases of reservations that their router still holds; gives one back that was swept while it was away.
-- ARGV: lease_us, then id, tokens and money of each
-- Reply: how many were renewed; now_us
local lease_us = tonumber(ARGV[1])

local num_renewed = 0
for i = 2, #ARGV, 3 do
  if not redis.call('ZSCORE', settled_key, ARGV[i]) then
    for _, account in ipairs(accounts) do
      lease(account, ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), lease_us)
    end
    num_renewed = num_renewed + 1
  end
end
return { num_renewed, now_us }
