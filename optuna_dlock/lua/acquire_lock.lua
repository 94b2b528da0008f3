-- acquire_lock: take the lock, or queue for it.
-- KEYS[1] lock (string: ticket token since owner)  KEYS[2] fence (counter)  KEYS[3] queue (list of tickets)
-- KEYS[4] wake list of this ticket  KEYS[5] mark that this ticket waits (string: ttl owner)
-- ARGV[1] ticket  ARGV[2] ttl in ms  ARGV[3] owner  ARGV[4] what the names of all wake lists begin with
-- ARGV[5] 0 now or never | 1 queue | 2 queue, and wake this ticket even if it gets the lock at once
-- Returns {0, token} | {-5, owner, held ms, left ms} BUSY | {-8} FOREIGN
-- Retry-safe (G6): the same ticket again gets the same token, or keeps its place.
local ticket, ttl, owner, wake, mode = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function take()
  local token = redis.call('INCR', KEYS[2])
  redis.call('SET', KEYS[1], ticket .. ' ' .. token .. ' ' .. now .. ' ' .. owner, 'PX', ttl)
  return token
end

if mode == '1' and redis.call('EXISTS', KEYS[1], KEYS[3]) == 0 then
  return {0, take()} -- the usual case: neither held nor queued for
end
-- The wake lists of other tickets cannot be declared in KEYS: whose they are is known here only (see hand_over).
-- include hand_over
local POLL_LIMIT = 3000 -- ms; waiters poll each second, and who has not for so long is no waiter any more
local FETCH_LIMIT = 1000 -- ms; who was given the lock and has not fetched its wake-up for so long is dead

local function enqueue()
  if redis.call('SET', KEYS[5], ttl .. ' ' .. owner, 'PX', POLL_LIMIT, 'NX') then
    redis.call('RPUSH', KEYS[3], ticket) -- a second entry does no harm: the first one takes the mark
  else
    redis.call('PEXPIRE', KEYS[5], POLL_LIMIT)
  end
  redis.call('PEXPIRE', KEYS[3], POLL_LIMIT) -- all marks go sooner
end

local held, token = redis.call('GET', KEYS[1]), nil
if held then
  local holder, number, since = string.match(held, '^(%S+) (%d+) (%d+) ')
  if not holder then
    return {-8}
  elseif holder == ticket then
    token = tonumber(number)
    redis.call('PEXPIRE', KEYS[1], ttl)
    redis.call('DEL', KEYS[4])
  elseif now - since > FETCH_LIMIT and redis.call('DEL', wake .. holder) == 1 then
    held = false
  end
end
if not held then
  local head
  if redis.call('EXISTS', KEYS[3]) == 1 then
    if mode ~= '0' then
      enqueue()
    end
    head, token = hand_over(KEYS[1], KEYS[2], KEYS[3], wake)
  end
  if not head then
    token = take()
  elseif head == ticket then
    redis.call('DEL', KEYS[4])
  else
    token, held = nil, redis.call('GET', KEYS[1])
  end
end
if token then
  if mode == '2' then
    redis.call('RPUSH', KEYS[4], token)
    redis.call('PEXPIRE', KEYS[4], ttl)
  end
  return {0, token}
end
if mode ~= '0' then
  enqueue()
elseif redis.call('DEL', KEYS[5]) == 1 then
  redis.call('LREM', KEYS[3], 0, ticket)
end
local since, name = string.match(held, '^%S+ %d+ (%d+) (.*)$')
return {-5, name, now - since, redis.call('PTTL', KEYS[1])}
