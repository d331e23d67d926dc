"""The Lua functions of the store. Each touches the keys of one stream only, so that they run on a cluster too.

Ownership: the state hash holds the `epoch` (how many owners the stream has had) and the `claim` (a random token of the
current one). `owned` is false as soon as a newer epoch, or another claim of the same epoch, stands there; a missing or
lower epoch (the server came back without its last second) does not refuse the owner, whose next renewal restores it.
"""

from __future__ import annotations

_OWNED = """
local function owned(state, epoch, claim)
  local now = redis.call('HMGET', state, 'epoch', 'claim')
  local stored = tonumber(now[1] or '0')
  if stored > tonumber(epoch) then return false end
  return stored < tonumber(epoch) or now[2] == claim
end
"""

_LAST_ID = """
local function last_id(key)
  if redis.call('EXISTS', key) == 0 then return '0-0' end
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
  return '0-0'
end
local function parse(id)
  local high, low = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(high), tonumber(low)
end
local function above(a, b)
  local a_high, a_low = parse(a)
  local b_high, b_low = parse(b)
  return a_high > b_high or (a_high == b_high and a_low > b_low)
end
"""

_NOW_MS = """
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
"""

CANARY = "return redis.call('SET', KEYS[1], ARGV[1], 'EX', 60)"
"""KEYS: canary. ARGV: value. Proves that scripts run and writes are taken."""

CLAIM = (
    _NOW_MS
    + """
local old = redis.call('HMGET', KEYS[1], 'epoch', 'claim', 'lease_until_ms', 'owner', 'state')
local epoch = tonumber(old[1] or '0')
if old[2] ~= ARGV[1] then
  if ARGV[3] == '0' and old[5] == 'live' and tonumber(old[3] or '0') > now_ms() then
    return {'live', tostring(epoch), old[4] or ''}
  end
  epoch = epoch + 1
end
redis.call('HSET', KEYS[1], 'epoch', epoch, 'claim', ARGV[1], 'state', 'live', 'lease_until_ms', now_ms() + ARGV[2])
redis.call('HDEL', KEYS[1], 'ended_at')
for i = 4, #ARGV, 2 do
  if ARGV[i] == 'started_at' or ARGV[i] == 'anchors' then
    redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
redis.call('PERSIST', KEYS[1])
return {'claimed', tostring(epoch), ''}
"""
)
"""KEYS: state. ARGV: claim, lease_ms, is_takeover_allowed, then field and value pairs.

Returns {'claimed', epoch, ''}, or {'live', epoch, owner} if somebody else's lease runs and may not be taken over.
Saying it again with the same claim changes nothing. The first owner's `started_at` and `anchors` stay.
"""

INDEX = (
    _NOW_MS
    + _LAST_ID
    + """
for _, entry in ipairs(redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 64)) do
  local old = {}
  for i = 1, #entry[2], 2 do old[entry[2][i]] = entry[2][i + 1] end
  if old.stream == ARGV[1] and old.epoch == ARGV[2] then return 0 end
end
local high, low = parse(last_id(KEYS[1]))
local now = now_ms()
if now > high then high, low = now, 0 else low = low + 1 end
local id = string.format('%.0f-%.0f', high, low)
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[4], id, 'stream', ARGV[1], 'epoch', ARGV[2], 'started_at', ARGV[3])
return 1
"""
)
"""KEYS: index. ARGV: stream, epoch, started_at, maxlen. Returns 1, or 0 when this claim is indexed already."""

LAST_IDS = (
    _LAST_ID
    + """
local ids = {}
for i = 1, #KEYS do ids[i] = last_id(KEYS[i]) end
return ids
"""
)
"""KEYS: streams. Returns the id last generated in each, '0-0' for none; trimmed entries count."""

WRITE = (
    _OWNED
    + _LAST_ID
    + """
if not owned(KEYS[1], ARGV[1], ARGV[2]) then return {'fenced'} end
local statuses = {}
local at = 4
for n = 2, #KEYS do
  local id, previous, maxlen, covers, count = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], tonumber(ARGV[at + 4])
  local entry = {}
  local new = {}
  for i = at + 5, at + 4 + count, 2 do
    entry[#entry + 1] = ARGV[i]
    entry[#entry + 1] = ARGV[i + 1]
    new[ARGV[i]] = ARGV[i + 1]
  end
  at = at + 5 + count
  local last = last_id(KEYS[n])
  if above(id, last) then
    if maxlen == '0' then
      redis.call('XADD', KEYS[n], id, unpack(entry))
    else
      redis.call('XADD', KEYS[n], 'MAXLEN', '~', maxlen, id, unpack(entry))
    end
    if last == '0-0' then redis.call('PEXPIRE', KEYS[n], ARGV[3]) end
    if covers ~= '' then
      local old = redis.call('HMGET', KEYS[1], 'covered_ms', 'last_utterance')
      redis.call('HSET', KEYS[1], 'covered_ms', math.max(tonumber(old[1] or '0'), tonumber(covers)),
        'last_utterance', math.max(tonumber(old[2] or '0'), tonumber(new.utterance)),
        'last_final_at', new.emitted_at)
    end
    statuses[n - 1] = above(previous, last) and 'written after loss' or 'written'
  else
    local stored = redis.call('XRANGE', KEYS[n], id, id)
    statuses[n - 1] = 'duplicate'
    if stored[1] then
      local old = {}
      for i = 1, #stored[1][2], 2 do old[stored[1][2][i]] = stored[1][2][i + 1] end
      if old.text ~= new.text or old.kind ~= new.kind then statuses[n - 1] = 'differing' end
    end
  end
end
return statuses
"""
)
"""KEYS: state, then the target of each entry. ARGV: epoch, claim, ttl_ms, then for each entry: id, id of this owner's
entry before it in the same key ('0-0' for none), maxlen (0: not trimmed), end_ms if the entry covers media for good
(else empty), number of strings that follow, field and value strings.

Returns {'fenced'}, with nothing written, or one status an entry: 'written', 'written after loss' (the server no longer
holds what it acknowledged before), 'duplicate', 'differing' (a duplicate whose stored text or kind is another).
"""

RENEW = (
    _OWNED
    + _NOW_MS
    + """
if not owned(KEYS[1], ARGV[1], ARGV[2]) then return 0 end
if redis.call('HEXISTS', KEYS[1], 'ended_at') == 1 then return 1 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'claim', ARGV[2], 'state', 'live', 'lease_until_ms', now_ms() + ARGV[3])
for i = 4, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""
)
"""KEYS: state. ARGV: epoch, claim, lease_ms, then field and value pairs. Returns 1, or 0 when fenced.

A renewal that arrives after the end changes nothing.
"""

END = (
    _OWNED
    + """
if not owned(KEYS[1], ARGV[1], ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'claim', ARGV[2], 'state', ARGV[4], 'ended_at', ARGV[5])
redis.call('HDEL', KEYS[1], 'lease_until_ms')
for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
return 1
"""
)
"""KEYS: state, the stream's other keys. ARGV: epoch, claim, ttl_ms, state, ended_at. Returns 1, or 0 when fenced."""

TRIM = (
    _OWNED
    + """
if not owned(KEYS[1], ARGV[1], ARGV[2]) then return -1 end
local num_trimmed = 0
for n = 2, #KEYS do
  local entries = redis.call('XRANGE', KEYS[n], '-', '+', 'COUNT', ARGV[5])
  local last_expired = nil
  for _, entry in ipairs(entries) do
    local emitted_at = nil
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'emitted_at' then emitted_at = entry[2][i + 1] end
    end
    if not emitted_at or emitted_at >= ARGV[4] then break end
    last_expired = entry[1]
  end
  if last_expired then
    local high, low = string.match(last_expired, '^(%d+)-(%d+)$')
    num_trimmed = num_trimmed + redis.call('XTRIM', KEYS[n], 'MINID', high .. '-' .. string.format('%.0f', low + 1))
  end
  redis.call('PEXPIRE', KEYS[n], ARGV[3])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return num_trimmed
"""
)
"""KEYS: state, then streams. ARGV: epoch, claim, ttl_ms, `emitted_at` before which entries go, how many to look at.

Returns how many entries went, or -1 when fenced. Every key's time to live starts anew: a stream whose owner died
disappears by itself once its last entry is older than the retention.
"""
