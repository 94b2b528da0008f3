-- drop_lease: free a lock, by its holder; or by who saw that the holder did not renew it for its whole ttl.
-- KEYS[1] leases (hash)  KEYS[2] released (hash: client -> ticket released last)
-- ARGV[1] name  ARGV[2] ticket  ARGV[3] renewals seen, '' if the holder asks  ARGV[4] client
-- Returns {0} | {-10} NOT_HELD
-- Retry-safe (G6): the ticket released last by this client gets {0} again.
local RELEASED_CAP = 10000 -- clients; forgetting one matters only while its call is being retried
local held = redis.call('HGET', KEYS[1], ARGV[1])
local ticket, renewals
if held then
  ticket, renewals = string.match(held, '^(%S+) %d+ (%d+) ')
end
if ticket ~= ARGV[2] or (ARGV[3] ~= '' and ARGV[3] ~= renewals) then
  if ARGV[3] == '' and redis.call('HGET', KEYS[2], ARGV[4]) == ARGV[2] then
    return {0}
  end
  return {-10}
end
redis.call('HDEL', KEYS[1], ARGV[1])
if ARGV[3] == '' then
  if redis.call('HLEN', KEYS[2]) > RELEASED_CAP then
    redis.call('DEL', KEYS[2])
  end
  redis.call('HSET', KEYS[2], ARGV[4], ARGV[2])
end
return {0}
