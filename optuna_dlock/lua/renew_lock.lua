-- renew_lock: start the lease anew, if it has not run out.
-- KEYS[1] lock (string)
-- ARGV[1] ticket  ARGV[2] ttl in ms
-- Returns {0} | {-10} NOT_HELD
-- Retry-safe: the same again starts the lease anew once more.
local held = redis.call('GET', KEYS[1])
if not held or string.sub(held, 1, #ARGV[1] + 1) ~= ARGV[1] .. ' ' then
  return {-10}
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {0}
