-- ARGV: time, task, epoch, delay. Whether it was held.
local task, delay = ARGV[2], tonumber(ARGV[4])
if lease(task) ~= ARGV[3] then return 0 end
local priority, seq, lane = entry(task)
if priority and delay > 0 then
  redis.call('ZADD', key('d'), whole(now_ms() + delay), task)
elseif priority and make_ready(task, priority, seq, lane) then
  return 1
end
forget_lease(task)
return 1
