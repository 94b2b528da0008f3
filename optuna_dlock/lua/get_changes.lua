-- get_changes: what became of a study's trials since the caller last looked.
-- KEYS[1] meta (hash)  KEYS[2] order (list)  KEYS[3] finished (hash)  KEYS[4] log (list)  KEYS[5] live (hash)
-- KEYS[6] dists (list)  KEYS[7] waiting (sorted set)  KEYS[8] offers (hash)
-- ARGV[1] entries of order the caller has read  ARGV[2] finished trials to return at most
-- ARGV[3] revision of the log: -1 to leave it, -2 if none is known  ARGV[4] distributions known
-- ARGV[5] client that wants the head of the queue, or ''
-- Returns {0, n, length of order, {number, ...}, {record, ...}, revision, {entry, ...} | nil,
--   {number, record, ...} | nil, {JSON, ...}, {head} | {}} | {-1} NO_STUDY. Entries of the log if it still has
--   all since the caller's revision, else the records of all unfinished trials. If the queue was asked for
--   and is empty: {0, n}.
-- Retry-safe: only a hint is written, namely whom the head of the queue was shown to.
local OFFER_MS = 500
local meta = redis.call('HMGET', KEYS[1], 'n', 'base')
if not meta[1] then
  return {-1}
end
local n = tonumber(meta[1])
local head = {}
if ARGV[5] ~= '' then
  if redis.call('ZCARD', KEYS[7]) == 0 then
    return {0, n}
  end
  -- Show every worker another trial first, so that they do not all claim the same one.
  local now = redis.call('TIME')
  local ms = now[1] * 1000 + math.floor(now[2] / 1000)
  local candidates = redis.call('ZRANGE', KEYS[7], 0, 63)
  for i = 1, #candidates do
    local offer = redis.call('HGET', KEYS[8], candidates[i])
    local till, client
    if offer then
      till, client = string.match(offer, '^(%d+):(.*)$')
    end
    if not offer or client == ARGV[5] or tonumber(till) < ms then
      redis.call('HSET', KEYS[8], candidates[i], string.format('%.0f:%s', ms + OFFER_MS, ARGV[5]))
      head = {tonumber(candidates[i])}
      break
    end
  end
end
local length = redis.call('LLEN', KEYS[2])
local read, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local numbers, records = {}, {}
if length > read and most > 0 then
  numbers = redis.call('LRANGE', KEYS[2], read, read + most - 1)
  records = redis.call('HMGET', KEYS[3], unpack(numbers))
end
local cursor, revision, entries, unfinished = tonumber(ARGV[3]), -1, false, false
if cursor ~= -1 then
  local base = tonumber(meta[2])
  revision = base + redis.call('LLEN', KEYS[4])
  if cursor >= base and cursor <= revision then
    entries = {}
    if cursor < revision then
      entries = redis.call('LRANGE', KEYS[4], cursor - base, -1)
    end
  else
    unfinished = redis.call('HGETALL', KEYS[5])
  end
end
local dists = redis.call('LRANGE', KEYS[6], ARGV[4], -1)
return {0, n, length, numbers, records, revision, entries, unfinished, dists, head}
