-- Puts the shards of a valid job into its stream.
-- ARGV: job, token, entry, now_s, model, lines, shards
-- Reply: 1, or 0 when another worker validates it
local job, token, entry, now_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if not holds(job, 'validate', token) then
  return { 0 }
end
end_task(job, 'validate', entry)
if job_number(job, 'num_shards') > 0 then
  return { 1 } -- started already
end
if job_field(job, 'status') == 'cancelling' then
  close_job(job, 'cancelled', now_s)
  return { 1 }
end
redis.call(
  'HSET', key('job', job), 'status', 'in_progress', 'in_progress_s', now_s,
  'model', ARGV[5], 'total', ARGV[6], 'num_shards', ARGV[7]
)
for shard = 0, tonumber(ARGV[7]) - 1 do
  add_task(job, shard)
end
return { 1 }
