-- release_lock: give the lock to the next waiter, or free it.
-- KEYS[1] lock (string)  KEYS[2] fence (counter)  KEYS[3] queue (list)
-- KEYS[4] what this connection released last (string)
-- ARGV[1] ticket  ARGV[2] what the names of all wake lists begin with  ARGV[3] ms to remember the release for
-- Returns {0} | {-10} NOT_HELD
-- Retry-safe (G6): the ticket released last by this connection gets {0} again.
-- include hand_over
local held = redis.call('GET', KEYS[1])
if not held or string.sub(held, 1, #ARGV[1] + 1) ~= ARGV[1] .. ' ' then
  if redis.call('GET', KEYS[4]) == ARGV[1] then
    return {0}
  end
  return {-10}
end
redis.call('SET', KEYS[4], ARGV[1], 'PX', ARGV[3])
if not hand_over(KEYS[1], KEYS[2], KEYS[3], ARGV[2]) then
  redis.call('DEL', KEYS[1])
end
return {0}
