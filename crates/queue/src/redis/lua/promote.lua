-- ARGV: time, how many at most. How many delays were ended, and in how many milliseconds the next
-- one is over (-1: there is none).
local now = now_ms()
local ended = promote(now, ARGV[2])
local first = redis.call('ZRANGE', key('d'), 0, 0, 'WITHSCORES')
if not first[2] then return { ended, -1 } end
return { ended, math.max(0, tonumber(first[2]) - now) }
