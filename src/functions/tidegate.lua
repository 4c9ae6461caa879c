#!lua name=tidegate_1

-- Counters that may vanish, and cached rows: each function is one atomic step of the reading and producing side (docs/functions.md).
--
-- A counter is absent; or clean: it equals PostgreSQL, has a TTL and may be evicted; or dirty: the id of its last entry stands in the index, and
-- it has no TTL. A value is disposable at any instant: what it lacks stands in the stream, and what the stream lacks stands in PostgreSQL.
--
-- Every reply is an array that begins with one of these numbers. Amounts and values are texts: a number of this language is exact to 53 bits.
local DONE, BLIND, SEEN, MISS, BUSY, CLOSED, REFUSED, LOST, JUDGE = 1, 2, 3, 4, 5, 6, 7, 8, 9

local function parts(id)
  local dash = string.find(id, '-', 1, true)
  return string.sub(id, 1, dash - 1), string.sub(id, dash + 1)
end

-- Whole numbers without a sign, as texts.
local function less(a, b)
  return #a < #b or (#a == #b and a < b)
end

local function before(a, b)
  local a_ms, a_seq = parts(a)
  local b_ms, b_seq = parts(b)
  return less(a_ms, b_ms) or (a_ms == b_ms and less(a_seq, b_seq))
end

-- The id right behind this one. Where a number of this language could not hold it, this id itself: the last entry then counts as unsettled.
local function after(id)
  local ms, seq = parts(id)
  if #seq > 15 then return id end
  return ms .. '-' .. string.format('%.0f', seq + 1)
end

-- Whole numbers with a sign, as texts.
local function lower(a, b)
  local a_negative, b_negative = string.sub(a, 1, 1) == '-', string.sub(b, 1, 1) == '-'
  if a_negative ~= b_negative then return a_negative end
  if a_negative then return less(string.sub(b, 2), string.sub(a, 2)) end
  return less(a, b)
end

-- Whether INCRBY would take this amount: it is asked where there is no counter to try it on.
local function is_amount(text)
  if text == '0' then return true end
  if not string.match(text, '^%-?[1-9]%d*$') then return false end
  return not lower(text, '-9223372036854775808') and not lower('9223372036854775807', text)
end

-- Takes an INCRBY back.
local function undo(counter, amount)
  if amount == '-9223372036854775808' then
    redis.call('INCRBY', counter, '9223372036854775807')
    redis.call('INCRBY', counter, '1')
  else
    redis.call('DECRBY', counter, amount)
  end
end

local function exact(counter, number)
  if number > -9007199254740992 and number < 9007199254740992 then return string.format('%.0f', number) end
  return redis.call('GET', counter)
end

-- The group's frontier: every entry below it is settled. Both terms are needed: behind a rewind the oldest pending entry can lie above the last
-- one that was delivered. Nothing where there is no stream or no group: then nothing is known.
local function frontier(stream, group)
  local pending = redis.pcall('XPENDING', stream, group)
  if pending.err then
    -- A missing permission must be heard, and not be taken for a missing group.
    if not string.find(pending.err, 'NOGROUP', 1, true) then error(pending) end
    return nil
  end
  local at
  for _, told in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local about = {}
    for i = 1, #told, 2 do about[told[i]] = told[i + 1] end
    if about['name'] == group then at = after(about['last-delivered-id']) end
  end
  if tonumber(pending[1]) > 0 and before(pending[2], at) then at = pending[2] end
  return at
end

-- The gate: values may be put in place while a daemon manages this shard, nobody has asked to drop all values, and the group does not stand before
-- where it once stood. A rewound group closes it until it has caught up.
local function gate(stream, state, group)
  local at = frontier(stream, group)
  local known = redis.call('HMGET', state, 'settled', 'lineage', 'witness', 'closed', 'epoch')
  local open = at and known[2] and not known[4] and not before(at, known[1] or '0-0')
  return at, open, known
end

-- Leave to bring one counter's value from PostgreSQL. The lease is a list: who holds it, up to which entry it must wait, and in which epoch of the
-- shard; then a note for each increment meanwhile.
local function grant(lease, stream, index, state, id, group, lease_ms, token)
  local at, open, known = gate(stream, state, group)
  if not open then return { CLOSED } end
  local left = redis.call('PTTL', lease)
  if left > 0 then return { BUSY, left } end
  local last = redis.call('HGET', index, id) or '0-0'
  redis.call('RPUSH', lease, token .. ' ' .. last .. ' ' .. (known[5] or '0'))
  redis.call('PEXPIRE', lease, lease_ms)
  return { MISS, before(last, at) and 1 or 0, known[2], known[3] or '' }
end

-- The entry up to which the holder must wait, and the epoch of its lease; nothing if the lease is not its own.
local function holds(lease, token)
  local holder, last, epoch = string.match(redis.call('LINDEX', lease, 0) or '', '^(%S+) (%S+) (%S+)$')
  if holder == token then return last, epoch end
end

-- keys: counter lease stream index state; args: id amount lane seq want group lease_ms token [floor key_field value_field [field value]...]
redis.register_function('tidegate_1_incr', function(keys, args)
  local counter, lease, stream, index, state = keys[1], keys[2], keys[3], keys[4], keys[5]
  local id, amount, lane, seq, floor = args[1], args[2], args[3], args[4], args[9] or ''
  if lane ~= '' then
    local last = redis.call('HGET', state, 'lane:' .. lane)
    if last and not less(last, seq) then return { SEEN, redis.call('GET', counter) or '' } end
  end
  local was = redis.call('HGET', index, id)
  local value
  if redis.call('EXISTS', counter) == 1 then
    local sum = redis.pcall('INCRBY', counter, amount)
    if type(sum) == 'table' then return sum end
    value = exact(counter, sum)
    if floor ~= '' and lower(value, floor) then
      undo(counter, amount)
      return { REFUSED, redis.call('GET', counter) }
    end
  else
    -- A floor cannot be kept by who does not know the value.
    if args[5] == '1' or floor ~= '' then return grant(lease, stream, index, state, id, args[6], args[7], args[8]) end
    if not is_amount(amount) then return redis.error_reply('ERR value is not an integer or out of range') end
  end
  -- The mark t says that the index knows this entry; one without it is a stranger's.
  local fields = { args[10] or 'id', id, args[11] or 'amount', amount, 't', '1' }
  if lane ~= '' then
    fields[7], fields[8] = 'op', lane .. '-' .. seq
  end
  for i = 12, #args do fields[#fields + 1] = args[i] end
  local entry = redis.pcall('XADD', stream, '*', unpack(fields))
  if type(entry) == 'table' then
    if value then undo(counter, amount) end
    return entry
  end
  redis.call('HSET', index, id, entry)
  -- A clean counter always has a TTL: one without was made by a stranger.
  if value and not was and redis.call('PERSIST', counter) == 0 then
    redis.call('UNLINK', counter)
    value = nil
  end
  -- Whoever is bringing the value must know of this entry.
  if not value and redis.call('EXISTS', lease) == 1 then redis.call('RPUSH', lease, entry .. ' ' .. amount) end
  if lane ~= '' then redis.call('HSET', state, 'lane:' .. lane, seq) end
  if value then return { DONE, value } end
  return { BLIND }
end)

-- Many increments as one operation of a lane, each accepted, all or none. keys: stream index state (counter lease)...;
-- args: lane seq key_field value_field (id amount)...; answers the values, '' where a counter is absent
redis.register_function('tidegate_1_incr_many', function(keys, args)
  local stream, index, state, lane, seq = keys[1], keys[2], keys[3], args[1], args[2]
  if lane ~= '' then
    local last = redis.call('HGET', state, 'lane:' .. lane)
    if last and not less(last, seq) then return { SEEN } end
  end
  local count, values = (#keys - 3) / 2, {}
  local function take_back(from)
    for i = from, 1, -1 do
      if values[i] then undo(keys[2 * i + 2], args[2 * i + 4]) end
    end
  end
  for i = 1, count do
    local counter, amount = keys[2 * i + 2], args[2 * i + 4]
    local refusal
    if redis.call('EXISTS', counter) == 1 then
      local sum = redis.pcall('INCRBY', counter, amount)
      if type(sum) == 'table' then refusal = sum else values[i] = exact(counter, sum) end
    elseif is_amount(amount) then
      values[i] = false
    else
      refusal = redis.error_reply('ERR value is not an integer or out of range')
    end
    if refusal then
      take_back(i - 1)
      return refusal
    end
  end
  local reply, dropped = { DONE }, {}
  for i = 1, count do
    local counter, lease, id, amount = keys[2 * i + 2], keys[2 * i + 3], args[2 * i + 3], args[2 * i + 4]
    local fields = { args[3], id, args[4], amount, 't', '1' }
    if lane ~= '' then
      fields[7], fields[8] = 'op', lane .. '-' .. seq .. '-' .. i
    end
    local entry = redis.pcall('XADD', stream, '*', unpack(fields))
    if type(entry) == 'table' then
      -- Only the first one can be refused: what refuses later ones would have refused it.
      if i == 1 then take_back(count) end
      return entry
    end
    local fresh = redis.call('HSET', index, id, entry)
    if values[i] and fresh == 1 and redis.call('PERSIST', counter) == 0 then
      redis.call('UNLINK', counter)
      dropped[counter] = true
    end
    local value = not dropped[counter] and values[i] or ''
    if value == '' and redis.call('EXISTS', lease) == 1 then redis.call('RPUSH', lease, entry .. ' ' .. amount) end
    reply[i + 1] = value
  end
  if lane ~= '' then redis.call('HSET', state, 'lane:' .. lane, seq) end
  return reply
end)

-- keys: counter lease stream index state; args: id group lease_ms token
redis.register_function('tidegate_1_lease', function(keys, args)
  local value = redis.call('GET', keys[1])
  if value then return { DONE, value } end
  return grant(keys[2], keys[3], keys[4], keys[5], args[1], args[2], args[3], args[4])
end)

-- Whether the holder may read PostgreSQL; renews the lease. keys: lease stream state; args: token group lease_ms
redis.register_function('tidegate_1_ready', function(keys, args)
  local last = holds(keys[1], args[1])
  if not last then return { LOST } end
  local at, open = gate(keys[2], keys[3], args[2])
  if not open then return { CLOSED } end
  redis.call('PEXPIRE', keys[1], args[3])
  return { before(last, at) and DONE or BUSY }
end)

-- Puts a value in place. `judged` is how many notes the base contains already, -1 at first: where there are notes, they are handed out to be judged.
-- keys: counter lease stream index state; args: id token base judged ttl_ms group
redis.register_function('tidegate_1_install', function(keys, args)
  local counter, lease, stream, index, state = keys[1], keys[2], keys[3], keys[4], keys[5]
  local id, token, base, judged, ttl = args[1], args[2], args[3], tonumber(args[4]), args[5]
  local last, epoch = holds(lease, token)
  if not last then return { LOST } end
  local _, open, known = gate(stream, state, args[6])
  if not open then return { CLOSED } end
  if epoch ~= (known[5] or '0') then return { LOST } end
  local notes = redis.call('LRANGE', lease, 1, -1)
  if judged < 0 and #notes > 0 then return { JUDGE, table.concat(notes, ' ') } end
  redis.call('UNLINK', lease)
  -- A stranger's.
  if redis.call('EXISTS', counter) == 1 then
    redis.call('UNLINK', counter)
    return { LOST }
  end
  redis.call('SET', counter, base)
  for i = math.max(judged, 0) + 1, #notes do
    local sum = redis.pcall('INCRBY', counter, string.match(notes[i], ' (.+)$'))
    if type(sum) == 'table' then
      redis.call('UNLINK', counter)
      return sum
    end
  end
  if redis.call('HEXISTS', index, id) == 0 then redis.call('PEXPIRE', counter, ttl) end
  return { DONE, redis.call('GET', counter) }
end)

-- The holder gives up. keys: lease; args: token
redis.register_function{ function_name = 'tidegate_1_release', flags = { 'allow-oom' }, callback = function(keys, args)
  if not holds(keys[1], args[1]) then return { LOST } end
  redis.call('UNLINK', keys[1])
  return { DONE }
end }

-- Counters whose last entry lies below the frontier become clean. keys: stream index state counter...; args: group (id ttl_ms)...
redis.register_function{ function_name = 'tidegate_1_settle', flags = { 'allow-oom' }, callback = function(keys, args)
  local stream, index, state, count = keys[1], keys[2], keys[3], 0
  local at, open, known = gate(stream, state, args[1])
  if not open then return { CLOSED, 0 } end
  local witness = known[3]
  for i = 4, #keys do
    local id, ttl = args[2 * i - 6], args[2 * i - 5]
    local last = redis.call('HGET', index, id)
    if last and before(last, at) then
      redis.call('HDEL', index, id)
      redis.call('PEXPIRE', keys[i], ttl)
      if not witness or before(witness, last) then witness = last end
      count = count + 1
    end
  end
  redis.call('HSET', state, 'settled', at)
  if witness then redis.call('HSET', state, 'witness', witness) end
  return { DONE, count }
end }

-- Drops values and the leases on them: those of clean counters, or with force = 1 of dirty ones, too. Nothing where the shard is not managed yet: nobody
-- would bring them back. keys: index state (counter lease)...; args: force id...
redis.register_function{ function_name = 'tidegate_1_drop', flags = { 'allow-oom' }, callback = function(keys, args)
  local index, count = keys[1], 0
  if redis.call('HEXISTS', keys[2], 'lineage') == 0 then return { CLOSED, 0 } end
  for i = 3, #keys, 2 do
    if args[1] == '1' or redis.call('HEXISTS', index, args[(i + 1) / 2]) == 0 then
      count = count + redis.call('UNLINK', keys[i])
      redis.call('UNLINK', keys[i + 1])
    end
  end
  return { DONE, count }
end }

-- A daemon begins to manage a shard. keys: stream state; args: lineage mode, which is 'open', 'adopt' (the stream had entries before it was managed) or
-- 'accept' (another PostgreSQL than before, on somebody's word)
redis.register_function{ function_name = 'tidegate_1_open', flags = { 'allow-oom' }, callback = function(keys, args)
  local stream, state, lineage, mode = keys[1], keys[2], args[1], args[2]
  local before_it = redis.call('HGET', state, 'lineage')
  if before_it == lineage then return { DONE, redis.call('HGET', state, 'closed') or '' } end
  if before_it then
    if mode ~= 'accept' then return { REFUSED, before_it } end
    redis.call('HSET', state, 'lineage', lineage, 'closed', 'another PostgreSQL')
    return { DONE, 'another PostgreSQL' }
  end
  local last = '0-0'
  if redis.call('EXISTS', stream) == 1 then
    local told = redis.call('XINFO', 'STREAM', stream)
    for i = 1, #told, 2 do
      if told[i] == 'last-generated-id' then last = told[i + 1] end
    end
  end
  if last == '0-0' then
    redis.call('HSET', state, 'lineage', lineage)
    return { DONE, '' }
  end
  if mode == 'open' then return { MISS } end
  redis.call('HSET', state, 'lineage', lineage, 'settled', after(last), 'closed', 'adopted')
  return { DONE, 'adopted' }
end }

-- All values are in doubt: the gate closes until a daemon has dropped them. keys: state; args: why
redis.register_function{ function_name = 'tidegate_1_close', flags = { 'allow-oom' }, callback = function(keys, args)
  if redis.call('EXISTS', keys[1]) == 0 then return { LOST } end
  redis.call('HSET', keys[1], 'closed', args[1])
  return { DONE }
end }

-- All values were dropped, because of `why` and nothing later: the gate opens, in a new epoch, in which no lease of the one before counts.
-- keys: state; args: why
redis.register_function{ function_name = 'tidegate_1_reopen', flags = { 'allow-oom' }, callback = function(keys, args)
  if redis.call('HGET', keys[1], 'closed') ~= args[1] then return { LOST } end
  redis.call('HDEL', keys[1], 'closed', 'witness')
  redis.call('HINCRBY', keys[1], 'epoch', 1)
  return { DONE }
end }

-- keys: stream index state; args: group; answers DONE or CLOSED, the frontier, how far the shard was once settled, how many counters are dirty, and
-- why the gate was closed, if somebody closed it
redis.register_function{ function_name = 'tidegate_1_status', flags = { 'no-writes' }, callback = function(keys, args)
  local at, open, known = gate(keys[1], keys[3], args[1])
  return { open and DONE or CLOSED, at or '', known[1] or '', redis.call('HLEN', keys[2]), known[4] or '', known[2] or '' }
end }

-- Cached rows. The value is what was stored, plain bytes; '' stands for a row that is known to be missing. The lease key holds 'r TOKEN' (one reader
-- is loading), 'w0 TOKEN;' (one writer is between fence and lift), or 'w1 TOKEN;TOKEN;' (several have met).

-- A value that has less than early_ms to live may be loaded again already. keys: value lease; args: token lease_ms early_ms
redis.register_function('tidegate_1_load', function(keys, args)
  if redis.call('PTTL', keys[1]) > tonumber(args[3]) then return { DONE, redis.call('GET', keys[1]) } end
  local held = redis.call('GET', keys[2])
  if held then return { string.sub(held, 1, 1) == 'w' and CLOSED or BUSY, redis.call('PTTL', keys[2]) } end
  redis.call('SET', keys[2], 'r ' .. args[1], 'PX', args[2])
  return { MISS }
end)

-- keys: value lease; args: token bytes ttl_ms
redis.register_function('tidegate_1_store', function(keys, args)
  if redis.call('GET', keys[2]) ~= 'r ' .. args[1] then return { LOST } end
  redis.call('SET', keys[1], args[2], 'PX', args[3])
  redis.call('UNLINK', keys[2])
  return { DONE }
end)

-- The reader gives up. keys: lease; args: token
redis.register_function{ function_name = 'tidegate_1_unload', flags = { 'allow-oom' }, callback = function(keys, args)
  if redis.call('GET', keys[1]) ~= 'r ' .. args[1] then return { LOST } end
  redis.call('UNLINK', keys[1])
  return { DONE }
end }

-- Before a writer's COMMIT, and again to renew it: nothing old may be read from here, and nothing may be put in place.
-- keys: (value lease)...; args: token fence_ms
redis.register_function{ function_name = 'tidegate_1_fence', flags = { 'allow-oom' }, callback = function(keys, args)
  for i = 1, #keys, 2 do
    local met, writers = string.match(redis.call('GET', keys[i + 1]) or '', '^w(%d) (.+)$')
    if writers and string.find(writers, args[1] .. ';', 1, true) then
      if redis.call('PTTL', keys[i + 1]) < tonumber(args[2]) then redis.call('PEXPIRE', keys[i + 1], args[2]) end
    else
      local left = writers and redis.call('PTTL', keys[i + 1]) or 0
      local held = (writers and 'w1 ' .. writers or 'w0 ') .. args[1] .. ';'
      redis.call('SET', keys[i + 1], held, 'PX', math.max(left, tonumber(args[2])))
    end
    redis.call('UNLINK', keys[i])
  end
  return { DONE }
end }

-- After the writer's COMMIT or ROLLBACK. A writer that met no other may leave the new value. keys: value lease; args: token [bytes ttl_ms]
redis.register_function{ function_name = 'tidegate_1_lift', flags = { 'allow-oom' }, callback = function(keys, args)
  redis.call('UNLINK', keys[1])
  local met, writers = string.match(redis.call('GET', keys[2]) or '', '^w(%d) (.+)$')
  local from, to
  if writers then from, to = string.find(writers, args[1] .. ';', 1, true) end
  if not from then
    -- Its fence had run out, and a reader may hold an old row.
    if not writers then redis.call('UNLINK', keys[2]) end
    return { LOST }
  end
  writers = string.sub(writers, 1, from - 1) .. string.sub(writers, to + 1)
  if writers ~= '' then
    redis.call('SET', keys[2], 'w1 ' .. writers, 'KEEPTTL')
    return { BUSY }
  end
  redis.call('UNLINK', keys[2])
  if met == '0' and args[3] then
    -- A full server refuses it: then the row is read from PostgreSQL the next time.
    local stored = redis.pcall('SET', keys[1], args[2], 'PX', args[3])
    if not stored.err then return { DONE } end
  end
  return { BLIND }
end }

-- Values go, and no reader that is loading puts its own in place; a writer's fence stays. keys: (value lease)...
redis.register_function{ function_name = 'tidegate_1_invalidate', flags = { 'allow-oom' }, callback = function(keys, args)
  local count = 0
  for i = 1, #keys, 2 do
    count = count + redis.call('UNLINK', keys[i])
    local held = redis.call('GET', keys[i + 1])
    if held and string.sub(held, 1, 1) == 'r' then redis.call('UNLINK', keys[i + 1]) end
  end
  return { DONE, count }
end }
