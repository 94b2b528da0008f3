-- log_change: append one change of an unfinished trial to the capped log, trimming it now and then.
-- A reader keeps a revision: that of the log's first entry (meta 'base') plus the entries it has read.
-- Values above 1 KiB stay out of the log ('!'): the reader fetches that trial.
local LOG_CAP = 2048
local function log_change(log, meta, number, version, field, value)
  local entry
  if #value > 1024 then
    entry = number .. ':' .. version .. ':!'
  else
    entry = number .. ':' .. version .. ':' .. #field .. ':' .. field .. value
  end
  local length = redis.call('RPUSH', log, entry)
  if length >= 2 * LOG_CAP then
    redis.call('LTRIM', log, -LOG_CAP, -1)
    redis.call('HINCRBY', meta, 'base', length - LOG_CAP)
  end
end
