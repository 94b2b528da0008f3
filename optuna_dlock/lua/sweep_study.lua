-- sweep_study: throw away keys of a deleted study; in the end, take it off the list.
-- KEYS[1] trash (set)  KEYS[2..] keys to be thrown away
-- ARGV[1] id  ARGV[2] 1 with the last keys, else 0
-- Returns {0}
-- Retry-safe: the second time nothing is left to do.
for i = 2, #KEYS do
  redis.call('UNLINK', KEYS[i])
end
if ARGV[2] == '1' then
  redis.call('SREM', KEYS[1], ARGV[1])
end
return {0}
