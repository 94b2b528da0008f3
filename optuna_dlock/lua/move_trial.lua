-- move_trial: move an unfinished trial to RUNNING (claim it, G4) or WAITING.
-- KEYS[1] live (hash)  KEYS[2] section lock  KEYS[3] trial (hash)  KEYS[4] log (list)  KEYS[5] meta (hash)
-- KEYS[6] waiting (sorted set)  KEYS[7] offers (hash)  KEYS[8] heartbeats (sorted set)  KEYS[9] finished (hash)
-- KEYS[10] order (list)  KEYS[11] ran by (list)  KEYS[12] workers (hash)
-- ARGV[1] number  ARGV[2] version the record was made from  ARGV[3] record  ARGV[4] client
-- ARGV[5] worker that claims it: index or description, 0 for nobody  ARGV[6] 1 if that one sends heartbeats, else 0
-- Returns {0, version, index of the worker} | {-2} NO_TRIAL | {-3} FINISHED | {-4} BEHIND | {-5} BUSY
--   | {-9} NOT_WAITING | {-15} TAKEN (the client ran it, and another worker took it over)
--   | {-30, used, running, limit} EXHAUSTED (the budget) | {-31} STOPPED
-- Retry-safe: the record holds a token of its call; the same record again gets {0, version, index of the worker}.
-- include busy
-- include log_change
-- include count_spent
-- include note_runner
-- include replace_record
-- include worker_index
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old or redis.call('EXISTS', KEYS[5]) == 0 then -- the second: a study that is being swept away gets no new keys
  if not old and redis.call('HEXISTS', KEYS[9], ARGV[1]) == 1 then
    return {-3}
  end
  return {-2}
end
local version = redis.call('HGET', KEYS[3], '.v') or '0'
if old == ARGV[3] then
  return {0, tonumber(version), worker_index(KEYS[12], ARGV[5])}
end
local state = string.byte(ARGV[3], 2)
if state == 0 and string.byte(old, 2) ~= 4 then
  return {-9}
end
if state == 4 and redis.call('HGET', KEYS[3], '.q' .. ARGV[4]) == 'x' then
  return {-15}
end
if busy(KEYS[2]) then
  return {-5}
end
if version ~= ARGV[2] then
  return {-4}
end
if state == 0 then
  local limits = redis.call('HMGET', KEYS[5], 'stopped', 'limit')
  if limits[1] then
    return {-31}
  end
  if limits[2] then
    local spent = count_spent(KEYS[5], KEYS[10], KEYS[9], true)
    local running = redis.call('HLEN', KEYS[1]) - redis.call('ZCARD', KEYS[6])
    if spent + running >= tonumber(limits[2]) then
      return {-30, spent, running, limits[2]}
    end
  end
end
version = tonumber(version) + 1
replace_record(KEYS[1], KEYS[3], ARGV[1], ARGV[3], ARGV[4])
local worker = worker_index(KEYS[12], ARGV[5])
note_runner(KEYS[11], tonumber(ARGV[1]), worker)
redis.call('HSET', KEYS[3], '.v', version)
log_change(KEYS[4], KEYS[5], ARGV[1], version, '.b', ARGV[3])
redis.call('HDEL', KEYS[7], ARGV[1])
if state == 4 then
  redis.call('ZADD', KEYS[6], ARGV[1], ARGV[1])
  redis.call('ZREM', KEYS[8], ARGV[1])
else
  redis.call('ZREM', KEYS[6], ARGV[1])
  if ARGV[6] == '1' then
    redis.call('ZADD', KEYS[8], 0, ARGV[1])
  end
end
return {0, version, worker}
