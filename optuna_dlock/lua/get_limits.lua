-- get_limits: whether a study is stopped, and what is used of its budget and of its grid.
-- KEYS[1] meta (hash)  KEYS[2] live (hash)  KEYS[3] waiting (sorted set)  KEYS[4] order (list)
-- KEYS[5] finished (hash)  KEYS[6] points (hash)  KEYS[7] reissues (list)
-- Returns {0, stopped | nil, running, waiting, {} | {limit, states that count, spent},
--   {} | {number of points, done, held, given up}} | {-1} NO_STUDY
-- Retry-safe: reads only.
-- include count_spent
-- include settle_points
local f = redis.call('HMGET', KEYS[1], 'n', 'stopped', 'limit', 'limit_states', 'grid_size')
if not f[1] then
  return {-1}
end
local waiting = redis.call('ZCARD', KEYS[3])
local running = redis.call('HLEN', KEYS[2]) - waiting
local budget, grid = {}, {}
if f[3] then
  budget = {f[3], f[4], count_spent(KEYS[1], KEYS[4], KEYS[5], false)}
end
if f[5] then
  local done, held, lost = settle_points(KEYS[1], KEYS[4], KEYS[5], KEYS[6], KEYS[7], false)
  grid = {f[5], done, held, lost}
end
return {0, f[2], running, waiting, budget, grid}
