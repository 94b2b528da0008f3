-- fenced: run a critical section as the next one of its object on this master, if the ballot still is the promised
-- one and the master is where the caller thinks. The section's own keys and arguments come first, then:
-- KEYS[n-1] ballots (hash)  KEYS[n] sections (list: what was run last, for masters that missed it)
-- ARGV[n-5] ballot  ARGV[n-4] sequence number before  ARGV[n-3] section before  ARGV[n-2] this section
-- ARGV[n-1] length of what this master's key names begin with  ARGV[n] name of the script
-- Returns {0, reply of the section} | {-20} NO_DATA | {-21, promised ballot} STALE_BALLOT
--   | {-22, accepted ballot, sequence number, last section} GAP
-- Why this is safe without clocks: design.md 4, and the page of the architecture.
local function section(KEYS, ARGV)
-- body
end
local SECTIONS_CAP = 512
local nk, na = #KEYS, #ARGV
local ballots, sections = KEYS[nk - 1], KEYS[nk]
local f = redis.call('HMGET', ballots, 'p', 'a', 's', 'i')
if not f[3] then
  return {-20}
elseif f[1] ~= ARGV[na - 5] then
  return {-21, f[1]}
elseif f[3] ~= ARGV[na - 4] or f[4] ~= ARGV[na - 3] then
  redis.call('HSET', ballots, 'l', 0) -- the holder goes on without this master
  return {-22, f[2], f[3], f[4]}
end
local keys, args, entry = {}, {}, {}
local function add(text)
  entry[#entry + 1] = #text .. ':' .. text
end
add(f[3])
add(f[4])
add(ARGV[na - 2])
add(ARGV[na])
add(tostring(nk - 2))
local length = tonumber(ARGV[na - 1])
for i = 1, nk - 2 do
  keys[i] = KEYS[i]
  add(string.sub(KEYS[i], length + 1))
end
for i = 1, na - 6 do
  args[i] = ARGV[i]
  add(ARGV[i])
end
local reply = section(keys, args)
redis.call('HSET', ballots, 'l', 0, 'a', f[1], 's', string.format('%.0f', f[3] + 1), 'i', ARGV[na - 2])
if redis.call('RPUSH', sections, table.concat(entry)) >= 2 * SECTIONS_CAP then
  redis.call('LTRIM', sections, -SECTIONS_CAP, -1)
end
return {0, reply}
