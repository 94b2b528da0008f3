-- hand_over: give the lock to the first waiter that is still there; its ticket and token, nil if there is none.
-- Who polls no more has lost the mark of its waiting to expiry, and is passed over. The names of other waiters'
-- keys cannot be declared in KEYS: who comes next is known here only. They share the hash tag of KEYS, so that a
-- Redis Cluster has them on the same node.
local function hand_over(lock, fence, queue, wake)
  local ticket = redis.call('LPOP', queue)
  while ticket do
    local wish = redis.call('GETDEL', wake .. ticket .. ':waits')
    if wish then
      local ttl, owner = string.match(wish, '^(%d+) (.*)$')
      local time = redis.call('TIME')
      local token = redis.call('INCR', fence)
      local since = time[1] * 1000 + math.floor(time[2] / 1000)
      redis.call('SET', lock, ticket .. ' ' .. token .. ' ' .. since .. ' ' .. owner, 'PX', ttl)
      redis.call('RPUSH', wake .. ticket, token)
      redis.call('PEXPIRE', wake .. ticket, ttl)
      return ticket, token
    end
    ticket = redis.call('LPOP', queue)
  end
end
