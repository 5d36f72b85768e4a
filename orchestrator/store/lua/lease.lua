-- A node renews its lease; the time is Redis's own. KEYS: lease.  ARGV: JSON of the lease, kept for ms
local lease = cjson.decode(ARGV[1])
local time = redis.call("TIME")
lease.renewed_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call("SET", KEYS[1], cjson.encode(lease), "PX", ARGV[2])
return 1
