-- run_section: run a section as the next one of its object, and note it for masters that miss it.
-- A call is cmsgpack of name of the script, length of what the master's key names begin with, keys, arguments. An entry of
-- the list of sections is: sequence number before, section before, this section, call; separated by blanks.
local SECTIONS_CAP = 512
local function run_section(section, keys, args, call, ballots, sections, seq, last, this)
  --[keydb] delete_what_came_back(ballots, keys)
  local reply = section(keys, args)
  --[keydb] note_what_is_gone(ballots, keys)
  if redis.call('RPUSH', sections, table.concat({seq, last, this, call}, ' ')) >= 2 * SECTIONS_CAP then
    redis.call('LTRIM', sections, -SECTIONS_CAP, -1)
  end
  return reply
end
