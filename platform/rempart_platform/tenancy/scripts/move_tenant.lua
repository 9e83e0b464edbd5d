-- Gives a tenant another plan.
-- ARGV: plan or ''
-- Reply: "done", or "changed" when it is not the plan that was announced last
local tenant, plan = KEYS[1], ARGV[1]
if plan == '' then
  redis.call('HDEL', tenant, 'plan', 'next_plan')
  return { 'done' }
end
if redis.call('HGET', tenant, 'next_plan') ~= plan then
  return { 'changed' }
end
redis.call('HSET', tenant, 'plan', plan)
redis.call('HDEL', tenant, 'next_plan')
return { 'done' }
