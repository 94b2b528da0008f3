-- entries_from: the entries of sections from one sequence number up to another, at most so many of the last ones.
local function entries_from(sections, from, seq, most)
  local n = math.min(seq - from, most)
  return n > 0 and redis.call('LRANGE', sections, -n, -1) or {}
end
