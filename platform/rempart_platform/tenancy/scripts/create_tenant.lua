-- Makes a tenant, or leaves the one that exists as it is.
-- ARGV: plan or '', created_s, then names and values of its record
-- Reply: "done", "exists", or "changed" when it is not the plan that was announced last
local tenant, plan, created_s = KEYS[1], ARGV[1], ARGV[2]
if plan ~= '' and redis.call('HGET', tenant, 'next_plan') ~= plan then
  return { 'changed' }
end
redis.call('HDEL', tenant, 'next_plan')
if redis.call('HSETNX', tenant, 'created_s', created_s) == 0 then
  return { 'exists' }
end
if plan ~= '' then
  redis.call('HSET', tenant, 'plan', plan)
end
for i = 3, #ARGV, 2 do
  redis.call('HSET', tenant, ARGV[i], ARGV[i + 1])
end
return { 'done' }
