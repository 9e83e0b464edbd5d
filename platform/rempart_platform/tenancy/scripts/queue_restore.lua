-- Gives a lease back that was swept while its router could not say that it lives. Again is harmless.
-- ARGV: id, router, class, tenant, weight, charge, rows, tokens, fence
-- Reply: 1 when this call gave it back
local id = ARGV[1]
if redis.call('HEXISTS', leases_key, id) == 1 then
  return { 0 }
end
local fence = tonumber(ARGV[9])
hold_lease(id, {
  class = tonumber(ARGV[3]), tenant = ARGV[4], weight = tonumber(ARGV[5]), charge = tonumber(ARGV[6]),
  rows = tonumber(ARGV[7]), tokens = tonumber(ARGV[8]), router = ARGV[2], fence = fence,
})
-- A Redis that forgot everything also forgot which numbers it gave.
if state('fence') < fence then
  redis.call('HSET', state_key, 'fence', integer(fence))
end
return { 1 }
