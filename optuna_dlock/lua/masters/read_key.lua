-- read_key: one plain command that reads a key.
-- KEYS[1] any key
-- ARGV[1] command  ARGV[2..] its arguments after the key
-- Returns the command's reply
-- Retry-safe: reads only.
local words = {}
for i = 2, #ARGV do
  words[i - 1] = ARGV[i]
end
return redis.call(ARGV[1], KEYS[1], unpack(words))
