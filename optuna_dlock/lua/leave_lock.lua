-- leave_lock: stop waiting for the lock, and pass it on if it was given to this ticket meanwhile.
-- KEYS[1] lock (string)  KEYS[2] fence (counter)  KEYS[3] queue (list)
-- KEYS[4] wake list of this ticket  KEYS[5] mark that this ticket waits (string)
-- ARGV[1] ticket  ARGV[2] what the names of all wake lists begin with
-- Returns {0}
-- Retry-safe: the second time there is nothing left to do.
-- include hand_over
if redis.call('DEL', KEYS[5]) == 1 then
  redis.call('LREM', KEYS[3], 0, ARGV[1])
end
redis.call('DEL', KEYS[4])
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, #ARGV[1] + 1) == ARGV[1] .. ' ' then
  if not hand_over(KEYS[1], KEYS[2], KEYS[3], ARGV[2]) then
    redis.call('DEL', KEYS[1])
  end
end
return {0}
