-- next_study_id: draw the id of a study that is to be created.
-- KEYS[1] registry info (hash)
-- Returns the id (1, 2, ...)
-- Retry-safe: an id that nobody uses does no harm.
return redis.call('HINCRBY', KEYS[1], 'last_id', 1)
