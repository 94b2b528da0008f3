-- set_trial_field: write one parameter, report or attribute of an unfinished trial.
-- KEYS[1] live (hash)  KEYS[2] trial (hash)  KEYS[3] log (list)  KEYS[4] meta (hash)  KEYS[5] finished (hash)
-- ARGV[1] number  ARGV[2] field  ARGV[3] value  ARGV[4] client  ARGV[5] sequence number
-- Returns the trial's new version (1, 2, ...) | -2 NO_TRIAL | -3 FINISHED
-- Retry-safe: a sequence number that is not above the client's last one for this trial changes nothing.
-- include log_change
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  if redis.call('HEXISTS', KEYS[5], ARGV[1]) == 1 then
    return -3
  end
  return -2
end
local seen = '.q' .. ARGV[4]
local head = redis.call('HMGET', KEYS[2], '.v', seen)
local version = tonumber(head[1] or 0)
if head[2] and tonumber(head[2]) >= tonumber(ARGV[5]) then
  return version
end
version = version + 1
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3], '.v', version, seen, ARGV[5])
log_change(KEYS[3], KEYS[4], ARGV[1], version, ARGV[2], ARGV[3])
return version
