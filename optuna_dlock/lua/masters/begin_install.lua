-- begin_install: drop what this master has of an object, to be given a copy of another master's state.
-- KEYS[1] ballots (hash: r the copy under way)  KEYS[2] live (hash)  KEYS[3..] every key of the object
-- ARGV[1] ballot of the copier  ARGV[2] name of this copy: ballot.number  ARGV[3] what the names of trials' hashes
-- begin with, '' for none  ARGV[4] sequence number and  ARGV[5] last section that are to be replaced, '' for no data
-- Returns {0} | {-21} STALE_BALLOT | {-22} GAP
-- Retry-safe: it is sent once. From here to the end of the copy the master does not vote.
-- A copy that comes late must not take the master back: it replaces only what it was made to replace.
local f = redis.call('HMGET', KEYS[1], 'p', 'r', 'a', 's', 'i')
if (f[1] and f[1] > ARGV[1]) or (f[2] and f[2] > ARGV[2]) then
  return {-21}
end
if (f[4] or '') ~= ARGV[4] or (f[5] or '') ~= ARGV[5] or (f[3] and f[3] >= ARGV[1]) then
  return {-22}
end
redis.call('HDEL', KEYS[1], 'a', 's', 'i')
redis.call('HSET', KEYS[1], 'p', ARGV[1], 'r', ARGV[2], 'l', 0)
if ARGV[3] ~= '' then
  -- The names of trials' hashes cannot be declared in KEYS: which there are is known here only.
  local numbers = redis.call('HKEYS', KEYS[2])
  for i = 1, #numbers do
    redis.call('UNLINK', ARGV[3] .. numbers[i])
  end
end
for i = 3, #KEYS do
  redis.call('UNLINK', KEYS[i])
end
return {0}
