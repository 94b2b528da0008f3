-- take_back_trial: take a RUNNING trial from the worker that ran it, to run it here or to put it in the queue again.
-- KEYS[1] live (hash)  KEYS[2] section lock  KEYS[3] trial (hash)  KEYS[4] log (list)  KEYS[5] meta (hash)
-- KEYS[6] waiting (sorted set)  KEYS[7] heartbeats (sorted set)  KEYS[8] ran by (list)  KEYS[9] workers (hash)
-- ARGV[1] number  ARGV[2] version the record was made from  ARGV[3] record
-- ARGV[4] index of the worker that ran it  ARGV[5] that worker's client
-- ARGV[6] worker that takes it: index or description, 0 for nobody  ARGV[7] 1 if that one sends heartbeats, else 0
-- ARGV[8] client of that one
-- Returns {0, version, its index} | {-4} BEHIND | {-5} BUSY | {-15} TAKEN (it does not run, or another worker runs it)
-- Retry-safe: the record holds a token of its call; the same record again gets {0, version, its index}.
-- include busy
-- include log_change
-- include note_runner
-- include replace_record
-- include worker_index
local old = redis.call('HGET', KEYS[1], ARGV[1])
local version = redis.call('HGET', KEYS[3], '.v') or '0'
if old == ARGV[3] then
  return {0, tonumber(version), worker_index(KEYS[9], ARGV[6])}
end
if busy(KEYS[2]) then
  return {-5}
end
if not old or string.byte(old, 2) ~= 0 or redis.call('LINDEX', KEYS[8], ARGV[1]) ~= ARGV[4]
    or redis.call('EXISTS', KEYS[5]) == 0 then -- a study that is being swept away must not get new keys
  return {-15}
end
if version ~= ARGV[2] then
  return {-4}
end
local worker = worker_index(KEYS[9], ARGV[6])
version = tonumber(version) + 1
replace_record(KEYS[1], KEYS[3], ARGV[1], ARGV[3], ARGV[8])
-- Whoever ran it is fenced: should it still live, its next write is refused, until it gets the trial again.
redis.call('HSET', KEYS[3], '.v', version, '.q' .. ARGV[5], 'x')
log_change(KEYS[4], KEYS[5], ARGV[1], version, '.b', ARGV[3])
note_runner(KEYS[8], tonumber(ARGV[1]), worker)
redis.call('ZREM', KEYS[7], ARGV[1])
if string.byte(ARGV[3], 2) == 4 then
  redis.call('ZADD', KEYS[6], ARGV[1], ARGV[1])
elseif ARGV[7] == '1' then
  redis.call('ZADD', KEYS[7], 0, ARGV[1])
end
return {0, version, worker}
