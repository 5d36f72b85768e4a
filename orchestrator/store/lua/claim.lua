-- A node worker takes a grant, once: a message that is delivered twice, or late, finds it taken or gone, also when it
-- comes to the worker that took it.
-- KEYS: claim, counter, reports.  ARGV: grants hash, operation, epoch, "<holder> <id of this call>", bound,
-- report
-- The grants hash is not among the KEYS: the node may only read it, and Redis asks for all rights on declared keys.
-- Answers the grant's JSON, or "" when there is nothing to do. The same call, sent again for want of a reply, gets the
-- grant again.
local grant = redis.call("HGET", ARGV[1], ARGV[2])
if not grant then
  return ""
end
if tostring(cjson.decode(grant).epoch) ~= ARGV[3] then
  return ""
end
local taken = redis.call("GET", KEYS[1])
if taken then
  if taken == ARGV[4] then
    return grant
  end
  return ""
end
redis.call("SET", KEYS[1], ARGV[4], "PX", 86400000)
local number = redis.call("INCR", KEYS[2])
redis.call("XADD", KEYS[3], "MAXLEN", "~", ARGV[5], string.format("%d-0", number), "kind", "Began", "body", ARGV[6])
return grant
