-- end_install: the copy is whole: put it in the place of what this master had, and vote with it.
-- KEYS[1] ballots (hash)  KEYS[2] live (hash)  KEYS[3..n] every other key of the object  KEYS[n+1..] the same, copied
-- ARGV[1] name of the copy  ARGV[2] ballot of the copier  ARGV[3] sequence number  ARGV[4] last section  ARGV[5] known runs
-- ARGV[6] sequence number and  ARGV[7] last section that are to be replaced, '' for no data
-- ARGV[8] what the names of trials' hashes begin with, '' for none  ARGV[9] the same of the copy
-- Returns {0} | {-21} STALE_BALLOT | {-22} GAP
-- Retry-safe: it is sent once. A copy that comes late does not take the master back: it replaces only what it was made
-- to replace. The state is stamped with the copier's ballot, not with that under which it was found: what is found on a
-- minority was not decided by its old ballot.
local f = redis.call('HMGET', KEYS[1], 'p', 'r', 'a', 's', 'i')
if f[2] ~= ARGV[1] or (f[1] and f[1] > ARGV[2]) then
  return {-21}
end
if (f[4] or '') ~= ARGV[6] or (f[5] or '') ~= ARGV[7] or (f[3] and f[3] >= ARGV[2]) then
  return {-22}
end
local n = (#KEYS - 1) / 2
local keys = {}
if ARGV[8] ~= '' then
  -- The names of trials' hashes cannot be declared in KEYS: which there are is known here only.
  for _, number in ipairs(redis.call('HKEYS', KEYS[2])) do
    redis.call('UNLINK', ARGV[8] .. number)
  end
  for _, number in ipairs(redis.call('HKEYS', KEYS[2 + n])) do
    if redis.call('EXISTS', ARGV[9] .. number) == 1 then
      redis.call('RENAME', ARGV[9] .. number, ARGV[8] .. number)
    end
  end
end
for i = 2, n + 1 do
  redis.call('UNLINK', KEYS[i])
  if redis.call('EXISTS', KEYS[i + n]) == 1 then
    redis.call('RENAME', KEYS[i + n], KEYS[i])
  end
  keys[i - 1] = KEYS[i]
end
--[keydb] note_what_is_gone(KEYS[1], keys)
redis.call('HSET', KEYS[1], 'p', ARGV[2], 'l', 0, 'a', ARGV[2], 's', ARGV[3], 'i', ARGV[4], 'k', ARGV[5])
redis.call('HDEL', KEYS[1], 'r')
return {0}
