//! `tidegate pending`: who holds what, and for how long.
//!
//! Takes pipelines; prints the members of their groups with what was given to them and is not settled, and with --entries each entry. What
//! entries contain is not read. Where one process reads a stream alone nothing is pending: what it holds lies behind the group's position.

use std::time::Duration;

use serde::Serialize;

use super::columns::{Page, Tone, count, lasting_ms, plural, printable};
use super::complete::{Name, by};
use super::context::{Report, chosen};
use super::observe::{Servers, valkey as observed};
use super::{Context, Exit, Failure};
use crate::config::Needs;
use crate::model::pipeline::Shard;
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Reply, unexpected};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only of these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Each entry, too, the oldest first
    #[arg(long)]
    pub entries: bool,
    /// With --entries: only those of this consumer
    #[arg(long, value_name = "NAME", requires = "entries", add = by(Name::Consumer))]
    pub consumer: Option<String>,
    /// With --entries: so many of each stream at the most
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub limit: u32,
}

/// What is pending.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Pending {
    /// Each stream.
    pub streams: Vec<PendingStream>,
}

/// What is pending in a stream's group.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PendingStream {
    /// Its pipeline.
    pub pipeline: String,
    /// Its key.
    pub stream: String,
    /// Entries given out and not settled.
    pub entries: u64,
    /// The oldest of them; null if there is none.
    pub oldest: Option<String>,
    /// How long ago the oldest was added, in milliseconds; null if there is none.
    pub oldest_ms: Option<u64>,
    /// The members of the group.
    pub consumers: Vec<observed::Consumer>,
    /// Each entry, where that was asked for.
    pub list: Vec<PendingEntry>,
}

/// An entry that is pending.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PendingEntry {
    /// Its id.
    pub id: String,
    /// Who holds it.
    pub consumer: String,
    /// How long ago it was given to that one, in milliseconds.
    pub held_ms: u64,
    /// How often it was delivered.
    pub deliveries: u64,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let mut servers = Servers::of(&config, "tidegate:pending")?;
    let mut streams = Vec::new();
    for pipeline in chosen(&config, &opts.pipelines)? {
        for shard in servers.shards(pipeline).await {
            streams.push(of_shard(&opts, &mut servers, &shard, config.reclaim.dead_after).await?);
        }
    }
    if let Some(name) = &opts.consumer
        && !streams.iter().flat_map(|stream| &stream.consumers).any(|consumer| consumer.name == *name)
    {
        let next = "`tidegate pending` lists those that are there; what a consumer that has gone had is taken over";
        context.say(&format!("there is no consumer {name:?} in these streams' groups: {next}"));
    }
    context.print(&Pending { streams })?;
    Ok(Exit::Ok)
}

async fn of_shard(
    opts: &Opts,
    servers: &mut Servers,
    shard: &Shard,
    dead_after: Duration,
) -> Result<PendingStream, Fault> {
    let seen = observed::look(servers, shard, dead_after).await?;
    let oldest = seen.group.as_ref().and_then(|group| group.oldest_pending);
    let list = match (&seen.group, opts.entries) {
        (Some(_), true) => {
            let link = servers.link(&shard.stream).await?;
            entries(link.commands(), shard, opts.limit, opts.consumer.as_deref()).await?
        }
        _ => Vec::new(),
    };
    Ok(PendingStream {
        pipeline: shard.pipeline.name.clone(),
        stream: shard.stream.clone(),
        entries: seen.group.as_ref().map_or(0, |group| group.pending),
        oldest: oldest.map(|id| id.to_string()),
        oldest_ms: oldest.map(|id| seen.now_ms.saturating_sub(id.ms)),
        consumers: seen.consumers,
        list,
    })
}

async fn entries(
    connection: &Connection,
    shard: &Shard,
    limit: u32,
    consumer: Option<&str>,
) -> Result<Vec<PendingEntry>, Fault> {
    let command = Command::new("XPENDING").arg(&shard.stream).arg(shard.pipeline.group()).arg("-").arg("+").arg(limit);
    let reply = connection.call(command.args(consumer)).await?;
    let parse = |row: Reply| {
        let row: Vec<Reply> = row.into_array()?.collect();
        Some(PendingEntry {
            id: row.first()?.as_text()?.to_owned(),
            consumer: row.get(1)?.as_text()?.to_owned(),
            held_ms: row.get(2)?.as_int()?.try_into().ok()?,
            deliveries: row.get(3)?.as_int()?.try_into().ok()?,
        })
    };
    let rows = reply.into_array().ok_or_else(|| unexpected("XPENDING"))?;
    rows.map(|row| parse(row).ok_or_else(|| unexpected("XPENDING"))).collect()
}

impl Report for Pending {
    fn show(&self, page: &mut Page) {
        for (n, stream) in self.streams.iter().enumerate() {
            if n > 0 {
                page.line("");
            }
            let oldest = match (&stream.oldest, stream.oldest_ms) {
                (Some(id), Some(ms)) => format!(", the oldest {id}, added {} ago", lasting_ms(ms)),
                _ => String::new(),
            };
            let entries = plural(stream.entries, "entry", "entries");
            page.toned(
                Tone::Head,
                format!("{} {}: {entries} pending{oldest}", stream.pipeline, printable(&stream.stream)),
            );
            let rows: Vec<Vec<String>> = stream
                .consumers
                .iter()
                .map(|consumer| {
                    let state = if consumer.alive { "connected" } else { "gone" };
                    vec![printable(&consumer.name), count(consumer.entries), lasting_ms(consumer.idle_ms), state.into()]
                })
                .collect();
            if !rows.is_empty() {
                page.table(&["consumer", ">holds", ">idle", "state"], &rows);
            }
            let rows: Vec<Vec<String>> = stream
                .list
                .iter()
                .map(|entry| {
                    vec![
                        entry.id.clone(),
                        printable(&entry.consumer),
                        lasting_ms(entry.held_ms),
                        count(entry.deliveries),
                    ]
                })
                .collect();
            if !rows.is_empty() {
                page.table(&["entry", "consumer", ">held", ">deliveries"], &rows);
            }
        }
    }
}
