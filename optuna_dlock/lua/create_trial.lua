-- create_trial: give the next number to a new trial of any state.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] ops (hash)  KEYS[4] live (hash)  KEYS[5] log (list)
-- KEYS[6] waiting (sorted set)  KEYS[7] finished (hash)  KEYS[8] order (list)
-- KEYS[9] ran by (list)  KEYS[10] workers (hash)  KEYS[11] heartbeats (sorted set)
-- ARGV[1] record  ARGV[2] client  ARGV[3] sequence number  ARGV[4] entries of order the caller has read
-- ARGV[5] how many finished trials to return at most
-- ARGV[6] worker that runs it: index or description, 0 for nobody  ARGV[7] 1 if that one sends heartbeats, else 0
-- Returns {0, number, length of order, {number, ...}, {record, ...}, index of the worker}
--   | {-1} NO_STUDY | {-5} BUSY | {-11} STALE
-- Retry-safe (G6): the client's last sequence number again gets the number it got then.
-- include busy
-- include log_change
-- include note_runner
-- include worker_index
local OPS_CAP = 20000
local n = redis.call('HGET', KEYS[1], 'n')
if not n then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
local worker = worker_index(KEYS[10], ARGV[6])
local number = n
local last = redis.call('HGET', KEYS[3], ARGV[2])
local sequence, made = 0, ''
if last then
  sequence, made = string.match(last, '^(%d+):(%d*)$')
end
if tonumber(sequence) == tonumber(ARGV[3]) then
  number = made
elseif tonumber(sequence) > tonumber(ARGV[3]) then
  return {-11}
else
  local state = string.byte(ARGV[1], 2)
  if state == 1 or state == 2 or state == 3 then
    redis.call('HSET', KEYS[7], number, ARGV[1])
    redis.call('RPUSH', KEYS[8], number)
  else
    redis.call('HSET', KEYS[4], number, ARGV[1])
    log_change(KEYS[5], KEYS[1], number, 0, '.b', ARGV[1])
    if state == 4 then
      redis.call('ZADD', KEYS[6], number, number)
    elseif ARGV[7] == '1' then
      redis.call('ZADD', KEYS[11], 0, number)
    end
  end
  note_runner(KEYS[9], tonumber(number), worker)
  redis.call('HSET', KEYS[1], 'n', number + 1)
  if redis.call('HSET', KEYS[3], ARGV[2], ARGV[3] .. ':' .. number) == 1
      and redis.call('HLEN', KEYS[3]) > OPS_CAP then
    -- Forget the half of the clients that have not created anything for the longest time.
    local ops, numbers = redis.call('HGETALL', KEYS[3]), {}
    for i = 2, #ops, 2 do
      numbers[#numbers + 1] = tonumber(string.match(ops[i], ':(%d+)$') or -1)
    end
    table.sort(numbers)
    local middle = numbers[math.floor(#numbers / 2)]
    for i = 2, #ops, 2 do
      if tonumber(string.match(ops[i], ':(%d+)$') or -1) <= middle then
        redis.call('HDEL', KEYS[3], ops[i - 1])
      end
    end
  end
end
local length = redis.call('LLEN', KEYS[8])
local new = length - tonumber(ARGV[4])
if new > 0 and new <= tonumber(ARGV[5]) then
  local numbers = redis.call('LRANGE', KEYS[8], ARGV[4], -1)
  return {0, tonumber(number), length, numbers, redis.call('HMGET', KEYS[7], unpack(numbers)), worker}
end
return {0, tonumber(number), length, {}, {}, worker}
