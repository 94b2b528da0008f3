-- busy: whether somebody else holds the section lock of this study for a section of several steps.
local function busy(lock)
  return redis.call('EXISTS', lock) == 1
end
