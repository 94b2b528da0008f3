-- replace_record: give an unfinished trial another record, which has all that was written to the trial so far.
-- If the client was fenced from it (take_back_trial), it is not any more.
local function replace_record(live, trial, number, record, client)
  redis.call('HSET', live, number, record)
  local fence = '.q' .. client
  if redis.call('HGET', trial, fence) == 'x' then
    redis.call('HDEL', trial, fence)
  end
  -- What was written before is part of the record now; what tells repeats of earlier writes stays.
  local fields = redis.call('HKEYS', trial)
  for i = 1, #fields do
    if string.sub(fields[i], 1, 2) ~= '.q' then
      redis.call('HDEL', trial, fields[i])
    end
  end
end
