-- ARGV: time, delays to end at most, then of each claim: worker, length of the lease, channel (empty:
-- it does not wait), how long a lease that is handed over runs before it is confirmed. Of each its
-- task and epoch; where the task is empty nothing is ready, and a worker that waits is in the line.
local now = now_ms()
promote(now, ARGV[2])

-- The task and its epoch, or nothing.
local function claim(worker, length)
  local own, shared = count_ready(worker), count_ready(SHARED)
  if own + shared == 0 then return nil end

  local lane, count = SHARED, shared
  if own > 0 and shared == 0 then
    lane, count = worker, own
  elseif own > 0 then
    -- So many from its own lane, then one from the shared.
    if redis.call('HINCRBY', key('run'), worker, 1) <= OWN_RUN_MAX then
      lane, count = worker, own
    else
      redis.call('HDEL', key('run'), worker)
    end
  end

  -- Which of the priorities have work; it is known of the rest once so many are found.
  local found, left, best = {}, count, nil
  for priority = 0, 3 do
    if left > 0 and redis.call('EXISTS', ready_key(lane, priority)) == 1 then
      found[priority] = true
      best = best or priority
      left = left - 1
    end
  end

  -- Smooth weighted round robin: who waits gains its weight, the richest is next and pays the sum.
  -- One that waits alone owes nobody.
  if count > 1 then
    local credits = redis.call('HMGET', key('c:' .. lane), 0, 1, 2, 3)
    local sum, richest, updated = 0, nil, {}
    for priority = 0, 3 do
      updated[priority] = 0
      if found[priority] then
        local weight = WEIGHTS[priority + 1]
        updated[priority] = tonumber(credits[priority + 1] or 0) + weight
        sum = sum + weight
        if not richest or updated[priority] > updated[richest] then richest = priority end
      end
    end
    best = richest
    updated[best] = updated[best] - sum
    redis.call('HSET', key('c:' .. lane), 0, updated[0], 1, updated[1], 2, updated[2], 3, updated[3])
  elseif lane ~= SHARED then
    -- Workers come and go; what is left of their turns goes with the last of their work.
    redis.call('DEL', key('c:' .. lane))
  end

  local from = ready_key(lane, best)
  local task = redis.call('ZRANGE', from, 0, 0)[1]
  local epoch = next_epoch()
  write_lease(task, epoch, length, worker, now + length)
  redis.call('ZREM', from, task)
  return task, epoch
end

local answers = {}
for i = 3, #ARGV, 4 do
  local worker, length, channel = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local task, epoch = claim(worker, length)
  if not task and channel ~= '' then
    redis.call('HSET', key('idle'), worker, length .. ':' .. ARGV[i + 3] .. ':' .. channel)
    redis.call('ZADD', key('line'), 'NX', redis.call('INCR', key('turn')), worker)
  end
  answers[#answers + 1] = { task or '', epoch or '0' }
end
return answers
