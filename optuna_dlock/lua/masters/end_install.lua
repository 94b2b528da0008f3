-- end_install: the copy is whole: from now on this master votes.
-- KEYS[1] ballots (hash)
-- ARGV[1] ballot of the copier  ARGV[2] sequence number  ARGV[3] last section
-- Returns {0} | {-21} STALE_BALLOT
-- Retry-safe: the same again changes nothing. The state is stamped with the copier's ballot, not with that under which
-- it was found: what is found on a minority was not decided by its old ballot.
if redis.call('HGET', KEYS[1], 'r') ~= ARGV[1] then
  return {-21}
end
redis.call('HSET', KEYS[1], 'a', ARGV[1], 's', ARGV[2], 'i', ARGV[3])
return {0}
