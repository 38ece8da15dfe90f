-- Somebody was woken who is not there any more: another may have what is ready.
for priority = 0, 3 do
  if redis.call('EXISTS', ready_key(SHARED, priority)) == 1 then
    wake(SHARED)
    return 1
  end
end
return 0
