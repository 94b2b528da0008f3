-- entries_from: the entries of sections from one sequence number up to another, at most so many of the last ones.
local ENTRIES_CAP = 128
local function entries_from(sections, from, seq)
  return redis.call('LRANGE', sections, -math.min(math.max(seq - from, 1), ENTRIES_CAP), -1)
end
