//! Presence: what each process says of itself in Valkey, for whoever looks from outside.
//!
//! Takes a [`Presence`]; keeps it in a small hash beside the stream, a field for each process, which expires when nobody renews it. Gives
//! what all processes have said lately. Fails with what Valkey says.
//!
//! In Valkey, because the question is asked when PostgreSQL is away: then the workers know why nothing is flushed, and can tell. Nothing
//! depends on it: a daemon that may not write it, or whose Valkey is away, goes on unseen.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::names;
use crate::model::pipeline::Shard;
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Link, Reply, info, unexpected};

/// How often a process says that it is still the same.
pub const RENEWED_EVERY: Duration = Duration::from_secs(5);
/// Who has been silent for longer is not there any more.
pub const SILENT_AFTER: Duration = Duration::from_secs(20);

/// What one process says of one stream of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Its machine and process id.
    pub process: String,
    /// Its version.
    pub version: String,
    /// The connection over which it speaks, 0 where the server does not tell, and the life of the server that this number is of: when
    /// that connection has gone, so has the process.
    #[serde(default)]
    pub connection: u64,
    /// See the connection.
    #[serde(default)]
    pub run_id: String,
    /// Which PostgreSQL it flushes into, as [`crate::postgres::place`] has it; none where it does not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres: Option<String>,
    /// How it is.
    pub state: State,
    /// Why it does not flush, where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// What to do about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// For how long it has been so, in milliseconds; 0 while it flows.
    #[serde(default)]
    pub lasted_ms: u64,
    /// How many workers it has.
    #[serde(default)]
    pub workers: usize,
    /// Whether it reads the stream alone; none where the delivery is to a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads_alone: Option<bool>,
    /// Entries that it applied since it started.
    #[serde(default)]
    pub applied: u64,
    /// Entries that it buried since it started.
    #[serde(default)]
    pub buried: u64,
    /// Entries that it found in the ledger since it started.
    #[serde(default)]
    pub recognised: u64,
    /// Entries that Valkey lost, as far as it has seen.
    #[serde(default)]
    pub lost: u64,
    /// What keeps a daemon from starting, and is there while this one runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
    /// How long ago it said so, in milliseconds, by Valkey's clock. Filled by who reads it.
    #[serde(skip)]
    pub said_ms_ago: u64,
}

/// A finding of the doctor that keeps `tidegate run` from starting, and is there while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Finding {
    /// Its number, such as D1: `tidegate explain` tells more.
    pub finding: String,
    /// What was seen.
    pub evidence: String,
    /// Whether the configuration accepts it.
    pub accepted: Accepted,
    /// Until when it is, or was, accepted: a date, which lasts to its end in UTC, or a time; null where it is not.
    pub until: Option<String>,
    /// Why it is, or was, accepted; null where it is not.
    pub reason: Option<String>,
    /// Whether it is accepted for 7 days more at the most.
    #[serde(default)]
    pub ends_soon: bool,
}

/// Whether a finding is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Accepted {
    /// It does.
    InForce,
    /// It did, and the time is over.
    Expired,
    /// It does not: the finding came while the daemon ran, or a reload took the acceptance away.
    No,
}

/// How a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It reads and flushes what there is.
    Flowing,
    /// An operator has paused the pipeline.
    Paused,
    /// It waits for a server.
    Interrupted,
    /// It waits for an operator.
    Halted,
}

/// Keeps a field, drops those of who has long been silent, and renews the expiry. A server whose memory is full would refuse the key, and
/// its state is wanted most then: hence the flag.
const SAY: &str = "#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, key in ipairs(KEYS) do
    local said = redis.call('HGETALL', key)
    for i = 2, #said, 2 do
        local at = tonumber(string.match(said[i], '^%d+'))
        if not at or now - at > tonumber(ARGV[3]) then redis.call('HDEL', key, said[i - 1]) end
    end
    redis.call('HSET', key, ARGV[1], string.format('%.0f', now) .. ' ' .. ARGV[2])
    redis.call('PEXPIRE', key, ARGV[3])
end
return 1";

/// Says how this process is, beside these streams of a pipeline: all on one server, and in a cluster no more than one.
pub async fn say(connection: &Connection, streams: &[&str], pipeline: &str, presence: &Presence) -> Result<(), Fault> {
    let text = serde_json::to_string(presence).unwrap_or_default();
    let keys = streams.iter().map(|stream| names::presence(stream, pipeline));
    let say = Command::new("EVAL").arg(SAY).arg(streams.len()).args(keys);
    let kept = (SILENT_AFTER * 3).as_millis();
    connection.call(say.arg(&presence.process).arg(text).arg(kept)).await.map(|_| ())
}

/// Takes leave: this process is gone.
pub async fn leave(connection: &Connection, stream: &str, pipeline: &str, process: &str) -> Result<(), Fault> {
    let command = Command::new("HDEL").arg(names::presence(stream, pipeline)).arg(process);
    connection.call(command).await.map(|_| ())
}

/// What the processes at work on a shard have said lately, in their order. Who was killed took no leave, and is known by the connection that has gone.
/// `now_ms` is Valkey's time.
pub async fn of_the_living(link: &Link, shard: &Shard, now_ms: u64) -> Result<Vec<Presence>, Fault> {
    let heard = heard(link.commands(), shard, now_ms).await?;
    let numbers: Vec<u64> = heard.iter().map(|presence| presence.connection).filter(|number| *number > 0).collect();
    let Some(connected) = info::connected(link.commands(), &numbers).await? else { return Ok(heard) };
    let is_alive = |presence: &Presence| {
        let is_here = presence.run_id == link.generation().run_id && connected.contains(&presence.connection);
        presence.connection == 0 || is_here
    };
    Ok(heard.into_iter().filter(is_alive).collect())
}

async fn heard(connection: &Connection, shard: &Shard, now_ms: u64) -> Result<Vec<Presence>, Fault> {
    let key = names::presence(&shard.stream, &shard.pipeline.name);
    let reply = connection.call(Command::new("HGETALL").arg(key)).await?;
    let fields = reply.into_map().ok_or_else(|| unexpected("HGETALL"))?;
    // What another version has written, and this one cannot read, is passed over.
    let mut heard: Vec<Presence> = fields.filter_map(|(_, value)| read(&value, now_ms)).collect();
    heard.retain(|presence| presence.said_ms_ago <= SILENT_AFTER.as_millis() as u64);
    heard.sort_by(|a, b| a.process.cmp(&b.process));
    Ok(heard)
}

fn read(value: &Reply, now_ms: u64) -> Option<Presence> {
    let (at, text) = value.as_text()?.split_once(' ')?;
    let presence: Presence = serde_json::from_str(text).ok()?;
    Some(Presence { said_ms_ago: now_ms.saturating_sub(at.parse().ok()?), ..presence })
}
