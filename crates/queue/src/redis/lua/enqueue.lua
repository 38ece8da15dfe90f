-- ARGV: time, then of each entry: task, lane, priority, delay. How many were delayed.
local now = now_ms()
local delayed = 0
for i = 2, #ARGV, 4 do
  local task, lane, priority, delay = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  if redis.call('HEXISTS', key('e'), task) == 0 then
    local seq = whole(redis.call('INCR', key('seq')))
    redis.call('HSET', key('e'), task, priority .. ':' .. seq .. ':' .. lane)
    if delay > 0 then
      redis.call('ZADD', key('d'), whole(now + delay), task)
      delayed = delayed + 1
    else
      make_ready(task, priority, seq, lane)
    end
  end
end
return delayed
