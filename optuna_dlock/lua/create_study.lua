-- create_study: register a study under a name that is free.
-- KEYS[1] names (hash)     KEYS[2] studies (hash)   KEYS[3] registry info (hash)
-- KEYS[4] study meta (hash)  KEYS[5] study ballots (hash)  KEYS[6..] every other key of the study
-- ARGV[1] id  ARGV[2] name  ARGV[3] study as JSON  ARGV[4] format version  ARGV[5] uid for a new data set
-- ARGV[6] 1 if this is one of several masters, else 0
-- Returns {0} | {-7, id} EXISTS | {-8, key} FOREIGN
-- Retry-safe: the id belongs to this call alone; the same id again gets {0}.
-- Somebody else's data under one of these keys is an error, which has to come before the first write.
redis.call('HEXISTS', KEYS[2], ARGV[1])
redis.call('HEXISTS', KEYS[3], 'uid')
local known = redis.call('HGET', KEYS[1], ARGV[2])
if known == ARGV[1] then
  return {0}
elseif known then
  return {-7, known}
end
local begun = ARGV[6] == '1' and redis.call('EXISTS', KEYS[5]) == 1
if ARGV[6] ~= '1' then
  for i = 4, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then
      return {-8, KEYS[i]}
    end
  end
end
redis.call('HSETNX', KEYS[3], 'format', ARGV[4])
redis.call('HSETNX', KEYS[3], 'uid', ARGV[5])
redis.call('HSET', KEYS[1], ARGV[2], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
if begun then
  return {0} -- this master got the study from others before it came to this section
end
redis.call('HSET', KEYS[4], 'n', 0, 'base', 0)
if ARGV[6] == '1' then
  redis.call('HSET', KEYS[5], 'p', '0', 'l', 0, 'a', '0', 's', '0', 'i', '0')
end
return {0}
