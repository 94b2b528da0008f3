-- claim_finished: let COMPLETE trials own their parameters, as if they had claimed them before they trained.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] live (hash)  KEYS[4] finished (hash)
-- KEYS[5] param sets (hash)
-- ARGV[1] numbers of COMPLETE trials, separated by spaces  ARGV[2] the digests of their parameters, 16 bytes each
-- Returns {0, how many became owners} | {-1} NO_STUDY | {-5} BUSY
-- Retry-safe: a set whose owner is RUNNING or COMPLETE is left alone, so the second time nothing is left to do.
-- include busy
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
local function is_complete(number)
  local record = redis.call('HGET', KEYS[4], number)
  return record and string.byte(record, 2) == 1
end
local function is_running(number)
  local record = redis.call('HGET', KEYS[3], number)
  return record and string.byte(record, 2) == 0
end
local at, made = 1, 0
for number in string.gmatch(ARGV[1], '%d+') do
  local digest = string.sub(ARGV[2], at, at + 15)
  at = at + 16
  local owner = redis.call('HGET', KEYS[5], digest)
  if not (owner and (is_complete(owner) or is_running(owner))) then
    redis.call('HSET', KEYS[5], digest, number)
    made = made + 1
  end
end
return {0, made}
