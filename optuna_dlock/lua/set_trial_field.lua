-- set_trial_field: write one parameter, report or attribute of an unfinished trial.
-- KEYS[1] trial (hash)  KEYS[2] log (list)  KEYS[3] meta (hash)  KEYS[4] live (hash)
-- ARGV[1] number  ARGV[2] client  ARGV[3] field  ARGV[4] value  ARGV[5] sequence number
-- Returns the trial's new version (1, 2, ...) | -2 NO_TRIAL (none that is unfinished)
--   | -15 TAKEN (the client ran it, and another worker took it over)
-- Retry-safe: a sequence number that is not above the client's last one for this trial changes nothing.
-- include log_change
local seen = '.q' .. ARGV[2]
local head = redis.call('HMGET', KEYS[1], '.v', seen)
local version = tonumber(head[1])
if not version then
  -- The first write; later ones find the hash, which goes when the trial finishes. A study that is being
  -- swept away has no meta any more, and must not get new keys.
  local record = redis.call('HGET', KEYS[4], ARGV[1])
  if not record or redis.call('EXISTS', KEYS[3]) == 0 then
    return -2
  end
  if string.byte(record, 2) == 4 then
    -- A WAITING trial is read from its record alone, unless the record says that there is more.
    redis.call('HSET', KEYS[4], ARGV[1], string.char(string.byte(record, 1) + 128) .. string.sub(record, 2))
  end
  version = 0
elseif head[2] == 'x' then
  return -15
elseif head[2] and tonumber(head[2]) >= tonumber(ARGV[5]) then
  return version
end
version = version + 1
redis.call('HSET', KEYS[1], ARGV[3], ARGV[4], '.v', version, seen, ARGV[5])
log_change(KEYS[2], KEYS[3], ARGV[1], version, ARGV[3], ARGV[4])
return version
