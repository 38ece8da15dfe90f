-- ARGV: time, worker, tasks. Takes back those that the worker has leased; how many they were.
local count = 0
for i = 3, #ARGV do
  local _, _, worker = lease(ARGV[i])
  if worker == ARGV[2] then
    take_back(ARGV[i])
    count = count + 1
  end
end
return count
