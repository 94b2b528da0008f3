-- open_ballot: let this master, and nobody else, say from now on which sections follow under a ballot.
-- KEYS[1] ballots (hash)
-- ARGV[1] ballot, of a client that has a majority and has brought this master to the latest state
-- Returns {0} | {-21, promised ballot} STALE_BALLOT
-- Retry-safe: the same again changes nothing.
local promised = redis.call('HGET', KEYS[1], 'p')
if promised ~= ARGV[1] then
  return {-21, promised or ''}
end
redis.call('HSET', KEYS[1], 'o', ARGV[1], 'l', 0)
return {0}
