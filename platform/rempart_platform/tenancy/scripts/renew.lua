-- Renews the leases of reservations that their router still holds; gives one back that was swept while it was away.
-- ARGV: lease_us, ids...
-- Reply: how many were renewed; now_us
local lease_us = tonumber(ARGV[1])

local num_renewed = 0
for i = 2, #ARGV do
  if not redis.call('ZSCORE', settled_key, ARGV[i]) then
    redis.call('ZADD', leases_key, integer(now_us + lease_us), ARGV[i])
    num_renewed = num_renewed + 1
  end
end
if num_renewed > 0 then
  redis.call('PEXPIREAT', leases_key, integer(math.ceil((now_us + lease_us) / 1000)))
end
return { num_renewed, now_us }
