-- ARGV: time. Ready, delayed, leased, and in how many milliseconds the next lease ends (-1: none).
local now = now_ms()
local delayed = redis.call('ZCOUNT', key('d'), '(' .. whole(now), '+inf')
local leased = redis.call('HLEN', key('h'))
local ready = redis.call('HLEN', key('e')) - delayed - leased
local first = redis.call('ZRANGE', key('l'), 0, 0, 'WITHSCORES')
local left = -1
if first[2] then left = math.max(0, tonumber(first[2]) - now) end
return { ready, delayed, leased, left }
