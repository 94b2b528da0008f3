-- set_study_attr: set one user or system attribute of a study.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] ops (hash)  KEYS[4] attributes (hash)
-- ARGV[1] key  ARGV[2] JSON  ARGV[3] client  ARGV[4] sequence number
-- Returns {0} | {-1} NO_STUDY | {-5} BUSY
-- Retry-safe: a sequence number that is not above the client's last one changes nothing.
-- include busy
-- include once
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
if once(KEYS[3], ARGV[3], ARGV[4]) then
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[2])
end
return {0}
