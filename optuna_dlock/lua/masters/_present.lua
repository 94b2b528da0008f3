-- present: run a script whose effect no decision depends on (a heartbeat), on a master that has the object.
-- The script's own keys and arguments come first, then: KEYS[n] ballots (hash)
-- Returns {0, reply of the script} | {-20} NO_DATA
local function section(KEYS, ARGV)
-- body
end
if redis.call('HEXISTS', KEYS[#KEYS], 's') == 0 then
  return {-20}
end
local keys = {}
for i = 1, #KEYS - 1 do
  keys[i] = KEYS[i]
end
--[keydb] delete_what_came_back(KEYS[#KEYS], keys)
local reply = section(keys, ARGV)
--[keydb] note_what_is_gone(KEYS[#KEYS], keys)
return {0, reply}
