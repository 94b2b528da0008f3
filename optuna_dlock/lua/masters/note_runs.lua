-- note_runs: remember which runs of the masters are the current ones. What an earlier run promised is forgotten, so that
-- a grant of it must not be counted together with one of this master.
-- KEYS[1] ballots (hash)
-- ARGV[1] ballot of the rebuilder  ARGV[2] known runs: index=generation:run, separated by blanks
-- Returns {0} | {-21} STALE_BALLOT
-- Retry-safe: the same again changes nothing.
if redis.call('HGET', KEYS[1], 'p') ~= ARGV[1] then
  return {-21}
end
redis.call('HSET', KEYS[1], 'k', ARGV[2])
return {0}
