-- Makes a tenant with its limits, or leaves the one that exists as it is.
-- ARGV: created_s, then name and value of each limit that is set
-- Reply: 1 when it was made, 0 when it existed
if redis.call('HSETNX', tenant_key, 'created_s', ARGV[1]) == 0 then
  return { 0 }
end
if #ARGV > 1 then
  redis.call('HSET', tenant_key, unpack(ARGV, 2))
end
return { 1 }
