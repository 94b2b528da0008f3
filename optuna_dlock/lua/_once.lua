-- once: whether a client has not run this operation yet; notes that it has (G6).
local function once(ops, client, sequence)
  local last = redis.call('HGET', ops, client) or '0:'
  local before, number = string.match(last, '^(%d+):(%d*)$')
  if tonumber(before) >= tonumber(sequence) then
    return false
  end
  redis.call('HSET', ops, client, sequence .. ':' .. number)
  return true
end
