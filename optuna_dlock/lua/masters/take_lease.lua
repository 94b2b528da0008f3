-- take_lease: take a lock that is free, or whose holder was seen not to renew it for its whole ttl.
-- KEYS[1] leases (hash: name -> ticket token renewals ttl since owner)
-- KEYS[2] fences (hash: name -> last token)
-- ARGV[1] name  ARGV[2] ticket  ARGV[3] ttl in ms  ARGV[4] owner  ARGV[5] since (caller's clock, ms: shown only)
-- ARGV[6] the dead holder's ticket  ARGV[7] its renewals
-- Returns {0, token} | {-5, lease} BUSY
-- Retry-safe: the same ticket again gets the same token.
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held then
  local ticket, token, renewals = string.match(held, '^(%S+) (%d+) (%d+) ')
  if ticket == ARGV[2] then
    return {0, tonumber(token)}
  elseif ticket ~= ARGV[6] or renewals ~= ARGV[7] then
    return {-5, held}
  end
end
local token = redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
local lease = table.concat({ARGV[2], token, 0, ARGV[3], ARGV[5], ARGV[4]}, ' ')
redis.call('HSET', KEYS[1], ARGV[1], lease)
return {0, token}
