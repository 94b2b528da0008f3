-- begin_install: drop what this master has of an object, to be given a copy of another master's state.
-- KEYS[1] ballots (hash: r ballot of the copier)  KEYS[2] live (hash)  KEYS[3..] every key of the object
-- ARGV[1] ballot of the copier  ARGV[2] what the names of trials' hashes begin with, '' for none
-- Returns {0} | {-21, ballot} STALE_BALLOT
-- Retry-safe: the same ballot again begins again. From here to the end of the copy the master does not vote.
local f = redis.call('HMGET', KEYS[1], 'p', 'r')
for i = 1, 2 do
  if f[i] and f[i] > ARGV[1] then
    return {-21, f[i]}
  end
end
redis.call('HDEL', KEYS[1], 'a', 's', 'i')
redis.call('HSET', KEYS[1], 'p', ARGV[1], 'r', ARGV[1], 'l', 0)
if ARGV[2] ~= '' then
  -- The names of trials' hashes cannot be declared in KEYS: which there are is known here only.
  local numbers = redis.call('HKEYS', KEYS[2])
  for i = 1, #numbers do
    redis.call('UNLINK', ARGV[2] .. numbers[i])
  end
end
for i = 2, #KEYS do
  redis.call('UNLINK', KEYS[i])
end
return {0}
