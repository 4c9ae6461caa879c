//! `tidegate trim --dry-run`: what a daemon would trim now, and what keeps it from trimming more.
//!
//! Takes pipelines; asks for the line as the caretaker does, counts what lies below it, and compares it with the ledger. Changes nothing: the
//! daemon trims by itself, every `trim.every`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::columns::{Page, Tone, count, lasting, plural, printable};
use super::complete::{Name, by};
use super::context::{Report, chosen};
use super::dead::show::added_at;
use super::observe::Servers;
use super::{Context, Exit, Failure};
use crate::care::session::Session;
use crate::care::trim::{self, Line};
use crate::config::{Config, Needs};
use crate::flow::{judge, ledger};
use crate::lanes::{self, Identity};
use crate::model::entry::EntryId;
use crate::model::pipeline::Shard;
use crate::retry::Fault;

/// Entries compared with the ledger in one step.
const STEP: usize = 5_000;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only the streams of these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Say what would be trimmed, and change nothing: the daemon trims by itself
    #[arg(long, required = true)]
    pub dry_run: bool,
}

/// What would be trimmed.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Trim {
    /// `trim.retention`, in seconds.
    pub retention_seconds: f64,
    /// Each stream.
    pub streams: Vec<TrimStream>,
}

/// What would be trimmed of a stream.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TrimStream {
    /// Its key.
    pub stream: String,
    /// Entries below this id would go; null where nothing can.
    pub below: Option<String>,
    /// How many entries would go.
    pub entries: u64,
    /// How many of those below the line the ledger does not know: they stop the trimmer.
    pub unknown: u64,
    /// What keeps it from trimming, or from trimming more; null where nothing but the retention does.
    pub held_by: Option<String>,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let mut servers = Servers::of(&config, "tidegate:trim")?;
    let named = chosen(&config, &opts.pipelines)?;
    // A stream that several pipelines read is trimmed for all of them at once.
    let mut by_stream: BTreeMap<String, Vec<Shard>> = BTreeMap::new();
    for pipeline in &config.pipelines {
        for shard in servers.shards(pipeline).await {
            by_stream.entry(shard.stream.clone()).or_default().push(shard);
        }
    }
    by_stream.retain(|_, shards| shards.iter().any(|shard| named.iter().any(|p| p.name == shard.pipeline.name)));
    let mut streams = Vec::new();
    for (stream, shards) in by_stream {
        let told = of_stream(&config, &mut servers, &stream, &shards).await;
        streams.push(told.map_err(|fault| fault.about(&stream))?);
    }
    context.print(&Trim { retention_seconds: config.trim.retention.as_secs_f64(), streams })?;
    Ok(Exit::Ok)
}

async fn of_stream(
    config: &Config,
    servers: &mut Servers,
    stream: &str,
    shards: &[Shard],
) -> Result<TrimStream, Fault> {
    let mut session = Session::open(&servers.valkey, "tidegate:trim").await?;
    let groups: Vec<String> = shards.iter().map(|shard| shard.pipeline.group()).collect();
    let mut told = TrimStream { stream: stream.to_owned(), below: None, entries: 0, unknown: 0, held_by: None };
    let at = match trim::line(&session.link, stream, &groups, config.trim.retention).await? {
        Line::Nothing => {
            told.held_by = Some("there is no stream, or no group on it".into());
            return Ok(told);
        }
        Line::Missing(group) => {
            told.held_by = Some(format!("the group {group} is missing: nobody knows what it has read"));
            return Ok(told);
        }
        Line::At { at, held_by, .. } => {
            told.held_by =
                held_by.map(|group| format!("the group {group} has not settled what is older than the retention"));
            at
        }
    };
    told.below = Some(at.to_string());
    let Some(last) = at.number().checked_sub(1).map(EntryId::from_number) else { return Ok(told) };
    let mut lanes = Vec::new();
    for shard in shards {
        let identity = Identity::of(&servers.source, shard);
        lanes.push((servers.database.run(async |c| lanes::find(c, &identity).await).await?, &shard.pipeline.name));
    }
    let mut from = Some(EntryId::MIN);
    while let Some(start) = from.filter(|start| *start <= last) {
        let page = trim::page(&mut session, stream, start, last, STEP).await?;
        let (Some(first), Some(end)) = (page.entries().first(), page.entries().last()) else { break };
        for (lane, pipeline) in &lanes {
            let rows = match lane {
                Some(lane) => {
                    servers.database.run(async |c| ledger::rows_within(c, *lane, first.id, end.id).await).await?
                }
                None => Vec::new(),
            };
            let unknown = judge::examine(&page, &rows).new;
            if let Some(&index) = unknown.first() {
                told.unknown += unknown.len() as u64;
                told.held_by.get_or_insert(format!(
                    "entries from {} on are not in the ledger of {pipeline}, and nobody has them pending: `tidegate replay --since {0}` flushes them",
                    page.entries()[index].id
                ));
            }
        }
        if told.unknown == 0 {
            told.entries += page.len() as u64;
        }
        from = end.id.next().filter(|_| page.len() == STEP);
    }
    Ok(told)
}

impl Report for Trim {
    fn show(&self, page: &mut Page) {
        let retention = std::time::Duration::try_from_secs_f64(self.retention_seconds).unwrap_or_default();
        page.line(format!("retention {}; nothing was changed", lasting(retention)));
        for stream in &self.streams {
            let below = stream.below.as_deref().map_or_else(String::new, |below| {
                let at = below.parse().ok().and_then(added_at).map(|at| format!(" ({at})")).unwrap_or_default();
                format!(" below {below}{at}")
            });
            let entries = plural(stream.entries, "entry", "entries");
            page.line(format!("{}: {entries} would go{below}", printable(&stream.stream)));
            if stream.unknown > 0 {
                page.toned(Tone::Bad, format!("  {} below the line are not in the ledger", count(stream.unknown)));
            }
            if let Some(held_by) = &stream.held_by {
                page.toned(Tone::Warn, format!("  held back: {}", printable(held_by)));
            }
        }
    }
}
