-- ARGV: time, worker, length of the lease, channel (empty: it does not wait), delays to end at
-- most. Task and epoch, or nothing; then the worker is in the line of those who wait.
local now, worker, length, channel = now_ms(), ARGV[2], ARGV[3], ARGV[4]
promote(now, ARGV[5])

local function waiting(lane)
  local found, any = {}, false
  for priority = 0, #WEIGHTS - 1 do
    found[priority] = redis.call('EXISTS', ready_key(lane, priority)) == 1
    any = any or found[priority]
  end
  return found, any
end

local own, has_own = waiting(worker)
local shared, has_shared = waiting(SHARED)

if not has_own and not has_shared then
  if channel ~= '' then
    redis.call('HSET', key('idle'), worker, channel)
    redis.call('ZADD', key('line'), 'NX', redis.call('INCR', key('turn')), worker)
  end
  return false
end

local lane, found = SHARED, shared
if has_own and not has_shared then
  lane, found = worker, own
elseif has_own then
  -- So many from its own lane, then one from the shared.
  if redis.call('HINCRBY', key('run'), worker, 1) <= OWN_RUN_MAX then
    lane, found = worker, own
  else
    redis.call('HDEL', key('run'), worker)
  end
end

-- Smooth weighted round robin: who waits gains its weight, the richest is next and pays the sum.
local credits = redis.call('HMGET', key('c:' .. lane), 0, 1, 2, 3)
local sum, best, updated = 0, nil, {}
for priority = 0, #WEIGHTS - 1 do
  local credit = 0
  if found[priority] then
    local weight = WEIGHTS[priority + 1]
    credit = tonumber(credits[priority + 1] or 0) + weight
    sum = sum + weight
    if not best or credit > updated[best] then best = priority end
  end
  updated[priority] = credit
end
updated[best] = updated[best] - sum

local from = ready_key(lane, best)
local task = redis.call('ZRANGE', from, 0, 0)[1]
local epoch = redis.call('INCR', key('epoch'))
local clock = micros()
if epoch < clock then
  -- Rises over a server that lost everything, and over a change from another queue.
  epoch = clock
  redis.call('SET', key('epoch'), whole(epoch))
end
redis.call('HSET', key('h'), task, whole(epoch) .. ':' .. length .. ':' .. worker)
redis.call('ZADD', key('l'), whole(now + tonumber(length)), task)
redis.call('SADD', key('w:' .. worker), task)
redis.call('ZREM', from, task)
if lane ~= SHARED and sum == WEIGHTS[best + 1] and redis.call('EXISTS', from) == 0 then
  -- Workers come and go; a lane without work owes nobody.
  redis.call('DEL', key('c:' .. lane))
else
  redis.call('HSET', key('c:' .. lane), 0, updated[0], 1, updated[1], 2, updated[2], 3, updated[3])
end
return { task, whole(epoch) }
