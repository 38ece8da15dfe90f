-- ARGV: time, task, epoch. Whether it was held.
local worker = holder(ARGV[2], ARGV[3])
if not worker then return 0 end
redis.call('HDEL', key('e'), ARGV[2])
forget_lease(ARGV[2], worker)
return 1
