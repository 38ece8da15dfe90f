-- ARGV: time, worker, how many at most. How many were taken back.
local held = redis.call('SRANDMEMBER', key('w:' .. ARGV[2]), ARGV[3])
for _, task in ipairs(held) do
  take_back(task)
  -- One whose lease is not there would be found for ever.
  redis.call('SREM', key('w:' .. ARGV[2]), task)
end
return #held
