-- Ends a request, whether it waits or was granted, and grants what then has room. Again is harmless.
-- ARGV: id, fence (0: whichever), charge (what it came to), router's capacity: rows, tokens, reserved rows, reserved
--       tokens, lasts_us; age_us
-- Reply: what it was: 'granted', 'waiting', or 'gone'; how many were granted; entries and leases swept
local id, fence, charge = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local was = 'gone'

local lease = load_entry(leases_key, id)
local entry = load_entry(waiting_key, id)
if lease and (fence == 0 or lease.fence == fence) then
  was = 'granted'
  end_lease(id, lease)
  correct(lease, charge)
  count_service(lease, charge)
elseif entry then
  was = 'waiting'
  give_up(id, entry)
end
tell_capacity(4)
local num_swept = sweep()
promote(tonumber(ARGV[9]))
return { was, dispatch(), num_swept }
