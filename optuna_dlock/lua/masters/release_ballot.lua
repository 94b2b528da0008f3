-- release_ballot: end the lease of a ballot, so that others need not wait for its end. The promise stays.
-- KEYS[1] ballots (hash)
-- ARGV[1] ballot
-- Returns {0}
-- Retry-safe: a lease of another ballot is left alone.
if redis.call('HGET', KEYS[1], 'p') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'l', 0)
end
return {0}
