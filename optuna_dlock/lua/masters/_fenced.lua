-- fenced: run a critical section as the next one of its object on this master, if the ballot still is the promised
-- one and the master is where the caller thinks. The section's own keys and arguments come first, then:
-- KEYS[n-1] ballots (hash)  KEYS[n] sections (list: what was run last, for masters that missed it)
-- ARGV[n-6] ballot  ARGV[n-5] sequence number before  ARGV[n-4] section before  ARGV[n-3] this section
-- ARGV[n-2] length of what this master's key names begin with  ARGV[n-1] name of the script
-- ARGV[n] commit | missed (one of several that this master missed) | caught up (the last of these)
-- Returns {0, reply of the section} | {-20} NO_DATA | {-21, promised ballot} STALE_BALLOT
--   | {-22, accepted ballot, sequence number, last section} GAP
-- Retry-safe: what was run already does not follow where the master is now, and is refused (GAP); the caller begins again.
-- The ballot says under whose order a state was accepted: a master that has caught up only in part must not claim it,
-- or a state that lost would rank above one that was acknowledged.
local function section(KEYS, ARGV)
-- body
end
local SECTIONS_CAP = 512
local nk, na = #KEYS, #ARGV
local ballots, sections = KEYS[nk - 1], KEYS[nk]
local f = redis.call('HMGET', ballots, 'p', 'a', 's', 'i')
if not f[3] then
  return {-20}
elseif f[1] ~= ARGV[na - 6] then
  return {-21, f[1]}
elseif f[3] ~= ARGV[na - 5] or f[4] ~= ARGV[na - 4] then
  redis.call('HSET', ballots, 'l', 0) -- the holder goes on without this master
  return {-22, f[2], f[3], f[4]}
end
local keys, args, entry = {}, {}, {}
local function add(text)
  entry[#entry + 1] = #text .. ':' .. text
end
add(f[3])
add(f[4])
add(ARGV[na - 3])
add(ARGV[na - 1])
add(tostring(nk - 2))
local length = tonumber(ARGV[na - 2])
for i = 1, nk - 2 do
  keys[i] = KEYS[i]
  add(string.sub(KEYS[i], length + 1))
end
for i = 1, na - 7 do
  args[i] = ARGV[i]
  add(ARGV[i])
end
--[keydb] delete_what_came_back(ballots, keys)
local reply = section(keys, args)
--[keydb] note_what_is_gone(ballots, keys)
redis.call('HSET', ballots, 's', string.format('%.0f', f[3] + 1), 'i', ARGV[na - 3])
if ARGV[na] == 'commit' then
  redis.call('HSET', ballots, 'a', f[1], 'l', 0)
elseif ARGV[na] == 'caught up' then
  redis.call('HSET', ballots, 'a', f[1])
end
if redis.call('RPUSH', sections, table.concat(entry)) >= 2 * SECTIONS_CAP then
  redis.call('LTRIM', sections, -SECTIONS_CAP, -1)
end
return {0, reply}
