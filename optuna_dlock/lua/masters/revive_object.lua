-- revive_object: let this run of a master go on with an object of an earlier run of it.
-- KEYS[1] ballots (hash)  KEYS[2..] all other keys of the object, as the earlier run named them; then all once more,
-- as this run names them
-- ARGV[1] ballot of a new epoch, which is the promised one from now on  ARGV[2] known runs
-- Returns {0, 1} | {0, 0} there is nothing, or it was done before
-- Retry-safe: what was moved stays.
local n = #KEYS / 2
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('EXISTS', KEYS[n + 1]) == 1 then
  return {0, 0}
end
for i = n, 1, -1 do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    redis.call('RENAME', KEYS[i], KEYS[n + i])
  end
end
redis.call('HSET', KEYS[n + 1], 'p', ARGV[1], 'l', 0, 'k', ARGV[2])
return {0, 1}
