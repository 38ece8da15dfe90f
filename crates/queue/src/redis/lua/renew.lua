-- ARGV: time, task, epoch. Whether it was held.
local held, length = lease(ARGV[2])
if held ~= ARGV[3] then return 0 end
redis.call('ZADD', key('l'), whole(now_ms() + length), ARGV[2])
return 1
