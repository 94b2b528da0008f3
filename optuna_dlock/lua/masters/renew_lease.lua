-- renew_lease: tell that the holder of a lock lives.
-- KEYS[1] leases (hash)
-- ARGV[1] name  ARGV[2] ticket
-- Returns {0} | {-10} NOT_HELD
-- Retry-safe: one renewal more is as good.
local held = redis.call('HGET', KEYS[1], ARGV[1])
local ticket, token, renewals, rest
if held then
  ticket, token, renewals, rest = string.match(held, '^(%S+) (%d+) (%d+) (.*)$')
end
if ticket ~= ARGV[2] then
  return {-10}
end
redis.call('HSET', KEYS[1], ARGV[1], ticket .. ' ' .. token .. ' ' .. (renewals + 1) .. ' ' .. rest)
return {0}
