-- fenced: run a critical section as the next one of its object on this master, if the ballot still is the promised
-- one and the master is where the caller thinks. The section's own keys and arguments come first, then:
-- KEYS[n-1] ballots (hash)  KEYS[n] sections (list: what was run last, for masters that missed it)
-- ARGV[n-5] ballot  ARGV[n-4] sequence number before  ARGV[n-3] section before  ARGV[n-2] this section
-- ARGV[n-1] length of what this master's key names begin with  ARGV[n] name of the script
-- Returns {0, reply of the section} | {-20} NO_DATA | {-21, promised ballot} STALE_BALLOT
--   | {-22, accepted ballot, sequence number, last section} GAP
-- Retry-safe: what was run already does not follow where the master is now, and is refused (GAP); the caller begins again.
local function section(KEYS, ARGV)
-- body
end
-- include run_section
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
local this, prefix_length, name = ARGV[na - 2], ARGV[na - 1], ARGV[na]
for i = nk - 1, nk do
  KEYS[i] = nil
end
for i = na - 5, na do
  ARGV[i] = nil
end
local call = cmsgpack.pack(name, prefix_length, KEYS, ARGV)
local reply = run_section(section, KEYS, ARGV, call, ballots, sections, f[3], f[4], this)
redis.call('HSET', ballots, 'a', f[1], 's', f[3] + 1, 'i', this, 'l', 0)
return {0, reply}
