-- found_object: let the registry of a new ensemble begin on this master.
-- KEYS[1] ballots (hash)
-- Returns {0}
-- Retry-safe: what has begun is left alone.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'p', '0', 'l', 0, 'a', '0', 's', '0', 'i', '0')
end
return {0}
