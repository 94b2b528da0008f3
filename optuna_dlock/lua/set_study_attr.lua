-- set_study_attr: set one user or system attribute of a study.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] ops (hash)  KEYS[4] attributes (hash)
-- ARGV[1] key  ARGV[2] JSON  ARGV[3] client  ARGV[4] sequence number
-- Returns {0} | {-1} NO_STUDY | {-5} BUSY
-- Retry-safe: a sequence number that is not above the client's last one changes nothing.
-- include busy
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
local last = redis.call('HGET', KEYS[3], ARGV[3]) or '0:'
local sequence, number = string.match(last, '^(%d+):(%d*)$')
if tonumber(sequence) < tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[2])
  redis.call('HSET', KEYS[3], ARGV[3], ARGV[4] .. ':' .. number)
end
return {0}
