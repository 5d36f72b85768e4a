-- A node's report, numbered without gaps: the entry's id is the node's counter. Runs with the node's own rights.
-- KEYS: counter, reports, request.  ARGV: bound of the stream, field, value, ...
-- Answers the number; a second run of the same request gives the same number and writes nothing.
local given = redis.call("GET", KEYS[3])
if given then
  return tonumber(given)
end
local number = redis.call("INCR", KEYS[1])
local entry = {}
for i = 2, #ARGV do
  entry[#entry + 1] = ARGV[i]
end
redis.call("XADD", KEYS[2], "MAXLEN", "~", ARGV[1], string.format("%d-0", number), unpack(entry))
redis.call("SET", KEYS[3], number, "PX", 600000)
return number
