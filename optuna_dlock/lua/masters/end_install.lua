-- end_install: the copy is whole: from now on this master votes.
-- KEYS[1] ballots (hash)
-- ARGV[1] name of the copy  ARGV[2] ballot of the copier  ARGV[3] sequence number  ARGV[4] last section  ARGV[5] known runs
-- Returns {0} | {-21} STALE_BALLOT
-- Retry-safe: it is sent once. The state is stamped with the copier's ballot, not with that under which it was found: what
-- is found on a minority was not decided by its old ballot.
if redis.call('HGET', KEYS[1], 'r') ~= ARGV[1] then
  return {-21}
end
redis.call('HSET', KEYS[1], 'a', ARGV[2], 's', ARGV[3], 'i', ARGV[4], 'k', ARGV[5])
redis.call('HDEL', KEYS[1], 'r')
return {0}
