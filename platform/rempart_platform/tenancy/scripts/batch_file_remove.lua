-- Takes a file out of the list. Its content is removed by a janitor, should the caller not come to that.
-- ARGV: file, tenant, now_s
-- Reply: "removed", "missing", or "in_use" when an open job reads it
local file, tenant, now_s = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', key('file', file), 'tenant') ~= tenant then
  redis.call('ZREM', key('expiring'), tenant .. ' ' .. file)
  return { 'missing' }
end
if redis.call('EXISTS', key('users', file)) == 1 then
  return { 'in_use' }
end
redis.call('DEL', key('file', file))
redis.call('ZREM', key('files', tenant), file)
redis.call('ZREM', key('expiring'), tenant .. ' ' .. file)
redis.call('ZADD', key('uploads'), now_s, tenant .. ' ' .. file)
return { 'removed' }
