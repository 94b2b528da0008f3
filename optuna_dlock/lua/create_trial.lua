-- create_trial: give the next number to a new trial of any state.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] ops (hash)  KEYS[4] live (hash)  KEYS[5] log (list)
-- KEYS[6] waiting (sorted set)  KEYS[7] finished (hash)  KEYS[8] order (list)  KEYS[9] points (hash)
-- KEYS[10] reissues (list)
-- ARGV[1] record  ARGV[2] client  ARGV[3] sequence number  ARGV[4] entries of order the caller has read
-- ARGV[5] how many finished trials to return at most
-- Returns {0, number, length of order, {number, ...}, {record, ...}} | {-1} NO_STUDY | {-5} BUSY | {-11} STALE
--   | {-30, used, running, limit} EXHAUSTED (the budget, or the points of the grid) | {-31} STOPPED
-- Retry-safe (G6): the client's last sequence number again gets the number it got then.
-- include busy
-- include log_change
-- include count_spent
-- include settle_points
local OPS_CAP = 20000
local meta = redis.call('HMGET', KEYS[1], 'n', 'stopped', 'limit', 'limit_states', 'grid_size')
if not meta[1] then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
local number = meta[1]
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
  if meta[2] and state == 0 then
    return {-31}
  end
  -- A place in the budget is taken here, in one step with the number: no two creators get the last one. A WAITING
  -- trial takes its place when it is claimed.
  if meta[3] and (state == 0 or string.find(meta[4], state, 1, true)) then
    local spent = count_spent(KEYS[1], KEYS[8], KEYS[7], true)
    local running = redis.call('HLEN', KEYS[4]) - redis.call('ZCARD', KEYS[6])
    if spent + running >= tonumber(meta[3]) then
      return {-30, spent, running, meta[3]}
    end
  end
  if meta[5] and state == 0 then
    local done, held, lost = settle_points(KEYS[1], KEYS[8], KEYS[7], KEYS[9], KEYS[10], true)
    if done + lost + held >= tonumber(meta[5]) then
      return {-30, done + lost, held, meta[5]}
    end
    redis.call('HSET', KEYS[9], number, '') -- claim_point says which point it is
  end
  if state == 1 or state == 2 or state == 3 then
    redis.call('HSET', KEYS[7], number, ARGV[1])
    redis.call('RPUSH', KEYS[8], number)
  else
    redis.call('HSET', KEYS[4], number, ARGV[1])
    log_change(KEYS[5], KEYS[1], number, 0, '.b', ARGV[1])
    if state == 4 then
      redis.call('ZADD', KEYS[6], number, number)
    end
  end
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
  return {0, tonumber(number), length, numbers, redis.call('HMGET', KEYS[7], unpack(numbers))}
end
return {0, tonumber(number), length, {}, {}}
