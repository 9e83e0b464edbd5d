-- Lists a file whose content is stored.
-- ARGV: file, tenant, the most files of the tenant or 0, when it expires or 0, then names and values of its record
-- Reply: 1, or 0 when the tenant has too many
local file, tenant, most, expires_s = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local listed = key('files', tenant)
local is_new = not redis.call('ZSCORE', listed, file)
if is_new and most > 0 and redis.call('ZCARD', listed) >= most then
  return { 0 }
end
redis.call('HSET', key('file', file), unpack(ARGV, 5))
if is_new then
  redis.call('ZADD', listed, next_number('number'), file)
end
if expires_s ~= '0' then
  redis.call('ZADD', key('expiring'), expires_s, tenant .. ' ' .. file)
end
redis.call('ZREM', key('uploads'), tenant .. ' ' .. file)
return { 1 }
