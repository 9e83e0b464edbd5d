-- Changes a record of a tenant, a plan or a key, all at once.
-- ARGV: created_s to make one that is not there, or ''; how many fields to delete, these, then names and values to set
-- Reply: 1, or 0 when there is none
local record, created_s, num_deleted = KEYS[1], ARGV[1], tonumber(ARGV[2])
if created_s ~= '' then
  redis.call('HSETNX', record, 'created_s', created_s)
elseif redis.call('HEXISTS', record, 'created_s') == 0 then
  return { 0 }
end
for i = 3, num_deleted + 2 do
  redis.call('HDEL', record, ARGV[i])
end
for i = num_deleted + 3, #ARGV, 2 do
  redis.call('HSET', record, ARGV[i], ARGV[i + 1])
end
return { 1 }
