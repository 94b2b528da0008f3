-- note_runner: note which worker runs a trial. The list has an entry for each number, some 3 bytes on the server.
local function note_runner(ran_by, number, worker)
  local length = redis.call('LLEN', ran_by)
  if length > number then
    redis.call('LSET', ran_by, number, worker)
    return
  end
  while length < number do -- trials of an earlier version: nobody knows who ran them
    local unknown = {}
    for i = 1, math.min(number - length, 1000) do
      unknown[i] = 0
    end
    length = redis.call('RPUSH', ran_by, unpack(unknown))
  end
  redis.call('RPUSH', ran_by, worker)
end
