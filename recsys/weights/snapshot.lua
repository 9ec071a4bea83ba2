-- List a staged snapshot and strike off those that it retires, or change nothing.
-- KEYS: epoch, snapshots, staged chunks..., chunks of the retired...
-- ARGV: epoch, version, record, number of staged chunks, seconds the retired chunks have left, retired records...
local epoch = redis.call('GET', KEYS[1])
if epoch ~= ARGV[1] then
  return {'fenced', epoch or '0'}
end
local last = 2 + tonumber(ARGV[4])
for i = 3, last do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    return {'lapsed'}
  end
end
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[3])
for i = 3, last do
  redis.call('PERSIST', KEYS[i])
end
for i = 6, #ARGV do
  redis.call('ZREM', KEYS[2], ARGV[i])
end
-- The caller removes these in slices; should it die before that, they still go.
for i = last + 1, #KEYS do
  redis.call('EXPIRE', KEYS[i], ARGV[5])
end
return {'listed'}
