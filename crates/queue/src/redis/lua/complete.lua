-- ARGV: time, task, epoch. Whether it was held.
if lease(ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('HDEL', key('e'), ARGV[2])
forget_lease(ARGV[2])
return 1
