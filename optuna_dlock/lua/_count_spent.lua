-- count_spent: how many trials have finished in the states that the study's budget counts.
-- What finished before the last count is not looked at again; `keep` notes how far this one went.
local function count_spent(meta, order, finished, keep)
  local f = redis.call('HMGET', meta, 'limit_states', 'spent', 'spent_seen')
  local spent, seen = tonumber(f[2] or 0), tonumber(f[3] or 0)
  local length = redis.call('LLEN', order)
  if seen == length then
    return spent
  end
  while seen < length do
    local numbers = redis.call('LRANGE', order, seen, seen + 999)
    local records = redis.call('HMGET', finished, unpack(numbers))
    for i = 1, #numbers do
      if string.find(f[1], string.byte(records[i], 2), 1, true) then
        spent = spent + 1
      end
    end
    seen = seen + #numbers
  end
  if keep then
    redis.call('HSET', meta, 'spent', spent, 'spent_seen', seen)
  end
  return spent
end
