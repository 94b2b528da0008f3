-- record_heartbeat: note that the worker of a RUNNING trial lives, by the server's clock.
-- KEYS[1] live (hash)  KEYS[2] heartbeats (sorted set)
-- ARGV[1] number
-- Returns {0} | {-2} NO_TRIAL (none that runs)
-- Retry-safe: a later heartbeat is as good.
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record or string.byte(record, 2) ~= 0 then
  return {-2}
end
local now = redis.call('TIME')
redis.call('ZADD', KEYS[2], string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), ARGV[1])
return {0}
