#!lua flags=allow-oom
-- A node renews its lease; the time is Redis's own. A full Redis takes it: it grows by nothing.
-- KEYS: lease.  ARGV: JSON of the lease, kept for ms, node, boot id, generation, sequence, created, version of the
-- membership held, SHA1 of the peer key held
-- What the control plane publishes is not among the KEYS: the node may only read it (see claim.lua).
-- Answers JSON {refused, suspicions, membership, peer_key, disarm}; see orchestrator/lease.py.
local node, boot, generation = ARGV[3], ARGV[4], ARGV[5]
local sequence, created = tonumber(ARGV[6]), tonumber(ARGV[7])

local function answer(refused)
  local suspicions = {}
  local open = redis.call("HGETALL", "suspicions")
  for i = 1, #open, 2 do
    if open[i] ~= node then
      suspicions[open[i]] = string.match(open[i + 1], "^%S+")
    end
  end
  local membership = redis.call("GET", "membership") or ""
  if string.match(membership, '^{"version":(%d+),') == ARGV[8] then
    membership = ""
  end
  local key = redis.call("GET", "peer-key") or ""
  if redis.sha1hex(key) == ARGV[9] then
    key = ""
  end
  local disarm = redis.call("GET", "disarm:" .. node) or ""
  return cjson.encode({refused = refused, suspicions = suspicions, membership = membership, peer_key = key,
    disarm = disarm})
end

-- TAKEOVER.md, rule 4: what was taken over never renews again. By its boot, as a process that was started again
-- on the same boot has another generation and the same guests.
local taken = redis.call("GET", "taken-over:" .. node)
if taken then
  local taken_boot, taken_generation = string.match(taken, "^(%S+) (%S+)$")
  if boot == taken_boot or generation == taken_generation then
    return answer("taken over")
  end
end

-- A renewal that was under way when its process died, and comes after the next one's: it would put times and an
-- `armed` on record that hold no more. Both were stamped by one clock, as it is one boot.
local text = redis.call("GET", KEYS[1])
if text then
  local ok, old = pcall(cjson.decode, text)
  if ok and type(old) == "table" and old.boot_id == boot then
    local is_same = old.generation == generation and tonumber(old.sequence) == sequence
    if (tonumber(old.created) or 0) >= created and not is_same then
      return answer("outdated")
    end
  end
end

local time = redis.call("TIME")
local renewed = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
-- Spliced, not encoded anew: cjson would write an empty list as an object.
redis.call("SET", KEYS[1], string.format('{"renewed_ms":%.0f,', renewed) .. string.sub(ARGV[1], 2), "PX", ARGV[2])
return answer("")
