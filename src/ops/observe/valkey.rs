//! Valkey's side of a look: a stream, its group, who holds what, and what the daemons say of themselves.
//!
//! Takes a link and a shard; gives a [`Stream`]. A stream or a group that is missing is an answer. Fails with what Valkey says. One script
//! looks at stream and group, so that their numbers belong to one moment; what a stream holds is never sent.

use std::time::Duration;

use serde::Serialize;

use super::Servers;
use crate::model::entry::EntryId;
use crate::model::names;
use crate::model::pipeline::Shard;
use crate::presence::{self, Presence};
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Reply, info, unexpected};

/// Entries counted in one step, and steps, where the server cannot tell how many are undelivered.
const COUNTED: (usize, usize) = (2_000, 25);

/// What Valkey tells of a stream of a pipeline.
#[derive(Debug, Clone)]
pub struct Stream {
    /// The server's time, in milliseconds since 1970.
    pub now_ms: u64,
    /// How many entries the stream holds; none if there is no stream.
    pub length: Option<u64>,
    /// Its first entry.
    pub first: Option<EntryId>,
    /// The highest id that it ever gave.
    pub last_generated: EntryId,
    /// How many entries were ever added; none where the server does not tell.
    pub added: Option<u64>,
    /// What it takes of the server's memory, by an estimate; none where that may not be asked.
    pub memory_bytes: Option<u64>,
    /// The pipeline's group; none if there is none.
    pub group: Option<Group>,
    /// Entries that nobody has read.
    pub undelivered: Undelivered,
    /// The first of them.
    pub first_undelivered: Option<EntryId>,
    /// All groups of the stream.
    pub groups: Vec<Named>,
    /// The members of the pipeline's group.
    pub consumers: Vec<Consumer>,
    /// What the daemons say of themselves; none where that may not be read.
    pub processes: Option<Vec<Presence>>,
}

/// A pipeline's group.
#[derive(Debug, Clone)]
pub struct Group {
    /// How far it has read.
    pub last_delivered: EntryId,
    /// How many entries are delivered and not acknowledged.
    pub pending: u64,
    /// The lowest of them.
    pub oldest_pending: Option<EntryId>,
    /// How many entries were added that it has not read, those that are gone by now too, as the server counts; none where it cannot tell.
    pub lag: Option<u64>,
}

/// Any group of the stream.
#[derive(Debug, Clone)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// How far it has read.
    pub last_delivered: EntryId,
    /// How many entries are delivered and not acknowledged.
    pub pending: u64,
    /// How many members it has.
    pub consumers: u64,
}

/// How many entries nobody has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undelivered {
    /// So many.
    Exactly(u64),
    /// So many and more: the server cannot tell, and counting was given up.
    AtLeast(u64),
}

impl Undelivered {
    /// The number.
    pub fn number(self) -> u64 {
        match self {
            Undelivered::Exactly(number) | Undelivered::AtLeast(number) => number,
        }
    }

    /// The number, if that is all of them.
    pub fn exactly(self) -> Option<u64> {
        match self {
            Undelivered::Exactly(number) => Some(number),
            Undelivered::AtLeast(_) => None,
        }
    }
}

/// A member of the pipeline's group.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Consumer {
    /// Its name: machine, process, worker, life of the server, connection, and random digits.
    pub name: String,
    /// Entries that were given to it and are not settled yet.
    pub entries: u64,
    /// How long ago it last spoke, in milliseconds.
    pub idle_ms: u64,
    /// Whether it is at work: its connection exists, or, where that cannot be asked, it spoke lately.
    pub alive: bool,
    /// Whether the server itself says that its connection no longer exists.
    #[serde(skip)]
    pub gone: bool,
}

impl Stream {
    /// Entries that are not settled: undelivered and pending.
    pub fn backlog(&self) -> u64 {
        self.undelivered.number() + self.group.as_ref().map_or(0, |group| group.pending)
    }

    /// The same, where it is all of them.
    pub fn exact_backlog(&self) -> Option<u64> {
        Some(self.undelivered.exactly()? + self.group.as_ref().map_or(0, |group| group.pending))
    }

    /// The oldest entry that is not settled.
    pub fn oldest(&self) -> Option<EntryId> {
        let pending = self.group.as_ref().and_then(|group| group.oldest_pending);
        [pending, self.first_undelivered].into_iter().flatten().min()
    }

    /// Whether a daemon is at work on it.
    pub fn is_read(&self) -> bool {
        self.processes.as_ref().is_some_and(|processes| !processes.is_empty())
            || self.consumers.iter().any(|consumer| consumer.alive)
    }

    /// How many entries are gone that the group had not read; none where there are none, or that cannot be told.
    pub fn cut_unread(&self) -> Option<u64> {
        let lag = self.group.as_ref()?.lag?;
        let there = match self.first_undelivered {
            None => 0,
            next if next == self.first => self.length?,
            // Nothing was cut behind its position; of what was deleted there the server gives no number.
            Some(_) => return None,
        };
        lag.checked_sub(there).filter(|cut| *cut > 0)
    }

    /// How long ago it was added, by the server's clock, in milliseconds; 0 if there is none.
    pub fn age_ms(&self) -> u64 {
        self.oldest().map_or(0, |id| self.now_ms.saturating_sub(id.ms))
    }
}

/// Answers the time alone where there is no stream; else stream, group, and all groups, as texts and numbers in one list.
const LOOK: &str = "
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local told = redis.pcall('XINFO', 'STREAM', KEYS[1])
if told.err then
    if string.find(told.err, 'no such key', 1, true) then return {now} end
    return told
end
local stream = {}
for i = 1, #told, 2 do stream[told[i]] = told[i + 1] end
local first = stream['first-entry']
local answer = {now, stream['length'], first and first[1] or '', stream['last-generated-id'], stream['entries-added'] or -1}
local after, own = '-', {'', 0, -1, ''}
local groups = {}
for _, told in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #told, 2 do group[told[i]] = told[i + 1] end
    groups[#groups + 1] = {group['name'], group['last-delivered-id'], group['pending'], group['consumers']}
    if group['name'] == ARGV[1] then
        local oldest = ''
        if group['pending'] > 0 then oldest = redis.call('XPENDING', KEYS[1], ARGV[1])[2] end
        after = '(' .. group['last-delivered-id']
        own = {group['last-delivered-id'], group['pending'], group['lag'] or -1, oldest}
    end
end
local next = redis.call('XRANGE', KEYS[1], after, '+', 'COUNT', 1)[1]
answer[6], answer[7], answer[8] = own, next and next[1] or '', groups
return answer";

/// Looks at a shard's stream, its group and its daemons.
pub async fn look(servers: &mut Servers, shard: &Shard, dead_after: Duration) -> Result<Stream, Fault> {
    let link = servers.link(&shard.stream).await?;
    let (connection, group) = (link.commands(), shard.pipeline.group());
    let told = connection.call(Command::new("EVAL").arg(LOOK).arg(1).arg(&shard.stream).arg(&group)).await;
    let reply = told.map_err(|fault| fault.about(&shard.stream))?;
    let mut stream = parse(reply).ok_or_else(|| unexpected("EVAL"))?;
    if let (Some(length), Some(group)) = (stream.length, &stream.group)
        && stream.undelivered == UNTOLD
    {
        stream.undelivered = count(connection, shard, length, group.last_delivered, &stream).await?;
    }
    if stream.length.is_some() {
        stream.memory_bytes = memory(connection, &shard.stream).await?;
    }
    if stream.group.is_some() {
        stream.consumers = consumers(connection, &link.generation().run_id, shard, dead_after).await?;
    }
    stream.processes = allowed(presence::of_the_living(&link, shard, stream.now_ms).await)?;
    Ok(stream)
}

/// Stands for "the server cannot tell" until it is counted.
const UNTOLD: Undelivered = Undelivered::AtLeast(0);

fn parse(reply: Reply) -> Option<Stream> {
    let parts: Vec<Reply> = reply.into_array()?.collect();
    let text = |n: usize| parts.get(n).and_then(Reply::as_text);
    let id = |n: usize| text(n).and_then(|text| text.parse().ok());
    let number = |reply: &Reply| reply.as_int().and_then(|n| u64::try_from(n).ok());
    let mut stream = Stream {
        now_ms: text(0)?.parse().ok()?,
        length: None,
        first: None,
        last_generated: EntryId::MIN,
        added: None,
        memory_bytes: None,
        group: None,
        undelivered: Undelivered::Exactly(0),
        first_undelivered: None,
        groups: Vec::new(),
        consumers: Vec::new(),
        processes: None,
    };
    if parts.len() == 1 {
        return Some(stream);
    }
    let length = number(parts.get(1)?)?;
    stream.length = Some(length);
    stream.first = id(2);
    stream.last_generated = id(3)?;
    stream.added = number(parts.get(4)?);
    let own: Vec<Reply> = parts.get(5)?.clone().into_array()?.collect();
    stream.first_undelivered = id(6);
    stream.group = own.first().and_then(Reply::as_text).and_then(|text| text.parse().ok()).and_then(|last_delivered| {
        let oldest_pending = own.get(3).and_then(Reply::as_text).and_then(|text| text.parse().ok());
        let lag = own.get(2).and_then(number);
        Some(Group { last_delivered, pending: number(own.get(1)?)?, oldest_pending, lag })
    });
    stream.undelivered = match (&stream.group, stream.first_undelivered, own.get(2).and_then(number)) {
        // Without a group all of the stream is before it.
        (None, ..) => Undelivered::Exactly(length),
        (_, None, _) => Undelivered::Exactly(0),
        (_, Some(_), Some(lag)) => Undelivered::Exactly(lag),
        (_, Some(next), None) if Some(next) == stream.first => Undelivered::Exactly(length),
        (_, Some(_), None) => UNTOLD,
    };
    let group = |reply: Reply| {
        let fields: Vec<Reply> = reply.into_array()?.collect();
        Some(Named {
            name: fields.first()?.as_text()?.to_owned(),
            last_delivered: fields.get(1)?.as_text()?.parse().ok()?,
            pending: number(fields.get(2)?)?,
            consumers: number(fields.get(3)?)?,
        })
    };
    stream.groups = parts.get(7)?.clone().into_array()?.map(group).collect::<Option<_>>()?;
    Some(stream)
}

/// Counts a step of entries behind an id, or before it; answers how many, and the last one.
const COUNT: &str = "
local found
if ARGV[1] == 'behind' then found = redis.call('XRANGE', KEYS[1], '(' .. ARGV[2], '+', 'COUNT', ARGV[3])
else found = redis.call('XREVRANGE', KEYS[1], ARGV[2], '-', 'COUNT', ARGV[3]) end
return {#found, found[#found] and found[#found][1] or ''}";

/// How many entries are undelivered where the server cannot tell (after XDEL, XSETID or the like): counted from the shorter end, for so long.
async fn count(
    connection: &Connection,
    shard: &Shard,
    length: u64,
    last_delivered: EntryId,
    stream: &Stream,
) -> Result<Undelivered, Fault> {
    let behind = steps(connection, &shard.stream, "behind", last_delivered).await?;
    if let Undelivered::Exactly(_) = behind {
        return Ok(behind);
    }
    let before = match stream.first {
        Some(first) if first <= last_delivered => steps(connection, &shard.stream, "before", last_delivered).await?,
        _ => Undelivered::Exactly(0),
    };
    Ok(match before {
        Undelivered::Exactly(before) => Undelivered::Exactly(length.saturating_sub(before)),
        Undelivered::AtLeast(_) => behind,
    })
}

async fn steps(connection: &Connection, stream: &str, way: &str, from: EntryId) -> Result<Undelivered, Fault> {
    let (mut at, mut counted) = (from, 0);
    for _ in 0..COUNTED.1 {
        let eval = Command::new("EVAL").arg(COUNT).arg(1).arg(stream).arg(way).arg(at).arg(COUNTED.0);
        let parts: Vec<Reply> = connection.call(eval).await?.into_array().ok_or_else(|| unexpected("EVAL"))?.collect();
        let found = parts.first().and_then(Reply::as_int).and_then(|n| u64::try_from(n).ok());
        let found = found.ok_or_else(|| unexpected("EVAL"))?;
        counted += found;
        let last = parts.get(1).and_then(Reply::as_text).and_then(|text| text.parse::<EntryId>().ok());
        // Ids before one are asked for including it.
        let next = match way {
            "before" => last.and_then(|id| id.number().checked_sub(1)).map(EntryId::from_number),
            _ => last,
        };
        match next.filter(|_| found == COUNTED.0 as u64) {
            Some(next) => at = next,
            None => return Ok(Undelivered::Exactly(counted)),
        }
    }
    Ok(Undelivered::AtLeast(counted))
}

/// What a key takes of memory; none where that may not be asked.
async fn memory(connection: &Connection, key: &str) -> Result<Option<u64>, Fault> {
    let told = connection.call(Command::new("MEMORY").arg("USAGE").arg(key)).await;
    Ok(allowed(told)?.and_then(|reply| reply.as_int()).and_then(|bytes| bytes.try_into().ok()))
}

/// What may not be asked is not known, and nothing else of the look is lost by it.
fn allowed<T>(told: Result<T, Fault>) -> Result<Option<T>, Fault> {
    match told {
        Ok(told) => Ok(Some(told)),
        Err(Fault::Valkey { code, .. }) if code == "NOPERM" => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// The members of a shard's group.
pub async fn consumers(
    connection: &Connection,
    run_id: &str,
    shard: &Shard,
    dead_after: Duration,
) -> Result<Vec<Consumer>, Fault> {
    let told = match info::consumers(connection, &shard.stream, &shard.pipeline.group()).await {
        // It was removed after it was looked at.
        Err(Fault::Valkey { code, .. }) if code == "NOGROUP" => Vec::new(),
        told => told?,
    };
    let numbers: Vec<u64> = told.iter().filter_map(|consumer| names::connection_of(&consumer.name, run_id)).collect();
    let connected = info::connected(connection, &numbers).await?;
    let consumer = |told: info::Consumer| {
        let (alive, gone) = match (names::connection_of(&told.name, run_id), &connected) {
            (Some(number), Some(connected)) => (connected.contains(&number), !connected.contains(&number)),
            _ => (told.idle < dead_after, false),
        };
        Consumer { name: told.name, entries: told.pending, idle_ms: told.idle.as_millis() as u64, alive, gone }
    };
    Ok(told.into_iter().map(consumer).collect())
}
