-- One commit: all checks hold and everything is written, or nothing is.
--
-- ARGV[1]: JSON {id, checks, writes, effects, dry}
--   checks   {name, ...}, in order; the first that fails is the answer
--   writes   {kind, key, expected, body|false, last}: `expected` is the version that the document must have, 0 for
--            "must not exist"; body false deletes, and `last` is what watchers are shown of it
--   effects  Redis commands on indexes, slots, grants and orders; {"DEADLINE", zset, member, ms from now};
--            {"SKIP", n}: the counter of changes goes ahead by n, and the stream says that what was between is lost
--   dry      true: only look whether it would be done; the versions in the answer are those that are stored, or 0
-- Answers {"ok", version of each write...} or {"refused", name of the check, detail}.
--
-- A client library may run this twice when a reply is lost: the answer to a request id is kept, and given again.
local request = cjson.decode(ARGV[1])
local request_key = "request:" .. request.id
local given = redis.call("GET", request_key)
if given then
  return cjson.decode(given)
end

local function refuse(name, detail)
  return {"refused", name, tostring(detail)}
end

local function now_ms()
  local time = redis.call("TIME")
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local checks = {}

-- {"identity", run id, replication id}: this is the Redis on record, and the herd is not in recovery.
checks["identity"] = function()
  local record = redis.call("HMGET", "identity", "run_id", "replid", "state")
  local server = redis.call("INFO", "server")
  local replication = redis.call("INFO", "replication")
  if record[3] ~= "normal" then
    return record[3] or "unset"
  end
  if string.match(server, "run_id:(%x+)") ~= record[1] then
    return "run id changed"
  end
  if string.match(replication, "master_replid:(%x+)") ~= record[2] then
    return "replication id changed"
  end
  return nil
end

-- {"field", hash, field, expected}: expected "" means that the field must be absent.
checks["field"] = function(c)
  local value = redis.call("HGET", c[2], c[3]) or ""
  if value ~= c[4] then
    return value
  end
  return nil
end

-- {"value", string key, expected}: expected "" means that it must be absent.
checks["value"] = function(c)
  local value = redis.call("GET", c[2]) or ""
  if value ~= c[3] then
    return c[2]
  end
  return nil
end

-- {"redis", run id, replication id}: this Redis is the one that was read from (takeover, rule 7).
checks["redis"] = function(c)
  if string.match(redis.call("INFO", "server"), "run_id:(%x+)") ~= c[2] then
    return "run id changed"
  end
  if string.match(redis.call("INFO", "replication"), "master_replid:(%x+)") ~= c[3] then
    return "replication id changed"
  end
  return nil
end

local function lease_of(node)
  local text = redis.pcall("GET", "node:{" .. node .. "}:lease") -- a node's own key: it may hold anything
  local ok, lease = pcall(cjson.decode, type(text) == "string" and text or "{}")
  return ok and type(lease) == "table" and lease or {}
end

-- {"lease", node, generation, sequence, must be armed}: the lease on record is still this one; "" and 0: there is none.
checks["lease"] = function(c)
  local lease = lease_of(c[2])
  if (lease.generation or "") ~= c[3] or (lease.sequence or 0) ~= c[4] then
    return "renewed"
  end
  if c[5] and lease.armed ~= true then
    return "not armed"
  end
  return nil
end

-- {"acknowledged", node, suspicion id}: rule 7's vote on a node. More than half of the members carry the id in their
-- leases; the node's own word does not count. The membership counts for the one that the node holds (rule 10).
checks["acknowledged"] = function(c)
  local published = redis.call("GET", "membership")
  if (redis.call("GET", "membership-next") or published) ~= published then
    return "another membership is prepared"
  end
  local membership = cjson.decode(published or '{"version":0,"members":{}}')
  local held = lease_of(c[2]).membership or 0
  local is_next = held == membership.version - 1 and (membership.changed or 0) <= 1
  if held ~= membership.version and not is_next then
    return "it may hold another membership"
  end
  local members, votes = 0, 0
  for name in pairs(membership.members) do
    members = members + 1
    if name ~= c[2] then
      local ids = lease_of(name).suspicions -- its own word: it may be anything
      for _, id in ipairs(type(ids) == "table" and ids or {}) do
        if id == c[3] then
          votes = votes + 1
          break
        end
      end
    end
  end
  if 2 * votes <= members then
    return votes .. " of " .. members
  end
  return nil
end

-- {"due", zset, member}: its timer is over; one that was set anew meanwhile is not.
checks["due"] = function(c)
  local score = redis.call("ZSCORE", c[2], c[3])
  if not score or tonumber(score) > now_ms() then
    return c[3]
  end
  return nil
end

-- {"unchanged", kind, key, version}: a document that the commit rests on but does not write.
checks["unchanged"] = function(c)
  local value = redis.call("HGET", "resources:" .. c[2], c[3])
  local version = value and tonumber(string.match(value, "^(%d+) ")) or 0
  if version ~= c[4] then
    return c[2] .. " " .. c[3]
  end
  return nil
end

-- {"slots", operation, source, target, outbound limit, inbound limit (0: none)}
-- The herd's cap is the number of schedulable nodes, counted here and now.
checks["slots"] = function(c)
  if redis.call("SISMEMBER", "slots:cluster", c[2]) == 1 then
    return "held"
  end
  if redis.call("SCARD", "slots:cluster") >= redis.call("SCARD", "schedulable") then
    return "cluster"
  end
  if redis.call("SCARD", "slots:outbound:" .. c[3]) >= c[5] then
    return "outbound"
  end
  if c[6] > 0 and redis.call("SCARD", "slots:inbound:" .. c[4]) >= c[6] then
    return "inbound"
  end
  return nil
end

-- {"schedulable", node}: Ready and not cordoned at this instant.
checks["schedulable"] = function(c)
  if redis.call("SISMEMBER", "schedulable", c[2]) == 0 then
    return c[2]
  end
  return nil
end

-- {"placements", count}: so many grants have placed a VM, ever: what a plan knew of where VMs are is all there is.
checks["placements"] = function(c)
  if tonumber(redis.call("HGET", "placements", "count") or 0) ~= c[2] then
    return "placements"
  end
  return nil
end

-- {"fits", node, memory MiB, millicores, capacity MiB, capacity millicores}
checks["fits"] = function(c)
  local memory, cpu = c[3], c[4]
  for _, value in ipairs(redis.call("HVALS", "claims:" .. c[2])) do
    local m, p = string.match(value, "(%d+) (%d+)")
    memory = memory + tonumber(m)
    cpu = cpu + tonumber(p)
  end
  if memory > c[5] then
    return "memory"
  end
  if cpu > c[6] then
    return "cpu"
  end
  return nil
end

for _, check in ipairs(request.checks) do
  local problem = checks[check[1]](check)
  if problem then
    return refuse(check[1], problem)
  end
end

local stored = {}
for i, write in ipairs(request.writes) do
  local value = redis.call("HGET", "resources:" .. write.kind, write.key)
  local version, created = 0, 0
  if value then
    version, created = string.match(value, "^(%d+) (%d+) ")
    version, created = tonumber(version), tonumber(created)
  end
  if version ~= write.expected then
    return refuse("version", write.kind .. " " .. write.key)
  end
  stored[i] = created
end

local answer = {"ok"}
if request.dry then
  for _, write in ipairs(request.writes) do
    answer[#answer + 1] = write.expected
  end
  return answer
end
for i, write in ipairs(request.writes) do
  local version = redis.call("INCR", "version")
  local created = stored[i]
  local change = "MODIFIED"
  local body = write.body
  if not body then
    change = "DELETED"
    body = write.last
    redis.call("HDEL", "resources:" .. write.kind, write.key)
  else
    if created == 0 then
      created = version
      change = "ADDED"
    end
    redis.call("HSET", "resources:" .. write.kind, write.key,
      string.format("%d %d ", version, created) .. body)
  end
  redis.call("XADD", "changes", "MAXLEN", "~", 100000, string.format("%d-0", version),
    "type", change, "kind", write.kind, "key", write.key, "created", string.format("%d", created), "body", body)
  answer[#answer + 1] = version
end

for _, effect in ipairs(request.effects) do
  if effect[1] == "DEADLINE" then
    redis.call("ZADD", effect[2], now_ms() + effect[4], effect[3])
  elseif effect[1] == "SKIP" then
    local version = redis.call("INCRBY", "version", effect[2])
    redis.call("XADD", "changes", "MAXLEN", "~", 100000, string.format("%d-0", version), "type", "SKIPPED")
  else
    redis.call(unpack(effect))
  end
end

redis.call("SET", request_key, cjson.encode(answer), "PX", 600000)
return answer
