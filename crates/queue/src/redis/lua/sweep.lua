-- ARGV: time, how many at most. How many leases were taken back.
local now, most = now_ms(), ARGV[2]
-- Who was to end these delays may be gone.
promote(now, most)
local over = redis.call('ZRANGEBYSCORE', key('l'), '-inf', whole(now), 'LIMIT', 0, most)
for _, task in ipairs(over) do
  take_back(task)
end
-- Who was woken for what is ready may have gone before it looked.
for priority = 0, 3 do
  if redis.call('EXISTS', ready_key(SHARED, priority)) == 1 then
    wake(SHARED)
    break
  end
end
return #over
