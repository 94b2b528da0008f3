-- worker_index: the number that stands for a worker in this study; 0 is nobody.
-- A worker gives its description the first time, and the number it got from then on.
local function worker_index(workers, worker)
  local index = tonumber(worker)
  if index then
    return index
  end
  index = redis.call('HGET', workers, worker)
  if not index then
    index = redis.call('HLEN', workers) + 1
    redis.call('HSET', workers, worker, index)
  end
  return tonumber(index)
end
