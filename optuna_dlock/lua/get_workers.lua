-- get_workers: which workers run or ran the trials of a study.
-- KEYS[1] meta (hash)  KEYS[2] workers (hash)  KEYS[3] ran by (list)
-- ARGV[1] first number  ARGV[2] last number  ARGV[3] how many workers the caller knows
-- Returns {0, length of ran by, {index, ...}, {description, index, ...}} | {-1} NO_STUDY
--   Workers are left out if the caller knows them all.
-- Retry-safe: reads only.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
local workers = {}
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[3]) then
  workers = redis.call('HGETALL', KEYS[2])
end
return {0, redis.call('LLEN', KEYS[3]), redis.call('LRANGE', KEYS[3], ARGV[1], ARGV[2]), workers}
