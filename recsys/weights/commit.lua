-- Make a version out of staged chunks, or change nothing.
-- KEYS: epoch, head, deltas, chunks...   ARGV: epoch, parent, version, chain, position, record
local head = redis.call('HMGET', KEYS[2], 'version', 'epoch', 'chain', 'record')
if head[1] == ARGV[3] and head[2] == ARGV[1] and head[3] == ARGV[4] then
  return {'repeated', head[4]}
end
local epoch = redis.call('GET', KEYS[1])
local version = head[1] or '0'
if epoch ~= ARGV[1] or version ~= ARGV[2] then
  return {'fenced', epoch or '0', version}
end
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    return {'lapsed'}
  end
end
-- The one command that can be refused comes first: a script is not undone when it fails half-way.
local added = redis.pcall('XADD', KEYS[3], ARGV[3] .. '-0', 'record', ARGV[6])
if type(added) == 'table' and added.err then
  if string.find(added.err, 'equal or smaller', 1, true) then
    return {'refused'}
  end
  return added
end
redis.call('HSET', KEYS[2], 'version', ARGV[3], 'epoch', ARGV[1], 'chain', ARGV[4], 'position', ARGV[5],
  'record', ARGV[6])
for i = 4, #KEYS do
  redis.call('PERSIST', KEYS[i])
end
return {'committed'}
