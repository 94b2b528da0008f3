-- acquire_ballot: promise this master's vote for the next sections of an object, and start a lease.
-- KEYS[1] ballots (hash: p promised, l lease end in ms, a accepted, s sequence number, i last section, k known runs, o open)
-- ARGV[1] ballot  ARGV[2] ttl in ms  ARGV[3] 1 if the caller would rather use a ballot that is open here, else 0
-- Returns {0, accepted ballot, sequence number, last section, known runs} | {-20} NO_DATA
--   | {-21, promised ballot} STALE_BALLOT | {-23, promised ballot} LEASED | {-24, promised ballot} OPEN
-- Retry-safe: the same ballot again starts its lease anew. A client does not wait for a lease of its own (the last 12 digits
-- of a ballot), of which it has not heard.
local f = redis.call('HMGET', KEYS[1], 'p', 'l', 'a', 's', 'i', 'k', 'o')
if not f[4] then
  return {-20} -- no data, or not all of it yet: a master that has forgotten must not vote
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if f[1] ~= ARGV[1] then
  if f[7] == f[1] and ARGV[3] == '1' then
    return {-24, f[1]}
  end
  if f[1] > ARGV[1] then
    return {-21, f[1]}
  end
  if tonumber(f[2]) > now and string.sub(f[1], -12) ~= string.sub(ARGV[1], -12) then
    return {-23, f[1]}
  end
end
redis.call('HSET', KEYS[1], 'p', ARGV[1], 'l', string.format('%.0f', now + ARGV[2]))
return {0, f[3], f[4], f[5], f[6] or ''}
