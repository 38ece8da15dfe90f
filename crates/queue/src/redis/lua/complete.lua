-- ARGV: time, then of each lease: task, epoch. Of each whether it was held.
local answers = {}
for i = 2, #ARGV, 2 do
  local held = lease(ARGV[i]) == ARGV[i + 1]
  if held then
    redis.call('HDEL', key('e'), ARGV[i])
    forget_lease(ARGV[i])
  end
  answers[#answers + 1] = held and 1 or 0
end
return answers
