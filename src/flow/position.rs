//! Position: where a group stands in its stream, and moving it over what one reader has settled alone.
//!
//! Takes a link; gives the group's position, or moves it. Fails with what Valkey said. The position is moved by a script that looks, in one step, whether all is as its
//! mover believes: the same server with the same history of writes, which in a cluster has taken over no slot since, the mover's lease, the group, and the position it left.
//! Where one of these is not so, nothing is changed (E3). Groups of many streams are moved by one script, each by itself: which server it is, is asked once.

use crate::failpoint;
use crate::model::entry::EntryId;
use crate::retry::Fault;
use crate::valkey::{Command, Link, Reply, info, server_error, unexpected};

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Every entry up to this one is settled, or pending in the group.
    pub id: EntryId,
    /// How many entries the stream ever had up to there; none where the server cannot tell.
    pub read: Option<u64>,
}

/// Why a mover is displaced whose lease somebody else has taken, or that has run out.
pub const LEASE_GONE: &str = "the lease is not this process's any more";

/// How a move ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// The group stands there. With how many entries it has read, where that is known.
    There(Option<u64>),
    /// Something is not as the mover believes: nothing was changed.
    Displaced(&'static str),
}

/// Answers for each stream one word where nothing was done, or `failed` with what the server said; else `there`, and how many entries were read, -1 if that cannot be told.
///
/// With the count, the group's lag is exact. Deleted entries make it wrong, so it is set right wherever the position is the stream's end.
const MOVE: &str = "
local run_id, history, epoch = unpack(ARGV)
local server_info = redis.call('INFO', 'server', 'replication')
local function says(line) return string.find(server_info, line, 1, true) end
local is_same = says('run_id:' .. run_id) and says('master_replid:' .. history) and says('role:master')
-- A slot that was elsewhere meanwhile may have come back with another history: the node has another epoch then.
if epoch ~= '' and not string.find(redis.call('CLUSTER', 'INFO'), 'my_epoch:' .. epoch .. '\\r', 1, true) then is_same = false end
local function advance(stream, lease, token, name, from, to, read)
if not is_same then return {'server'} end
if redis.call('GET', lease) ~= token then return {'lease'} end
if redis.call('EXISTS', stream) == 0 then return {'group'} end
local function look()
    for _, told in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
        local group = {}
        for i = 1, #told, 2 do group[told[i]] = told[i + 1] end
        if group['name'] == name then return group end
    end
end
local group = look()
if not group then return {'group'} end
if group['last-delivered-id'] ~= from then return {'position'} end
if from == to then return {'there', group['entries-read'] or -1} end
local function move(count)
    if count == '' then redis.call('XGROUP', 'SETID', stream, name, to)
    else redis.call('XGROUP', 'SETID', stream, name, to, 'ENTRIESREAD', count) end
end
move(read)
local is_end = #redis.call('XRANGE', stream, '(' .. to, '+', 'COUNT', 1) == 0
if is_end and (read == '' or look()['lag'] ~= 0) then
    local told, about = redis.call('XINFO', 'STREAM', stream), {}
    for i = 1, #told, 2 do about[told[i]] = told[i + 1] end
    if about['last-generated-id'] == to then
        read = string.format('%.0f', about['entries-added'])
        move(read)
    end
end
return {'there', tonumber(read) or -1}
end
local replies = {}
for n = 1, #KEYS / 2 do
    local fine, told = pcall(advance, KEYS[2 * n - 1], KEYS[2 * n], unpack(ARGV, 5 * n - 1, 5 * n + 3))
    if not fine then told = {'failed', type(told) == 'table' and told.err or tostring(told)} end
    replies[n] = told
end
return replies";

/// Where the group stands.
pub async fn of_group(link: &Link, claim: &Claim) -> Result<Position, Fault> {
    let told = info::group(link.commands(), &claim.stream, &claim.group).await?;
    told.map(|group| Position { id: group.last_delivered, read: group.read }).ok_or_else(|| no_group(claim))
}

fn no_group(claim: &Claim) -> Fault {
    let message = format!("NOGROUP the group {} of {} is gone", claim.group, claim.stream);
    Fault::Valkey { code: "NOGROUP".into(), message }
}

/// Whose position it is, and by which right it is moved.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The stream.
    pub stream: String,
    /// Its group.
    pub group: String,
    /// The key of the lease.
    pub lease: String,
    /// What that key holds as long as the lease is the mover's.
    pub token: String,
}

/// A group to be moved from one position to another, or only looked at, if both are the same.
#[derive(Debug, Clone, Copy)]
pub struct Move<'a> {
    /// Whose it is.
    pub claim: &'a Claim,
    /// Where its mover left it.
    pub from: EntryId,
    /// Where it is to be.
    pub to: Position,
}

/// Moves groups; gives what became of each.
pub async fn advance(link: &Link, moves: &[Move<'_>]) -> Result<Vec<Result<Moved, Fault>>, Fault> {
    let generation = link.generation();
    let command = Command::new("EVAL").arg(MOVE).arg(2 * moves.len());
    let command = command.args(moves.iter().flat_map(|one| [&*one.claim.stream, &*one.claim.lease]));
    let command = command.arg(&generation.run_id).arg(&generation.replication_id);
    let command = command.arg(link.config_epoch().map_or_else(String::new, |epoch| epoch.to_string()));
    let command = moves.iter().fold(command, |command, Move { claim, from, to }| {
        let read = to.read.map_or_else(String::new, |read| read.to_string());
        command.arg(&claim.token).arg(&claim.group).arg(*from).arg(to.id).arg(read)
    });
    let reply = failpoint::during("position.sent", link.commands().call(command)).await?;
    failpoint::reached("position.moved");
    let replies: Vec<Reply> = reply.into_array().ok_or_else(|| unexpected("EVAL"))?.collect();
    if replies.len() != moves.len() {
        return Err(unexpected("EVAL"));
    }
    Ok(replies.into_iter().zip(moves).map(|(reply, one)| moved(reply, one.claim)).collect())
}

fn moved(reply: Reply, claim: &Claim) -> Result<Moved, Fault> {
    let mut parts = reply.into_array().ok_or_else(|| unexpected("EVAL"))?;
    let word = parts.next();
    Ok(match word.as_ref().and_then(|word| word.as_text()) {
        Some("there") => Moved::There(parts.next().and_then(|count| count.as_int()?.try_into().ok())),
        Some("group") => return Err(no_group(claim)),
        Some("failed") => {
            let words = parts.next();
            return Err(server_error(words.as_ref().and_then(|words| words.as_text()).unwrap_or("ERR")));
        }
        Some("server") => Moved::Displaced("the server is another one, or has another history of writes"),
        Some("lease") => Moved::Displaced(LEASE_GONE),
        Some("position") => {
            Moved::Displaced("the group was moved by somebody else: a replay, or a consumer of the group")
        }
        _ => return Err(unexpected("EVAL")),
    })
}
