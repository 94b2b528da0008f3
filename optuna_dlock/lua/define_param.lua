-- define_param: give a distribution its id in this study; the first one of a name fixes the name's kind.
-- KEYS[1] meta (hash)  KEYS[2] dists (list)  KEYS[3] distribution ids (hash)  KEYS[4] claims (hash)
-- ARGV[1] name  ARGV[2] JSON [name, distribution]  ARGV[3] kind, '' to claim nothing  ARGV[4] distributions known
-- Returns {0, id, {JSON, ...} after those known, {name, kind, ...}} | {-1} NO_STUDY
--   | {-6, kind, the same JSON} INCOMPATIBLE
-- Retry-safe: the same again finds what it defined.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
if ARGV[3] ~= '' and redis.call('HSETNX', KEYS[4], ARGV[1], ARGV[3]) == 0 then
  local kind = redis.call('HGET', KEYS[4], ARGV[1])
  if kind ~= ARGV[3] then
    return {-6, kind, redis.call('LRANGE', KEYS[2], ARGV[4], -1)}
  end
end
local id = redis.call('HGET', KEYS[3], ARGV[2])
if not id then
  id = redis.call('RPUSH', KEYS[2], ARGV[2]) - 1
  redis.call('HSET', KEYS[3], ARGV[2], id)
end
return {0, tonumber(id), redis.call('LRANGE', KEYS[2], ARGV[4], -1), redis.call('HGETALL', KEYS[4])}
