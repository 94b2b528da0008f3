-- get_trial: one trial, unless the caller has it as it is.
-- KEYS[1] meta (hash)  KEYS[2] live (hash)  KEYS[3] trial (hash)  KEYS[4] finished (hash)  KEYS[5] dists (list)
-- ARGV[1] number  ARGV[2] version the caller has, '' for none, 'F' for the finished trial  ARGV[3] distributions known
-- Returns {0} (as the caller has it) | {1, record, {JSON, ...}} finished
--   | {2, record, {JSON, ...}, {field, value, ...}} unfinished | {-1} NO_STUDY | {-2} NO_TRIAL
-- Retry-safe: reads only.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
local live = redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1
if live then
  if ARGV[2] == (redis.call('HGET', KEYS[3], '.v') or '0') then
    return {0}
  end
  return {2, redis.call('HGET', KEYS[2], ARGV[1]), redis.call('LRANGE', KEYS[5], ARGV[3], -1),
    redis.call('HGETALL', KEYS[3])}
end
if ARGV[2] == 'F' and redis.call('HEXISTS', KEYS[4], ARGV[1]) == 1 then
  return {0}
end
local record = redis.call('HGET', KEYS[4], ARGV[1])
if not record then
  return {-2}
end
return {1, record, redis.call('LRANGE', KEYS[5], ARGV[3], -1)}
