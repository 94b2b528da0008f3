-- claim_params: let the first trial with these parameters train, and tell the others who that is.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] live (hash)  KEYS[4] trial (hash)  KEYS[5] finished (hash)
-- KEYS[6] param sets (hash)  KEYS[7] duplicates (hash)  KEYS[8] dists (list)
-- ARGV[1] number  ARGV[2] version the parameters were read from  ARGV[3] their digest  ARGV[4] distributions known
-- Returns {0} claimed | {1, record, {JSON, ...}, owner} the owner is COMPLETE | {2, owner} it is RUNNING
--   | {-1} NO_STUDY | {-2} NO_TRIAL | {-3} FINISHED | {-4} BEHIND | {-5} BUSY | {-12} NOT_RUNNING
-- Retry-safe: the owner of a set is known by its number, so the same trial again gets {0}.
-- A claim stands exactly while its owner is RUNNING or COMPLETE: nobody has to give one back, and the claim of a
-- trial that failed, was pruned or was reaped is void from that moment on.
-- include busy
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
local own = redis.call('HGET', KEYS[3], ARGV[1])
if not own then
  if redis.call('HEXISTS', KEYS[5], ARGV[1]) == 1 then
    return {-3}
  end
  return {-2}
elseif string.byte(own, 2) ~= 0 then
  return {-12}
elseif (redis.call('HGET', KEYS[4], '.v') or '0') ~= ARGV[2] then
  return {-4}
end
local owner = redis.call('HGET', KEYS[6], ARGV[3])
if owner and owner ~= ARGV[1] then
  local record = redis.call('HGET', KEYS[5], owner)
  if record and string.byte(record, 2) == 1 then
    redis.call('HSET', KEYS[7], ARGV[1], owner .. ' COMPLETE')
    return {1, record, redis.call('LRANGE', KEYS[8], ARGV[4], -1), owner}
  end
  record = redis.call('HGET', KEYS[3], owner)
  if record and string.byte(record, 2) == 0 then
    redis.call('HSET', KEYS[7], ARGV[1], owner .. ' RUNNING')
    return {2, owner}
  end
end
redis.call('HSET', KEYS[6], ARGV[3], ARGV[1])
redis.call('HDEL', KEYS[7], ARGV[1]) -- it may have waited for an owner that failed
return {0}
