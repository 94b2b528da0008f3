-- claim_point: give an unfinished trial the next point of the study's grid; those to be given out again come last.
-- KEYS[1] meta (hash)  KEYS[2] live (hash)  KEYS[3] order (list)  KEYS[4] finished (hash)
-- KEYS[5] points (hash)  KEYS[6] reissues (list)
-- ARGV[1] number of the trial  ARGV[2] digest of the grid
-- Returns {0, position, how often it was given out again} | {-1} NO_STUDY | {-2} NO_TRIAL (none that is unfinished)
--   | {-30, done, held, number of points} EXHAUSTED | {-32, digest, number of points} DIFFERENT ('' if there is no grid)
-- Retry-safe: a trial that has a point gets the same one again.
-- include settle_points
local f = redis.call('HMGET', KEYS[1], 'n', 'grid', 'grid_size', 'grid_next')
if not f[1] then
  return {-1}
end
if f[2] ~= ARGV[2] then
  return {-32, f[2] or '', f[3] or ''}
end
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then
  return {-2}
end
local given = redis.call('HGET', KEYS[5], ARGV[1])
if given and given ~= '' then
  return {0, string.match(given, '^(%d+):(%d+)$')}
end
local done, held, lost = settle_points(KEYS[1], KEYS[3], KEYS[4], KEYS[5], KEYS[6], true)
-- A trial that create_trial let begin has its place; others (claimed ones) need one.
if not given and done + lost + held >= tonumber(f[3]) then
  return {-30, done + lost, held, f[3]}
end
if tonumber(f[4]) < tonumber(f[3]) then
  given = f[4] .. ':0'
  redis.call('HINCRBY', KEYS[1], 'grid_next', 1)
else
  given = redis.call('LPOP', KEYS[6])
end
redis.call('HSET', KEYS[5], ARGV[1], given)
return {0, string.match(given, '^(%d+):(%d+)$')}
