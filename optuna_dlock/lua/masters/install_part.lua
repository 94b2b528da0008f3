-- install_part: one command of a copy, unless a later copy has begun.
-- KEYS[1] ballots (hash)  KEYS[2] copied key
-- ARGV[1] name of the copy  ARGV[2] command  ARGV[3..] its arguments after the key
-- Returns {0} | {-21} STALE_BALLOT
-- Retry-safe: it is sent once; after a lost reply the copier begins another copy.
if redis.call('HGET', KEYS[1], 'r') ~= ARGV[1] then
  return {-21}
end
local words = {}
for i = 3, #ARGV do
  words[i - 2] = ARGV[i]
end
redis.call(ARGV[2], KEYS[2], unpack(words))
return {0}
