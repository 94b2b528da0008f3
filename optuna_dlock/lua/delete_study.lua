-- delete_study: make a study unknown, and leave its keys to be swept.
-- KEYS[1] names (hash)  KEYS[2] studies (hash)  KEYS[3] trash (set)  KEYS[4] study meta (hash)
-- ARGV[1] id  ARGV[2] name
-- Returns {0} | {-1} NO_STUDY
-- Retry-safe: a deleted study whose keys still lie in the trash gets {0}.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then
  if redis.call('SISMEMBER', KEYS[3], ARGV[1]) == 1 then
    return {0}
  end
  return {-1}
end
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('DEL', KEYS[4])
return {0}
