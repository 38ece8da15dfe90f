-- What all scripts share. KEYS[1] is the root of all keys; ARGV[1] is the time in milliseconds, or
-- empty: then the server's counts.
--
--   e     hash    task -> priority:seq:lane       every entry
--   h     hash    task -> epoch:length:worker     those that are leased
--   l     sorted  task by the end of its lease    those that are leased
--   d     sorted  task by when it is due          those that are delayed
--   r:LANE:PRIORITY  sorted  task by seq          those that are ready
--   c:LANE           hash    priority -> credit   whose turn it is
--   run   hash    worker -> claims in a row from its own lane while the shared one waited
--   idle  hash    worker -> length:first:channel      those that wait for work
--   line  sorted  worker by turn                      the same, who waits longest first
--   seq, epoch, turn  counters
--   owner  whose tasks these are
--
-- Who waits says how long a lease it wants, how long that may run before it is confirmed, and the
-- channel of its process.
--
-- Every entry is in one of h and l, d, or r. What it moves to is written before what it leaves is
-- removed.

local ROOT = KEYS[1]
local SHARED = 's'

local function key(name)
  return ROOT .. name
end

local function whole(number)
  return string.format('%.0f', number)
end

local function micros()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function now_ms()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  return math.floor(micros() / 1000)
end

local function ready_key(lane, priority)
  return key('r:' .. lane .. ':' .. priority)
end

-- Priority, place in the order, lane.
local function entry(task)
  local text = redis.call('HGET', key('e'), task)
  if not text then return nil end
  return string.match(text, '^(%d):(%d+):(.+)$')
end

-- Epoch, length, worker.
local function lease(task)
  local text = redis.call('HGET', key('h'), task)
  if not text then return nil end
  return string.match(text, '^(%d+):(%d+):(.+)$')
end

-- No lower than the clock: epochs rise over a server that lost its last second, or everything, and
-- over a change from another queue.
local last_epoch
local function next_epoch()
  if last_epoch then
    last_epoch = last_epoch + 1
  else
    last_epoch = math.max((redis.call('GET', key('epoch')) or 0) + 1, micros())
  end
  return whole(last_epoch)
end

local function write_lease(task, epoch, length, worker, ends)
  redis.call('SET', key('epoch'), epoch)
  redis.call('HSET', key('h'), task, epoch .. ':' .. length .. ':' .. worker)
  redis.call('ZADD', key('l'), whole(ends), task)
end

-- Takes a worker out of the line: the lease that it wants, and its process' channel.
local function call_up(worker)
  local text = redis.call('HGET', key('idle'), worker)
  redis.call('HDEL', key('idle'), worker)
  redis.call('ZREM', key('line'), worker)
  if not text then return nil end
  return string.match(text, '^(%d+):(%d+):(.+)$')
end

-- Tells a worker that waits to look. False: its process is gone.
local function tell(worker)
  local _, _, channel = call_up(worker)
  return channel and redis.call('PUBLISH', channel, worker) > 0
end

-- Leases an entry to a worker that waits, and tells it so. False: its process is gone.
local function hand(worker, task)
  local length, first, channel = call_up(worker)
  if not channel then return false end
  local epoch = next_epoch()
  local word = worker .. ' ' .. task .. ' ' .. epoch .. ' ' .. length
  if redis.call('PUBLISH', channel, word) == 0 then return false end
  write_lease(task, epoch, length, worker, now_ms() + first)
  return true
end

-- Whether nobody waits, as far as this script has seen: nobody comes while it runs.
local nobody = false

-- Wakes one that waits and may take from the lane.
local function wake(lane)
  if nobody then return end
  if lane ~= SHARED then
    if redis.call('HEXISTS', key('idle'), lane) == 1 then tell(lane) end
    return
  end
  -- Those that are gone are left behind; a bound for a script, not for them.
  for _ = 1, 64 do
    local first = redis.call('ZRANGE', key('line'), 0, 0)[1]
    if not first then nobody = true end
    if not first or tell(first) then return end
  end
end

-- In how many priorities something is ready.
local function count_ready(lane)
  return redis.call(
    'EXISTS', ready_key(lane, 0), ready_key(lane, 1), ready_key(lane, 2), ready_key(lane, 3))
end

-- Gives an entry to one that waits, unless another is before it. Whether it did.
local function hand_over(task, lane)
  if nobody then return false end
  if lane ~= SHARED then
    return redis.call('HEXISTS', key('idle'), lane) == 1 and count_ready(lane) == 0
      and hand(lane, task)
  end
  for _ = 1, 64 do
    local first = redis.call('ZRANGE', key('line'), 0, 0)[1]
    if not first then
      nobody = true
      return false
    end
    if count_ready(SHARED) > 0 then return false end
    if hand(first, task) then return true end
  end
  return false
end

-- True: somebody has it leased already.
local function make_ready(task, priority, seq, lane)
  if hand_over(task, lane) then return true end
  redis.call('ZADD', ready_key(lane, priority), seq, task)
  wake(lane)
  return false
end

-- Ends at most so many delays that are over; how many they were.
local function promote(now, most)
  local due = redis.call('ZRANGEBYSCORE', key('d'), '-inf', whole(now), 'LIMIT', 0, most)
  for _, task in ipairs(due) do
    local priority, seq, lane = entry(task)
    if priority then make_ready(task, priority, seq, lane) end
    redis.call('ZREM', key('d'), task)
  end
  return #due
end

-- The lease is over, however it was; the entry must be somewhere else already, or gone.
local function forget_lease(task)
  redis.call('ZREM', key('l'), task)
  redis.call('HDEL', key('h'), task)
end

-- Gives back what is leased, in the place that it had.
local function take_back(task)
  local priority, seq, lane = entry(task)
  if priority and make_ready(task, priority, seq, lane) then return end
  forget_lease(task)
end
