-- record_heartbeat: note that the worker of RUNNING trials lives, by the server's clock.
-- KEYS[1] live (hash)  KEYS[2] heartbeats (sorted set)  KEYS[3] ran by (list)
-- ARGV[1] index of the worker that they must be run by, 0 for any  ARGV[2..] numbers
-- Returns {0, how many of them run}
-- Retry-safe: a later heartbeat is as good.
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local count = 0
for i = 2, #ARGV do
  local record = redis.call('HGET', KEYS[1], ARGV[i])
  if record and string.byte(record, 2) == 0
      and (ARGV[1] == '0' or redis.call('LINDEX', KEYS[3], ARGV[i]) == ARGV[1]) then
    redis.call('ZADD', KEYS[2], now, ARGV[i])
    count = count + 1
  end
end
return {0, count}
