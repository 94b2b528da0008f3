-- get_sections: what was run under an open ballot, to be passed on to other masters.
-- KEYS[1] ballots (hash)  KEYS[2] sections (list)
-- ARGV[1] ballot  ARGV[2] sequence number from which on  ARGV[3] how many of the last ones at most
-- Returns {0, sequence number, {entry, ...}} | {-20} NO_DATA | {-21, promised ballot} STALE_BALLOT
-- Retry-safe: reads only.
-- include entries_from
local f = redis.call('HMGET', KEYS[1], 'p', 's')
if not f[2] then
  return {-20}
elseif f[1] ~= ARGV[1] then
  return {-21, f[1]}
end
return {0, tonumber(f[2]), entries_from(KEYS[2], ARGV[2], f[2], tonumber(ARGV[3]))}
