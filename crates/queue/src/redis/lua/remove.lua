-- ARGV: time, task. Whether there was an entry that nobody had.
local task = ARGV[2]
if redis.call('HEXISTS', key('h'), task) == 1 then return 0 end
local priority, _, lane = entry(task)
if not priority then return 0 end
redis.call('ZREM', ready_key(lane, priority), task)
redis.call('ZREM', key('d'), task)
redis.call('HDEL', key('e'), task)
return 1
