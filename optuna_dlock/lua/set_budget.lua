-- set_budget: let only so many trials of a study begin.
-- KEYS[1] meta (hash)  KEYS[2] section lock  KEYS[3] ops (hash)  KEYS[4] order (list)  KEYS[5] finished (hash)
-- ARGV[1] how many, '' for no budget  ARGV[2] states that count, as digits
-- ARGV[3] join (a budget that is there may only grow) | set
-- ARGV[4] client  ARGV[5] sequence number
-- Returns {0, how many} | {-1} NO_STUDY | {-5} BUSY | {-32, how many, states that count} DIFFERENT
-- Retry-safe: a sequence number that is not above the client's last one changes nothing.
-- include busy
-- include once
-- include count_spent
local f = redis.call('HMGET', KEYS[1], 'n', 'limit', 'limit_states')
if not f[1] then
  return {-1}
end
if busy(KEYS[2]) then
  return {-5}
end
if ARGV[3] == 'join' and f[2] and f[3] ~= ARGV[2] then
  return {-32, f[2], f[3]}
end
local limit = ARGV[1]
if ARGV[3] == 'join' and f[2] and tonumber(f[2]) > tonumber(limit) then
  limit = f[2]
end
if not once(KEYS[3], ARGV[4], ARGV[5]) then
  return {0, f[2] or ''}
end
if limit == '' then
  redis.call('HDEL', KEYS[1], 'limit', 'limit_states', 'spent', 'spent_seen')
  return {0, ''}
end
if f[3] ~= ARGV[2] then
  redis.call('HDEL', KEYS[1], 'spent', 'spent_seen')
end
redis.call('HSET', KEYS[1], 'limit', limit, 'limit_states', ARGV[2])
count_spent(KEYS[1], KEYS[4], KEYS[5], true) -- what is there already, once
return {0, limit}
