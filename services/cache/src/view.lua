-- Applies the batch of one partition to the view, if the view has the position that the batch
-- expects.
--
-- KEYS: position, completeness mark, then one profile per record.
-- ARGV: expected position ('' in a redrive), next position, the server's identity, then version and
-- JSON per record ('' is a tombstone).
-- The server had this identity when the connection was made. If it has another one by now, no read
-- accepts a mark of this call.
-- Returns {applied, duplicate, stale}, or nothing if the view has another position.

-- Versions and offsets stay text: a number in Lua is exact only up to 2^53.
local function less(a, b)
    return #a < #b or (#a == #b and a < b)
end

if ARGV[1] ~= '' and (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then
    return false
end

local applied, duplicate, stale = 0, 0, 0
for i = 3, #KEYS do
    local version, profile = ARGV[2 * i - 2], ARGV[2 * i - 1]
    local stored = redis.call('HGET', KEYS[i], 'version')
    if not stored or less(stored, version) then
        redis.call('HSET', KEYS[i], 'version', version, 'profile', profile)
        applied = applied + 1
    elseif stored == version then
        duplicate = duplicate + 1
    else
        stale = stale + 1
    end
end

-- After the profiles: an error in the middle of a script undoes nothing, and a record before the
-- position is never read again.
if ARGV[1] ~= '' then
    redis.call('SET', KEYS[1], ARGV[2])
end

-- A call without records marks the end of the partition: on this server the view is complete up to
-- here.
if #KEYS == 2 then
    redis.call('SET', KEYS[2], ARGV[3])
end
return {applied, duplicate, stale}
