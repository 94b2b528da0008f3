-- note_holder: give the holder of a pottery.Redlock a fencing token, and note who it is.
-- KEYS[1] key of the Redlock (string)  KEYS[2] note (string: Redlock's value, token since owner)  KEYS[3] fence
-- ARGV[1] owner  ARGV[2] ttl in ms
-- Returns {0, token} | {-10} NOT_HELD
-- Retry-safe: the same again gets a higher token; nobody has seen the one before.
local held = redis.call('GET', KEYS[1])
if not held then
  return {-10}
end
local time = redis.call('TIME')
local since = time[1] * 1000 + math.floor(time[2] / 1000)
local token = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[2], held .. ' ' .. token .. ' ' .. since .. ' ' .. ARGV[1], 'PX', ARGV[2])
return {0, token}
