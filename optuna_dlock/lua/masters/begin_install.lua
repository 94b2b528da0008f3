-- begin_install: begin a copy of another master's state of an object, beside what this master has of it.
-- KEYS[1] ballots (hash: r the copy under way)  KEYS[2] copied live (hash)  KEYS[3..] every other copied key
-- ARGV[1] name of this copy: ballot.number  ARGV[2] what the names of copied trials' hashes begin with, '' for none
-- Returns {0} | {-21} STALE_BALLOT
-- Retry-safe: the same again begins again. Until the copy is whole nothing of what decides has changed.
local under_way = redis.call('HGET', KEYS[1], 'r')
if under_way and under_way > ARGV[1] then
  return {-21}
end
redis.call('HSET', KEYS[1], 'r', ARGV[1])
if ARGV[2] ~= '' then
  -- The names of trials' hashes cannot be declared in KEYS: which there are is known here only.
  for _, number in ipairs(redis.call('HKEYS', KEYS[2])) do
    redis.call('UNLINK', ARGV[2] .. number)
  end
end
for i = 2, #KEYS do
  redis.call('UNLINK', KEYS[i])
end
return {0}
