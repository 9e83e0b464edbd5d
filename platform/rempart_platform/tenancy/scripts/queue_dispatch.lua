-- Says that a router lives, what room it sees, and grants what has room. Called steadily by every router: the net under
-- everything that may get lost between Redis and a router.
-- ARGV: router, lease_us, its capacity: rows, tokens, reserved rows, reserved tokens, lasts_us; age_us
-- Reply: 1 when the router was known, 0 when what it held may be lost; how many were granted; entries and leases
--        swept; how many leases the router has
local router, lease_us = ARGV[1], tonumber(ARGV[2])

local was_living = is_living(router)
redis.call('ZADD', routers_key, integer(now_us + lease_us), router)
tell_capacity(3)
local num_swept = sweep()
promote(tonumber(ARGV[8]))
local num_granted = dispatch()
local num_leases = redis.call('ZLEXCOUNT', owned_key, '[' .. router .. ' g ', '(' .. router .. ' g!')
return { was_living and 1 or 0, num_granted, num_swept, num_leases }
