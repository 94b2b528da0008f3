-- run_sections: run those of consecutive sections that this master has not run, in one step.
-- KEYS[1] ballots (hash)  KEYS[2] sections (list)
-- ARGV[1] ballot  ARGV[2] what this master's key names begin with  ARGV[3..] entries, as in the list of sections
-- Returns {0, sequence number, how many it has run now} | {-20} NO_DATA | {-21, promised ballot} STALE_BALLOT
--   | {-22, accepted ballot, sequence number, last section} GAP; an error if a section fails
-- Retry-safe: what was run already is passed over.
-- The names of the sections' keys cannot be declared in KEYS: they are known from the entries only. The ballot says under
-- whose order a state was accepted: a master that has caught up only in part must not claim it, or a state that lost would
-- rank above one that was acknowledged.
local bodies = {}
-- bodies
-- include run_section
local f = redis.call('HMGET', KEYS[1], 'p', 'a', 's', 'i')
if not f[3] then
  return {-20}
elseif f[1] ~= ARGV[1] then
  return {-21, f[1]}
end
local seq, last = f[3], f[4]
local first = 3
local at = first + (seq - string.match(ARGV[first], '^%d+'))
if at > #ARGV and f[2] == ARGV[1] then
  return {0, tonumber(seq), 0} -- all that is accepted under a ballot are beginnings of one sequence
elseif at < first or at > #ARGV then
  return {-22, f[2], seq, last}
end
local missing = #ARGV - at + 1
while at <= #ARGV do
  local before, previous, this, start = string.match(ARGV[at], '^(%d+) (%S+) (%S+) ()')
  if before ~= seq or previous ~= last then
    return {-22, f[2], f[3], f[4]}
  end
  local call = string.sub(ARGV[at], start)
  local name, prefix_length, keys, args = cmsgpack.unpack(call)
  for i = 1, #keys do
    keys[i] = ARGV[2] .. string.sub(keys[i], prefix_length + 1)
  end
  call = cmsgpack.pack(name, tostring(#ARGV[2]), keys, args)
  local done, reply = pcall(run_section, bodies[name], keys, args, call, KEYS[1], KEYS[2], before, previous, this)
  if not done then
    redis.call('HSET', KEYS[1], 's', seq, 'i', last)
    return redis.error_reply(type(reply) == 'table' and reply.err or tostring(reply))
  end
  seq, last, at = string.format('%.0f', seq + 1), this, at + 1
end
redis.call('HSET', KEYS[1], 'a', f[1], 's', seq, 'i', last)
return {0, tonumber(seq), missing}
