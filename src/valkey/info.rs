//! What a server tells about itself, its streams and its clients: parsed once, here.
//!
//! Takes a [`Connection`] and a name; gives typed answers. It fails with what the server said, or where an answer has another
//! shape than this file knows. Entries' payloads are never fetched: an entry may be of hundreds of megabytes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::command::{Command, Reply, unexpected};
use super::connection::Connection;
use super::server::info_field;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// What the server does when its memory is full (`maxmemory-policy`).
pub async fn eviction_policy(connection: &Connection) -> Result<String, Fault> {
    let info = connection.call(Command::new("INFO").arg("memory")).await?;
    let text = info.as_text().ok_or_else(|| unexpected("INFO"))?;
    Ok(info_field(text, "maxmemory_policy").unwrap_or_default().to_owned())
}

/// How many connections the server allows (`maxclients`).
pub async fn most_clients(connection: &Connection) -> Result<usize, Fault> {
    let info = connection.call(Command::new("INFO").arg("clients")).await?;
    let text = info.as_text().ok_or_else(|| unexpected("INFO"))?;
    info_field(text, "maxclients").and_then(|most| most.parse().ok()).ok_or_else(|| unexpected("INFO"))
}

/// Whether a server with this `maxmemory-policy` may evict any key when its memory is full, streams and all.
pub fn evicts_any_key(policy: &str) -> bool {
    policy.starts_with("allkeys-")
}

/// The server's time, in milliseconds since 1970.
pub async fn time_ms(connection: &Connection) -> Result<u64, Fault> {
    let time = connection.call(Command::new("TIME")).await?;
    let parts: Option<Vec<u64>> =
        time.into_array().and_then(|parts| parts.map(|part| part.as_text()?.parse().ok()).collect());
    match parts.as_deref() {
        Some([seconds, micros]) => Ok(seconds * 1000 + micros / 1000),
        _ => Err(unexpected("TIME")),
    }
}

/// The processor time that the server has used, by its own account; none where it does not tell.
pub async fn cpu_seconds(connection: &Connection) -> Result<Option<f64>, Fault> {
    let reply = connection.call(Command::new("INFO").arg("cpu")).await?;
    let text = reply.as_text().ok_or_else(|| unexpected("INFO"))?;
    let field = |name| info_field(text, name).and_then(|seconds| seconds.parse::<f64>().ok());
    Ok(field("used_cpu_user").zip(field("used_cpu_sys")).map(|(user, system)| user + system))
}

/// A consumer of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    /// Its name.
    pub name: String,
    /// How many entries it holds.
    pub pending: u64,
    /// How long ago it last asked for entries.
    pub idle: Duration,
}

/// The consumers of a group. Where there is no stream there is no group: both are NOGROUP.
pub async fn consumers(connection: &Connection, stream: &str, group: &str) -> Result<Vec<Consumer>, Fault> {
    let reply = match connection.call(Command::new("XINFO").arg("CONSUMERS").arg(stream).arg(group)).await {
        Err(fault) if is_no_such_key(&fault) => {
            return Err(Fault::Valkey { code: "NOGROUP".into(), message: format!("NOGROUP no such key {stream}") });
        }
        reply => reply.map_err(|fault| fault.about(stream))?,
    };
    let parse = |consumer: Reply| {
        let fields = Fields::of(consumer)?;
        Some(Consumer {
            name: fields.text("name")?.to_owned(),
            pending: fields.number("pending")?,
            idle: Duration::from_millis(fields.number("idle")?),
        })
    };
    rows(reply, "XINFO CONSUMERS", parse)
}

/// A consumer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// How many entries are delivered and not acknowledged.
    pub pending: u64,
    /// The last entry that it was given.
    pub last_delivered: EntryId,
    /// How many entries it has not been given; none where the server cannot tell (after XDEL, XSETID or the like).
    pub undelivered: Option<u64>,
    /// How many entries the stream had up to the last one that it was given; none where the server cannot tell.
    pub read: Option<u64>,
}

/// One group of a stream; none if there is no such group, or no stream.
pub async fn group(connection: &Connection, stream: &str, group: &str) -> Result<Option<Group>, Fault> {
    Ok(groups(connection, stream).await?.into_iter().find(|found| found.name == group))
}

/// All groups of a stream; none if there is no stream.
pub async fn groups(connection: &Connection, stream: &str) -> Result<Vec<Group>, Fault> {
    let reply = match connection.call(Command::new("XINFO").arg("GROUPS").arg(stream)).await {
        Err(fault) if is_no_such_key(&fault) => return Ok(Vec::new()),
        reply => reply.map_err(|fault| fault.about(stream))?,
    };
    let parse = |group: Reply| {
        let fields = Fields::of(group)?;
        Some(Group {
            name: fields.text("name")?.to_owned(),
            pending: fields.number("pending")?,
            last_delivered: fields.text("last-delivered-id")?.parse().ok()?,
            undelivered: fields.number("lag"),
            read: fields.number("entries-read"),
        })
    };
    rows(reply, "XINFO GROUPS", parse)
}

/// A stream, without its entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// How many entries it holds.
    pub length: u64,
    /// Its first entry.
    pub first: Option<EntryId>,
    /// The highest id that it ever gave.
    pub last_generated: EntryId,
    /// How many entries were ever added; none where the server does not tell.
    pub added: Option<u64>,
    /// The highest id that was deleted by itself.
    pub deleted: EntryId,
}

/// A script, for XINFO STREAM sends the first and the last entry whole.
const STREAM: &str = "
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
local told, info = redis.call('XINFO', 'STREAM', KEYS[1]), {}
for i = 1, #told, 2 do info[told[i]] = told[i + 1] end
local first = info['first-entry']
return {info['length'], first and first[1] or '', info['last-generated-id'], info['entries-added'] or -1,
        info['max-deleted-entry-id'] or '0-0'}";

/// One stream; none if there is no such key.
pub async fn stream(connection: &Connection, stream: &str) -> Result<Option<Stream>, Fault> {
    let told = connection.call(Command::new("EVAL").arg(STREAM).arg(1).arg(stream)).await;
    let reply = told.map_err(|fault| fault.about(stream))?;
    let Some(parts) = reply.into_array() else { return Ok(None) };
    let parts: Vec<Reply> = parts.collect();
    let id = |n: usize| parts.get(n).and_then(Reply::as_text);
    let parse = || {
        Some(Stream {
            length: parts.first()?.as_int()?.try_into().ok()?,
            first: id(1)?.parse().ok(),
            last_generated: id(2)?.parse().ok()?,
            added: parts.get(3)?.as_int()?.try_into().ok(),
            deleted: id(4)?.parse().ok()?,
        })
    };
    parse().map(Some).ok_or_else(|| unexpected("EVAL"))
}

/// What a group has yet to settle, as one moment of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// How many entries are delivered and not acknowledged.
    pub pending: u64,
    /// How many entries it has not been given; none where the server cannot tell.
    pub undelivered: Option<u64>,
    /// The lowest id that is delivered and not acknowledged.
    pub oldest_pending: Option<EntryId>,
    /// The first entry that it has not been given.
    pub first_undelivered: Option<EntryId>,
    /// The server's time, in milliseconds since 1970.
    pub now_ms: u64,
}

const STANDING: &str = "
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
if redis.call('EXISTS', KEYS[1]) == 0 then return {now, 0, 0, '', ''} end
local after, pending, lag, oldest = '-', 0, -1, ''
for _, told in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #told, 2 do group[told[i]] = told[i + 1] end
    if group['name'] == ARGV[1] then
        after, pending, lag = '(' .. group['last-delivered-id'], group['pending'], group['lag'] or -1
        if pending > 0 then oldest = redis.call('XPENDING', KEYS[1], ARGV[1])[2] end
    end
end
local first = redis.call('XRANGE', KEYS[1], after, '+', 'COUNT', 1)[1]
return {now, pending, lag, oldest, first and first[1] or ''}";

/// What a group has yet to settle. A group that does not exist yet has all the stream before it.
pub async fn standing(connection: &Connection, stream: &str, group: &str) -> Result<Standing, Fault> {
    let told = connection.call(Command::new("EVAL").arg(STANDING).arg(1).arg(stream).arg(group)).await;
    let reply = told.map_err(|fault| fault.about(stream))?;
    let parts: Vec<Reply> = reply.into_array().ok_or_else(|| unexpected("EVAL"))?.collect();
    let parse = || {
        let id = |n: usize| parts.get(n).and_then(Reply::as_text).map(|text| text.parse().ok());
        Some(Standing {
            now_ms: parts.first()?.as_text()?.parse().ok()?,
            pending: parts.get(1)?.as_int()?.try_into().ok()?,
            undelivered: parts.get(2)?.as_int()?.try_into().ok(),
            oldest_pending: id(3)?,
            first_undelivered: id(4)?,
        })
    };
    parse().ok_or_else(|| unexpected("EVAL"))
}

/// Entries behind an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// How many were counted.
    pub entries: u64,
    /// The last one counted, where there are more.
    pub more_behind: Option<EntryId>,
}

/// Their payload stays on the server. Says how many there are, the last one's id, and how large they are.
const COUNT: &str = "
local entries, bytes = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2]), 0
for _, entry in ipairs(entries) do
    for _, string in ipairs(entry[2]) do bytes = bytes + #string end
end
return {#entries, #entries > 0 and entries[#entries][1] or '', bytes}";

/// The most entries that are counted in one go: some 0.1 ms of the server's time.
const COUNT_STRIDE: u64 = 256;
/// Entries of more bytes than this in one go are counted in smaller strides.
const COUNT_BYTES: i64 = 1 << 20;

/// How many entries a stream has behind an id; not many more than `limit` are counted.
pub async fn count_behind(
    connection: &Connection,
    stream: &str,
    mut id: EntryId,
    limit: u64,
) -> Result<Counted, Fault> {
    // At a gallop: entries may be huge.
    let (mut entries, mut stride) = (0, 1);
    loop {
        let command = Command::new("EVAL").arg(COUNT).arg(1).arg(stream).arg(id).arg(stride as i64);
        let parts: Vec<Reply> =
            connection.call(command).await?.into_array().ok_or_else(|| unexpected("EVAL"))?.collect();
        let told = || Some((parts.first()?.as_int()?, parts.get(1)?.as_text()?, parts.get(2)?.as_int()?));
        let (count, last, bytes) = told().ok_or_else(|| unexpected("EVAL"))?;
        entries += count.unsigned_abs();
        if count.unsigned_abs() < stride {
            return Ok(Counted { entries, more_behind: None });
        }
        id = last.parse().map_err(|_| unexpected("EVAL"))?;
        if entries >= limit {
            return Ok(Counted { entries, more_behind: Some(id) });
        }
        stride = if bytes > COUNT_BYTES { (stride / 2).max(1) } else { (stride * 2).min(COUNT_STRIDE) };
    }
}

const EXISTING: &str = "
local existing = {}
for _, id in ipairs(ARGV) do
    if #redis.call('XRANGE', KEYS[1], id, id) > 0 then existing[#existing + 1] = id end
end
return existing";

/// Which of these entries the stream has. A script, for XRANGE sends them whole.
pub async fn existing(connection: &Connection, stream: &str, ids: &[EntryId]) -> Result<Vec<EntryId>, Fault> {
    let reply = connection.call(Command::new("EVAL").arg(EXISTING).arg(1).arg(stream).args(ids)).await?;
    rows(reply, "EVAL", |id| id.as_text()?.parse().ok())
}

/// A pending entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// Its id.
    pub id: EntryId,
    /// How often it was delivered.
    pub deliveries: u64,
}

/// Pending entries within `first..=last`, `count` at the most; of one consumer, where one is named.
pub async fn pending(
    connection: &Connection,
    (stream, group): (&str, &str),
    (first, last): (EntryId, EntryId),
    count: usize,
    owner: Option<&str>,
) -> Result<Vec<Pending>, Fault> {
    let command = Command::new("XPENDING").arg(stream).arg(group).arg(first).arg(last).arg(count);
    let reply = connection.call(command.args(owner)).await?;
    let parse = |row: Reply| {
        let row: Vec<Reply> = row.into_array()?.collect();
        Some(Pending { id: row.first()?.as_text()?.parse().ok()?, deliveries: row.get(3)?.as_int()?.try_into().ok()? })
    };
    rows(reply, "XPENDING", parse)
}

/// A connection to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its number, never given twice in one life of the server.
    pub id: u64,
    /// The name that it was given; empty if none.
    pub name: String,
}

/// All connections to the server; or the one of this number, if it exists.
pub async fn peers(connection: &Connection, id: Option<u64>) -> Result<Vec<Peer>, Fault> {
    let mut command = Command::new("CLIENT").arg("LIST");
    if let Some(id) = id {
        command = command.arg("ID").arg(id);
    }
    let reply = connection.call(command).await?;
    let text = reply.as_text().ok_or_else(|| unexpected("CLIENT LIST"))?;
    text.lines().map(|line| peer(line).ok_or_else(|| unexpected("CLIENT LIST"))).collect()
}

/// Which of the connections of these numbers exist; none where that may not be asked.
pub async fn connected(connection: &Connection, numbers: &[u64]) -> Result<Option<HashSet<u64>>, Fault> {
    if numbers.is_empty() {
        return Ok(Some(HashSet::new()));
    }
    let reply = match connection.call(Command::new("CLIENT").arg("LIST").arg("ID").args(numbers)).await {
        Err(Fault::Valkey { code, .. }) if code == "NOPERM" => return Ok(None),
        reply => reply?,
    };
    let text = reply.as_text().ok_or_else(|| unexpected("CLIENT LIST"))?;
    Ok(Some(text.lines().filter_map(peer).map(|peer| peer.id).collect()))
}

/// One line of CLIENT LIST: `id=7 addr=… name=… …`. A name holds no blanks.
fn peer(line: &str) -> Option<Peer> {
    let field = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    Some(Peer { id: field("id")?.parse().ok()?, name: field("name").unwrap_or_default().to_owned() })
}

/// The fields of a map by their names.
struct Fields(HashMap<String, Reply>);

impl Fields {
    fn of(map: Reply) -> Option<Fields> {
        let named = map.into_map()?.filter_map(|(name, value)| Some((name.as_text()?.to_owned(), value)));
        Some(Fields(named.collect()))
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_text()
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_int()?.try_into().ok()
    }
}

fn rows<T>(reply: Reply, command: &str, parse: impl Fn(Reply) -> Option<T>) -> Result<Vec<T>, Fault> {
    let rows = reply.into_array().ok_or_else(|| unexpected(command))?;
    rows.map(|row| parse(row).ok_or_else(|| unexpected(command))).collect()
}

fn is_no_such_key(fault: &Fault) -> bool {
    matches!(fault, Fault::Valkey { message, .. } if message.contains("no such key"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_client_list_has_a_number_and_perhaps_a_name() {
        let line = "id=7 addr=127.0.0.1:1 laddr=127.0.0.1:2 fd=8 name=tidegate:main:counters:h-1-0-r-7-x age=1 idle=0";
        assert_eq!(peer(line), Some(Peer { id: 7, name: "tidegate:main:counters:h-1-0-r-7-x".into() }));
        assert_eq!(peer("id=8 name= age=1"), Some(Peer { id: 8, name: String::new() }));
        assert_eq!(peer("who knows"), None);
    }
}
