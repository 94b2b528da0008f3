-- found_object: let an object begin on this master: the registry of a new ensemble, or a study that is known but in which
-- nothing was done yet.
-- KEYS[1] ballots (hash)  KEYS[2] study's meta (hash), if it is a study
-- ARGV[1] promised ballot  ARGV[2] known runs
-- Returns {0}
-- Retry-safe: what has begun is left alone.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'p', ARGV[1], 'l', 0, 'a', '0', 's', '0', 'i', '0', 'k', ARGV[2])
  if KEYS[2] then
    redis.call('HSET', KEYS[2], 'n', 0, 'base', 0)
  end
end
return {0}
