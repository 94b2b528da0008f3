-- stop_study: let no trial of a study begin any more, or let them begin again.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] ops (hash)
-- ARGV[1] 1 to stop | 0 to resume  ARGV[2] client  ARGV[3] sequence number
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
if once(KEYS[3], ARGV[2], ARGV[3]) then
  if ARGV[1] == '1' then
    redis.call('HSET', KEYS[1], 'stopped', 1)
  else
    redis.call('HDEL', KEYS[1], 'stopped')
  end
end
return {0}
