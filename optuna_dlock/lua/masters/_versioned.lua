-- versioned: read something of an object, and tell which state of it this is.
-- The reading script's own keys and arguments come first, then: KEYS[n] ballots (hash)
-- Returns {0, accepted ballot, sequence number, last section, reply of the script} | {-20} NO_DATA
local function section(KEYS, ARGV)
-- body
end
local f = redis.call('HMGET', KEYS[#KEYS], 'a', 's', 'i')
if not f[2] then
  return {-20}
end
local keys = {}
for i = 1, #KEYS - 1 do
  keys[i] = KEYS[i]
end
--[keydb] delete_what_came_back(KEYS[#KEYS], keys)
return {0, f[1], f[2], f[3], section(keys, ARGV)}
