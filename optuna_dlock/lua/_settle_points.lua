-- settle_points: how many points of the study's grid are done, are held by unfinished trials, and were given up.
-- A point whose trial finished in a state that does not count is put in line to be given out again, if it may. What
-- finished before the last look is not looked at again; `keep` notes how far this one went, and what it found.
local function settle_points(meta, order, finished, points, reissues, keep)
  local f = redis.call('HMGET', meta, 'grid_states', 'grid_retries', 'grid_done', 'grid_lost', 'grid_seen')
  local done, lost, seen = tonumber(f[3]), tonumber(f[4]), tonumber(f[5])
  local held, length = redis.call('HLEN', points), redis.call('LLEN', order)
  if seen == length then
    return done, held, lost
  end
  while seen < length do
    local numbers = redis.call('LRANGE', order, seen, seen + 999)
    local records = redis.call('HMGET', finished, unpack(numbers))
    local given = redis.call('HMGET', points, unpack(numbers))
    for i = 1, #numbers do
      if given[i] then
        held = held - 1
        if keep then
          redis.call('HDEL', points, numbers[i])
        end
        local position, retries = string.match(given[i], '^(%d+):(%d+)$')
        if position then -- else the trial never asked which point is its own
          if string.find(f[1], string.byte(records[i], 2), 1, true) then
            done = done + 1
          elseif f[2] ~= '' and tonumber(retries) >= tonumber(f[2]) then
            lost = lost + 1
          elseif keep then
            redis.call('RPUSH', reissues, position .. ':' .. (retries + 1))
          end
        end
      end
    end
    seen = seen + #numbers
  end
  if keep then
    redis.call('HSET', meta, 'grid_done', done, 'grid_lost', lost, 'grid_seen', seen)
  end
  return done, held, lost
end
