-- One instant's copy of some kinds. ARGV: kinds.  Answers {version, run id, {key, document, ...} per kind}
local answer = {tonumber(redis.call("GET", "version") or "0"),
  string.match(redis.call("INFO", "server"), "run_id:(%x+)")}
for _, kind in ipairs(ARGV) do
  answer[#answer + 1] = redis.call("HGETALL", "resources:" .. kind)
end
return answer
