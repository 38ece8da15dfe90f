-- ARGV: time, worker. It waits no longer.
redis.call('HDEL', key('idle'), ARGV[2])
redis.call('ZREM', key('line'), ARGV[2])
return 1
