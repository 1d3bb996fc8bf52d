"""What the Redis provider has the server do, in one step each: scripts, called for every request but a plain read.

Keys, all of one namespace and so of one cluster slot: `v`, a hash of the entries; `k`, a sorted set of their keys, all
scores 0, for the order; `d`, a sorted set of keys by deadline; `s`, a stream, the log, whose ids are `<revision>-0`;
`m`, a hash: epoch, revision, time of the record at that revision, layout of all this.

A record, in `v` and in `s`, is `<revision> <commit> <time> <deadline or -> <body>`. Times are microseconds since the
epoch, by the clock of the server. The body is made and read by clients only. A stream entry has the fields `o`, what
happened (`s` set, `d` delete, `x` expiry), `k`, the key, `n`, the new record (of a delete: without a value), `p`, the
record before, or nothing.

Arguments: the epoch of a new life, should one begin; the place seen, as epoch, revision, time; how many records to
remember, and for how long (0: for ever); and what the request is about. Answers begin with a word:

    done         and in the same string epoch, revision, time; then the result
    again        so much was due that the request itself was not looked at
    refused      why the server would not write; nothing was written
    ahead        a revision; the log is ahead of the epoch, it has to be given up for a new life above that revision
    conflict     index of a write, revision that is there; the one expected, if the caller last saw another life
    damaged      index of a write whose condition cannot be judged
"""

from __future__ import annotations

from hashlib import sha1
from typing import NamedTuple

__all__ = ["COMMIT", "LOG", "READ", "SCAN", "Script"]


class Script(NamedTuple):
    source: bytes
    digest: bytes


# No command newer than Redis 6.2. A server refuses to write (out of memory, read-only, ...) at the first write of a
# script or not at all, so that one is made by `pcall`, and a refusal told from a failure halfway. There are few
# functions, and a script for each request: what a script defines costs every call of it (benchmark: commit, redis).
_BEGIN = b"""
local entries, keys, deadlines, log, meta = unpack(KEYS)
local proposal, seen_epoch, seen, seen_time, history, longest = unpack(ARGV, 1, 6)
local call, match, format = redis.call, string.match, string.format
local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
local stamp = format('%.0f', now)
local state = call('HMGET', meta, 'epoch', 'revision', 'time', 'layout')
local epoch, revision, time = state[1], tonumber(state[2] or ''), state[3] or '0'
local dirty = false
seen = tonumber(seen)

if state[4] and state[4] ~= '1' then return {'refused', 'LAYOUT'} end
local sound = match(epoch or '', '^%x+$') and revision and revision < 2 ^ 53 and revision % 1 == 0
local lost = not sound or revision < seen
if not lost and epoch == seen_epoch and seen_time ~= '0' then
  local stands = time
  if seen < revision then
    local at = format('%.0f-0', seen)
    local found = call('XRANGE', log, at, at)[1]
    stands = found and match(found[2][6] or '', '^%d+ %d+ (%d+) ') or '0'
  end
  lost = stands ~= '0' and stands ~= seen_time
end
if lost then
  local highest, logged = seen, 0
  if call('EXISTS', log) == 1 then
    local info = call('XINFO', 'STREAM', log)
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then logged = tonumber(match(info[i + 1], '^%d+')) end
    end
  end
  if logged > highest and logged < 2 ^ 53 then highest = logged end
  if revision and revision > highest and revision < 2 ^ 53 then highest = math.floor(revision) end
  epoch, revision, time = proposal, highest, '0'
  local at = format('%.0f', revision)
  local made = redis.pcall('HSET', meta, 'epoch', epoch, 'revision', at, 'time', '0', 'layout', '1')
  if type(made) == 'table' then return {'refused', made.err} end
  call('DEL', log)
  dirty = true
end

local function add(op, key, new, old)
  local id, write = format('%.0f-0', revision), dirty and call or redis.pcall
  local added = write('XADD', log, 'MAXLEN', '~', history, id, 'o', op, 'k', key, 'n', new, 'p', old or '')
  dirty = true
  if type(added) ~= 'table' then return nil end
  if string.find(added.err, 'ID specified', 1, true) then return {'ahead', revision} end
  return {'refused', added.err}
end

local before = revision
local due = call('ZRANGEBYSCORE', deadlines, '-inf', stamp, 'LIMIT', 0, 1001)
if #due > 0 then
  for i = 1, math.min(#due, 1000) do
    local key = due[i]
    local old = call('HGET', entries, key)
    if old and match(old, '^%d+ %d+ %d+ (%S+) ') ~= '-' then
      revision = revision + 1
      local at = format('%.0f', revision)
      local failed = add('x', key, at .. ' ' .. at .. ' ' .. stamp .. ' - ', old)
      if failed then return failed end
      call('HDEL', entries, key)
      call('ZREM', keys, key)
      time = stamp
    end
    call('ZREM', deadlines, key)
    dirty = true
  end
  call('HSET', meta, 'revision', format('%.0f', revision), 'time', time)
  if #due > 1000 then return {'again'} end
end
"""
_PLACE = b"format('done %s %.0f %.0f', epoch, revision, tonumber(time) or 0)"

# Of each write: what (`s`, `d`; `c`: only its condition), key, the revision it has to have or nothing, ttl (nothing,
# `keep`, microseconds), body.
_COMMIT = b"""
local olds, changing = {}, 0
for at = 7, #ARGV, 5 do
  local op, expected, old = ARGV[at], ARGV[at + 2], call('HGET', entries, ARGV[at + 1])
  if expected ~= '' then
    local actual = not old and '0' or match(old, '^([1-9]%d*) ')
    if not actual or #actual > 16 then return {'damaged', (at - 7) / 5} end
    local alien = actual ~= '0' and seen_epoch ~= '' and seen_epoch ~= epoch
    if actual ~= expected or alien then return {'conflict', (at - 7) / 5, actual} end
  end
  olds[at] = old
  if op == 's' or (op == 'd' and old) then changing = changing + 1 end
end

local last = format('%.0f', revision + changing)
local answer = {}
for at = 7, #ARGV, 5 do
  local op, key, _, ttl, body = unpack(ARGV, at, at + 4)
  local old, result = olds[at], '-'
  if op == 's' or (op == 'd' and old) then
    revision = revision + 1
    result = format('%.0f', revision)
    local had, expires = not old and '-' or match(old, '^%d+ %d+ %d+ (%S+) '), '-'
    if ttl == 'keep' then
      if had and #had <= 16 and match(had, '^%d+$') then expires = had end
    elseif ttl ~= '' then
      expires = format('%.0f', now + ttl)
    end
    local new = format('%.0f ', revision) .. last .. ' ' .. stamp .. ' ' .. expires .. ' ' .. body
    local failed = add(op, key, new, old)
    if failed then return failed end
    if op == 's' then
      call('HSET', entries, key, new)
      if not old then call('ZADD', keys, 0, key) end
    else
      call('HDEL', entries, key)
      call('ZREM', keys, key)
    end
    if expires ~= had then
      if expires == '-' then call('ZREM', deadlines, key) else call('ZADD', deadlines, expires, key) end
    end
  end
  answer[#answer + 1] = result
end

if changing > 0 then
  time = stamp
  call('HSET', meta, 'revision', last, 'time', stamp)
  if longest ~= '0' and math.floor(before / 16) < math.floor(revision / 16) then
    for _ = 1, 8 do
      local old
      for _, logged in ipairs(call('XRANGE', log, '-', '+', 'COUNT', 8)) do
        local written = match(logged[2][6] or '', '^%d+ %d+ (%d+) ') or '0'
        if tonumber(written) >= now - longest then break end
        old = logged[1]
      end
      if not old then break end
      call('XTRIM', log, 'MINID', format('%.0f', match(old, '^%d+') + 1))
    end
  end
end
return PLACE .. ' ' .. table.concat(answer, ' ')
"""

# At most so many (-1: all); `keys` and these, or `range` and its bounds.
_SCAN = b"""
local limit, wanted, answer, found = tonumber(ARGV[7]), {}, {PLACE}, 0
if ARGV[8] == 'range' then
  wanted = call('ZRANGEBYLEX', keys, ARGV[9], ARGV[10], 'LIMIT', 0, limit)
else
  for i = 9, #ARGV do wanted[#wanted + 1] = ARGV[i] end
end
for first = 1, #wanted, 1000 do
  local last = math.min(first + 999, #wanted)
  for i, record in ipairs(call('HMGET', entries, unpack(wanted, first, last))) do
    if record and found ~= limit then
      found = found + 1
      answer[#answer + 1] = wanted[first + i - 1]
      answer[#answer + 1] = record
    end
  end
end
return answer
"""

# The key.
_READ = b"""
return {PLACE, call('HGET', entries, ARGV[7])}
"""

# The first id. The result: the oldest revision and the microseconds to the next deadline, or nothing; stream entries.
_LOG = b"""
local answer, from, size = {PLACE}, ARGV[7], 0
local oldest = call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
local next_due = call('ZRANGE', deadlines, 0, 0, 'WITHSCORES')[2]
answer[2] = oldest and match(oldest[1], '^%d+') or false
answer[3] = next_due and format('%.0f', next_due - now) or false
repeat
  local some = call('XRANGE', log, from, '+', 'COUNT', 16)
  for _, logged in ipairs(some) do
    answer[#answer + 1] = logged
    size = size + #(logged[2][6] or '') + #(logged[2][8] or '')
    from = '(' .. logged[1]
  end
until #some < 16 or #answer >= 500 or size >= 1048576
return answer
"""


def _script(rest: bytes) -> Script:
    source = _BEGIN + rest.replace(b"PLACE", _PLACE)
    return Script(source, sha1(source).hexdigest().encode())


COMMIT, LOG, READ, SCAN = _script(_COMMIT), _script(_LOG), _script(_READ), _script(_SCAN)
