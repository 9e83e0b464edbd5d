-- Renews the leases of reservations that their router still holds; gives one back that was swept while it was away.
-- ARGV: lease_us, ids...
-- Reply: how many were renewed; now_us
local lease_us = tonumber(ARGV[1])

local num_renewed = 0
for i = 2, #ARGV do
  if not redis.call('ZSCORE', settled_key, ARGV[i]) then
    lease(ARGV[i], lease_us)
    num_renewed = num_renewed + 1
  end
end
return { num_renewed, now_us }
