-- keydb: what stands before every script on a KeyDB server, whose own replication would get in the way.
-- Writes stay on this server (its append-only file has them too): each master gets its own from the clients, and a peer's
-- copy under its own clock could replace a newer key here. What is left is the full resync: it brings keys back that were
-- deleted here, while a key that exists here is the newer one and stays. So what is gone is noted among the ballots
-- (field '-name'), and deleted again before anything looks at it. Lines that begin with --[keydb] are code here.
redis.replicate_commands()
redis.set_repl(redis.REPL_AOF)
-- Of keys that decide something; offers are hints. Trials' hashes need no mark: they are gone when the trial is not in live.
-- Nor those of another object, which has ballots of its own (create_study is a section of the registry).
local function marks_of(ballots, keys)
  local marks, marked = {}, {}
  local base = string.match(ballots, '^.*}:')
  for i = 1, #keys do
    local name = string.sub(keys[i], #base + 1)
    if string.sub(keys[i], 1, #base) == base and name ~= 'offers' and name ~= 'ballots' and string.sub(name, 1, 2) ~= 't:' then
      marks[#marks + 1], marked[#marked + 1] = '-' .. name, keys[i]
    end
  end
  return marks, marked
end
local function delete_what_came_back(ballots, keys)
  local marks, marked = marks_of(ballots, keys)
  local trials = {}
  for i = 1, #keys do
    local base, number = string.match(keys[i], '^(.*}:)t:(%d+)$')
    if base then
      marks[#marks + 1], marked[#marked + 1] = '-live', base .. 'live'
      trials[keys[i]] = {base .. 'live', number}
    end
  end
  if #marks > 0 then
    local gone = redis.call('HMGET', ballots, unpack(marks))
    for i = 1, #marks do
      if gone[i] then
        redis.call('UNLINK', marked[i])
      end
    end
  end
  for trial, where in pairs(trials) do
    if redis.call('HEXISTS', where[1], where[2]) == 0 then
      redis.call('UNLINK', trial)
    end
  end
end
local function note_what_is_gone(ballots, keys)
  local marks, marked = marks_of(ballots, keys)
  if #marks > 0 then
    local gone = redis.call('HMGET', ballots, unpack(marks))
    for i = 1, #marks do
      local exists = redis.call('EXISTS', marked[i]) == 1
      if exists and gone[i] then
        redis.call('HDEL', ballots, marks[i])
      elseif not exists and not gone[i] then
        redis.call('HSET', ballots, marks[i], '')
      end
    end
  end
end
