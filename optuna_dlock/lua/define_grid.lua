-- define_grid: let the trials of a study share the points of a grid.
-- KEYS[1] meta (hash)  KEYS[2] order (list)
-- ARGV[1] digest of the grid  ARGV[2] number of points  ARGV[3] states in which a point is done, as digits
-- ARGV[4] how often a point is given out again, '' for no limit
-- Returns {0} | {-1} NO_STUDY | {-32, digest, number of points} DIFFERENT
-- Retry-safe: the same grid again changes nothing.
local f = redis.call('HMGET', KEYS[1], 'n', 'grid', 'grid_size')
if not f[1] then
  return {-1}
end
if f[2] and f[2] ~= ARGV[1] then
  return {-32, f[2], f[3]}
end
if not f[2] then
  redis.call('HSET', KEYS[1], 'grid', ARGV[1], 'grid_size', ARGV[2], 'grid_states', ARGV[3], 'grid_retries', ARGV[4],
    'grid_done', 0, 'grid_lost', 0, 'grid_next', 0, 'grid_seen', redis.call('LLEN', KEYS[2]))
end
return {0}
