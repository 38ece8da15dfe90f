-- ARGV: time, then of each entry: task, lane, priority, delay. How many were delayed.
local count = (#ARGV - 1) / 4
-- What is here already leaves a gap.
local seq = redis.call('INCRBY', key('seq'), count) - count
local now, delayed = nil, 0
for i = 2, #ARGV, 4 do
  local task, lane, priority, delay = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  seq = seq + 1
  local place = whole(seq)
  if redis.call('HSETNX', key('e'), task, priority .. ':' .. place .. ':' .. lane) == 1 then
    if delay > 0 then
      now = now or now_ms()
      redis.call('ZADD', key('d'), whole(now + delay), task)
      delayed = delayed + 1
    else
      make_ready(task, priority, place, lane)
    end
  end
end
return delayed
