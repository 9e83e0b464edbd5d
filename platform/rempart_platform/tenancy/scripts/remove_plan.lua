-- Removes a plan, unless its removal was called off or begun again since.
-- ARGV: the mark of its removal
-- Reply: 1, or 0 when it has another mark or none
if redis.call('HGET', KEYS[1], 'removing') ~= ARGV[1] then
  return { 0 }
end
redis.call('DEL', KEYS[1])
return { 1 }
