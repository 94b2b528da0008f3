-- get_stale_trials: RUNNING trials whose last heartbeat is older than the grace period.
-- KEYS[1] meta (hash)  KEYS[2] heartbeats (sorted set)
-- ARGV[1] grace period in ms
-- Returns {0, {number, ...}} (at most 1 000) | {-1} NO_STUDY
-- Retry-safe: reads only.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
local now = redis.call('TIME')
local oldest = now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(ARGV[1])
return {0, redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('(%.0f', oldest), 'LIMIT', 0, 1000)}
