-- get_study_attrs: user or system attributes of a study.
-- KEYS[1] meta (hash)  KEYS[2] attributes (hash)
-- Returns {0, {key, JSON, ...}} | {-1} NO_STUDY
-- Retry-safe: reads only.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1}
end
return {0, redis.call('HGETALL', KEYS[2])}
