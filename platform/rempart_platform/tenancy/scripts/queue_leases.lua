-- The leases of a router, a page at a time.
-- ARGV: router; after which id and fence, as "<id> <fence>", or ''
-- Reply: id and fence of each lease of the page; none after the last
local router, after = ARGV[1], ARGV[2]
local from = after == '' and '[' .. router .. ' g ' or '(' .. router .. ' g ' .. after

local reply = {}
for _, member in ipairs(redis.call('ZRANGEBYLEX', owned_key, from, '(' .. router .. ' g!', 'LIMIT', 0, MAX_LISTED)) do
  local id, fence = string.match(member, '^%S+ g (%S+) (%d+)$')
  reply[#reply + 1] = id
  reply[#reply + 1] = fence
end
return reply
