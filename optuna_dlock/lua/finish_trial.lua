-- finish_trial: move an unfinished trial to a finished state, once (G3).
-- KEYS[1] live (hash)  KEYS[2] section lock  KEYS[3] trial (hash)  KEYS[4] finished (hash)  KEYS[5] order (list)
-- KEYS[6] waiting (sorted set)  KEYS[7] heartbeats (sorted set)  KEYS[8] log (list)  KEYS[9] meta (hash)
-- ARGV[1] number  ARGV[2] version the record was made from  ARGV[3] record  ARGV[4] client
-- Returns {0, length of order} | {-2} NO_TRIAL | {-3} FINISHED | {-4} BEHIND | {-5} BUSY
--   | {-15} TAKEN (the client ran it, and another worker took it over)
-- Retry-safe: the record holds a token of its call; the same record again gets {0}.
-- include busy
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old then
  local record = redis.call('HGET', KEYS[4], ARGV[1])
  if record == ARGV[3] then
    return {0, redis.call('LLEN', KEYS[5])}
  elseif record then
    return {-3}
  end
  return {-2}
end
if busy(KEYS[2]) then
  return {-5}
end
local head = redis.call('HMGET', KEYS[3], '.v', '.q' .. ARGV[4])
if head[2] == 'x' then
  return {-15}
elseif (head[1] or '0') ~= ARGV[2] then
  return {-4}
end
redis.call('HSET', KEYS[4], ARGV[1], ARGV[3])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[3])
if string.byte(old, 2) == 4 then
  redis.call('ZREM', KEYS[6], ARGV[1])
end
redis.call('ZREM', KEYS[7], ARGV[1])
if redis.call('HLEN', KEYS[1]) == 0 then
  -- No trial is unfinished: nobody needs the log of their changes, and its memory would stay for ever.
  local length = redis.call('LLEN', KEYS[8])
  if length > 256 then
    redis.call('DEL', KEYS[8])
    redis.call('HINCRBY', KEYS[9], 'base', length)
  end
end
return {0, redis.call('RPUSH', KEYS[5], ARGV[1])}
