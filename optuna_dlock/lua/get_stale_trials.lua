-- get_stale_trials: RUNNING trials whose last heartbeat is older than the grace period.
-- KEYS[1] meta (hash)  KEYS[2] heartbeats (sorted set)
-- ARGV[1] grace period in ms
-- Returns {0, {number, ...}} (at most 1 000) | {-1} NO_STUDY
-- Retry-safe: only hints are written, namely since when a trial without any heartbeat is known: its worker may have
-- died before the first one, or be about to send it.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, number in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], 0, 0, 'LIMIT', 0, 1000)) do
  redis.call('ZADD', KEYS[2], string.format('%.0f', now), number)
end
local oldest = string.format('(%.0f', now - tonumber(ARGV[1]))
return {0, redis.call('ZRANGEBYSCORE', KEYS[2], '(0', oldest, 'LIMIT', 0, 1000)}
