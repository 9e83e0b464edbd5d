-- Ends a reservation: frees its lease, corrects the window to what was used, adds the usage. Once; again is harmless.
-- ARGV: id, window_us, memory_us, tokens to count for, model, prompt tokens, completion tokens, cached tokens
-- Reply: 1 when this call settled it, 0 when it was settled before; now_us
local id, window_us, memory_us, used = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local model = ARGV[5]

-- "2026-11-23" of a time since the epoch: days are counted in eras of 400 years that begin on 1 March, so that the
-- leap day is the last of its year.
local function utc_day(seconds)
  local days = math.floor(seconds / 86400) + 719468
  local era = math.floor(days / 146097)
  local day_of_era = days - era * 146097
  local year_of_era = math.floor(
    (day_of_era - math.floor(day_of_era / 1460) + math.floor(day_of_era / 36524) - math.floor(day_of_era / 146096))
      / 365
  )
  local day_of_year = day_of_era - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local month_from_march = math.floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - math.floor((153 * month_from_march + 2) / 5) + 1
  local month = month_from_march < 10 and month_from_march + 3 or month_from_march - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02d', year, month, day)
end

if not mark_settled(id, memory_us) then
  return { 0, now_us }
end

sweep_window(window_us)
local held = redis.call('HGET', amounts_key, id)
if held then
  redis.call('HSET', amounts_key, id, integer(used))
  redis.call('INCRBY', spent_key, integer(used - tonumber(held)))
end

local day = utc_day(now_s)
local counters = { requests = 1, prompt_tokens = ARGV[6], completion_tokens = ARGV[7], cached_tokens = ARGV[8] }
for counter, count in pairs(counters) do
  redis.call('HINCRBY', usage_key, day .. ' ' .. counter .. ' ' .. model, count)
end
return { 1, now_us }
