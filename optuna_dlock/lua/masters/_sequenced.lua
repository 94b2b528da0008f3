-- sequenced: run a critical section as the next one of its object, whatever the last one was, if the ballot is open here:
-- then nobody proposes under it but this master, and clients pass on to the others what it has run (run_sections).
-- The section's own keys and arguments come first, then:
-- KEYS[n-1] ballots (hash: o the ballot that is open here)  KEYS[n] sections (list: what was run last)
-- ARGV[n-5] ballot  ARGV[n-4] this section  ARGV[n-3] length of what this master's key names begin with
-- ARGV[n-2] name of the script  ARGV[n-1] sequence number from which on to return the entries of sections
-- ARGV[n] how many of the last ones at most, 0 for none
-- Returns {0, reply of the section, sequence number, {entry, ...}} | {-20} NO_DATA | {-21, promised ballot} STALE_BALLOT
-- Retry-safe: as the section is. All that a client sends under one ballot is refused once one was: its order is kept.
local function section(KEYS, ARGV)
-- body
end
-- include run_section
-- include entries_from
local nk, na = #KEYS, #ARGV
local ballots, sections = KEYS[nk - 1], KEYS[nk]
local f = redis.call('HMGET', ballots, 'p', 'o', 's', 'i')
if not f[3] then
  return {-20}
elseif f[1] ~= ARGV[na - 5] or f[2] ~= f[1] then
  return {-21, f[1]}
end
local most = tonumber(ARGV[na])
local this, prefix_length, name, from = ARGV[na - 4], ARGV[na - 3], ARGV[na - 2], ARGV[na - 1]
for i = nk - 1, nk do
  KEYS[i] = nil
end
for i = na - 5, na do
  ARGV[i] = nil
end
local call = cmsgpack.pack(name, prefix_length, KEYS, ARGV)
local reply = run_section(section, KEYS, ARGV, call, ballots, sections, f[3], f[4], this)
local seq = f[3] + 1
redis.call('HSET', ballots, 'a', f[1], 's', seq, 'i', this)
return {0, reply, seq, entries_from(sections, from, seq, most)}
