//! `tidegate replay`: what the stream still holds is delivered once more, and the ledger lets through what it lacks.
//!
//! For a PostgreSQL that was restored to the past, or failed over with loss: its ledger is exactly as old as its counters, so a
//! replay applies exactly what was lost, as far back as the stream's retention reaches. Takes a pipeline and a moment; gives
//! an account of what would be read again, and with `--yes` rewinds the group.
//!
//! No pause is needed. In one transaction of Valkey every connection of the pipeline's workers is closed and the group is
//! set back, so an acknowledgement from before the restore cannot arrive behind it; whoever connects later acknowledges only
//! what is in the restored database.

use std::collections::HashSet;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use super::complete::{Name, by};
use super::context::one;
use super::{Context, Exit, Failure};
use crate::care::session::Session;
use crate::care::trim;
use crate::client::postgres::lineage;
use crate::config::{Config, Needs};
use crate::flow::judge;
use crate::flow::ledger;
use crate::functions;
use crate::functions::gate::{self, Word};
use crate::lanes::{self, Identity, LaneId};
use crate::model::entry::EntryId;
use crate::model::names;
use crate::model::pipeline::{Delivery, Pipeline, Shard};
use crate::postgres::Database;
use crate::retry::Fault;
use crate::valkey::{Command, Link, Reply, info, unexpected};

/// Entries compared with the ledger in one step.
const STEP: usize = 1_000;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// From where on: an entry's id (1700000000000-0), a time (2026-01-31T12:00:00Z), or how long ago (30m)
    #[arg(long, value_name = "WHEN")]
    pub since: Since,
    /// The pipeline; may be left out where there is only one
    #[arg(long, value_name = "NAME", add = by(Name::Pipeline))]
    pub pipeline: Option<String>,
    /// Do it; without this nothing is changed
    #[arg(long)]
    pub yes: bool,
}

/// A moment of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// This entry and all behind it.
    Id(EntryId),
    /// Entries added from then on.
    Time(SystemTime),
    /// Entries added so long ago, or later.
    Ago(Duration),
}

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Since, String> {
        if let Ok(id) = text.parse() {
            return Ok(Since::Id(id));
        }
        if let Ok(ago) = humantime::parse_duration(text) {
            return Ok(Since::Ago(ago));
        }
        humantime::parse_rfc3339_weak(text).map(Since::Time).map_err(|_| {
            format!("{text:?} is no moment: write an id such as 1700000000000-0, a time such as 2026-01-31T12:00:00Z, or how long ago, such as 30m")
        })
    }
}

impl Since {
    /// The lowest id at or after this moment, by the server's clock.
    fn id(self, now_ms: u64) -> EntryId {
        let ms = match self {
            Since::Id(id) => return id,
            Since::Time(time) => time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
            Since::Ago(ago) => now_ms.saturating_sub(ago.as_millis() as u64),
        };
        EntryId { ms, seq: 0 }
    }
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let pipeline = one(&config, opts.pipeline.as_deref())?;
    let valkey = config.valkey.address()?;
    let database = Database::new(config.postgres.address()?, 1);
    let outcome = async {
        let shards = database.run(async |c| lanes::shards(c, &config.valkey.source, pipeline).await).await?;
        // Each shard has a stream, a group and a past of its own; one that cannot be replayed keeps no other one from it.
        let (mut worst, is_one) = (Exit::Ok, shards.len() == 1);
        for shard in &shards {
            let mut session = Session::open(&valkey.of_stream(&shard.stream), "tidegate:replay").await?;
            match replay(&opts, context, &config, (shard, pipeline.shards), &mut session, &database).await {
                Ok(_) => {}
                Err(failure) if failure.exit() == Exit::BadInput && !is_one => {
                    context.say(&failure.told_by("replay").unwrap_or_default());
                    worst = Exit::BadInput;
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(worst)
    };
    let outcome = outcome.await;
    database.close().await;
    outcome
}

/// How far back a stream and its group reach.
struct Reach {
    now_ms: u64,
    first: Option<EntryId>,
    /// Whether every entry that was ever added is still there.
    complete: bool,
    /// The highest id that somebody deleted by itself.
    deleted: EntryId,
    delivered: Option<EntryId>,
}

async fn replay(
    opts: &Opts,
    context: &Context,
    config: &Config,
    (shard, shards): (&Shard, u16),
    session: &mut Session,
    database: &Database,
) -> Result<Exit, Failure> {
    let refused = |words: &str| Err(Failure::new(Exit::BadInput, words));
    let pipeline = &*shard.pipeline;
    let (stream, group) = (&pipeline.stream, pipeline.group());
    let Some(reach) = reach(&session.link, stream, &group).await? else {
        return refused(&format!("there is no stream {stream}: nothing to replay"));
    };
    let Some(delivered) = reach.delivered else {
        let words =
            format!("there is no group {group}: the daemon creates it at the stream's start, and reads everything");
        return refused(&words);
    };
    let since = opts.since.id(reach.now_ms);
    // Who reads alone moves the group after its commits: what was settled and not yet moved over comes again, whenever it was added.
    let is_ahead = since > delivered;
    if is_ahead && pipeline.delivery == Delivery::Group {
        let words = format!("nothing has been delivered since {}: nothing to replay", show(since));
        return refused(&words);
    }
    let since = if is_ahead { delivered.next().unwrap_or(delivered) } else { since };
    let retained_ms = reach.now_ms.saturating_sub(config.trim.retention.as_millis() as u64);
    let covered =
        is_ahead || reach.complete || reach.first.is_some_and(|first| since >= first) || since.ms >= retained_ms;
    if !covered || since <= reach.deleted && !is_ahead {
        let from = reach.first.map_or_else(|| "nothing".into(), show);
        let words = format!(
            "the stream does not reach back to {}: it holds {from} and later; what was trimmed or deleted before cannot be read \
             again. Say --since and that id to replay what there is",
            show(since)
        );
        return refused(&words);
    }
    let source = &config.valkey.source;
    let identity = Identity::of(source, shard);
    // None: PostgreSQL was restored to a time before the pipeline, and its ledger lacks everything.
    let lane = database.run(async |c| lanes::find(c, &identity).await).await?;
    let account = account(session, database, lane, stream, since, delivered).await?;
    context.write(&format!(
        "pipeline {}: stream {stream}, group {group}\n\
         since           {}\n\
         up to           {}, the last that was delivered\n\
         read again      {} entries, of which\n  \
           {:>12}  the ledger has: recognised, nothing changes\n  \
           {:>12}  the ledger lacks: applied\n  \
           {:>12}  the ledger cannot judge: kept as dead letters\n",
        pipeline.name,
        show(since),
        show(delivered),
        account.known + account.new + account.unjudgeable,
        account.known,
        account.new,
        account.unjudgeable
    ))?;
    if !opts.yes {
        context.write("nothing was changed; add --yes to do it\n")?;
        return Ok(Exit::Ok);
    }
    let closed = rewind(&session.link, source, pipeline, since).await?;
    // Behind the rewind, which closes the gate by itself: what is brought back before it is refused or dropped.
    if pipeline.is_managed() {
        doubt_values(&session.link, database, shards, pipeline).await?;
    }
    context.write(&format!("rewound; {closed} connections of workers were closed, and they read on from there\n"))?;
    Ok(Exit::Ok)
}

/// What Valkey has of the counters may be older or newer than what the replay makes of the table: all values are dropped by the daemon. From now on
/// this PostgreSQL is the one that they are brought back from.
async fn doubt_values(link: &Link, database: &Database, shards: u16, pipeline: &Pipeline) -> Result<(), Fault> {
    let (connection, keys) = (link.commands(), pipeline.keys_of(0));
    functions::load(connection).await?;
    let lineage = database.run(async |c| lineage(c, shards).await).await?;
    gate::open(connection, &keys, &lineage, Word::Accept).await?;
    gate::close(connection, &keys, "replay").await
}

/// An id and its moment.
fn show(id: EntryId) -> String {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(id.ms));
    // Later than the year 9999, this form ends.
    match time.filter(|_| id.ms < 253_402_300_800_000) {
        Some(time) => format!("{id} ({})", humantime::format_rfc3339_seconds(time)),
        None => id.to_string(),
    }
}

async fn reach(link: &Link, stream: &str, group: &str) -> Result<Option<Reach>, Fault> {
    let Some(told) = info::stream(link.commands(), stream).await? else { return Ok(None) };
    let delivered = info::group(link.commands(), stream, group).await?.map(|group| group.last_delivered);
    let now_ms = info::time_ms(link.commands()).await?;
    let complete = told.added == Some(told.length);
    Ok(Some(Reach { now_ms, first: told.first, complete, deleted: told.deleted, delivered }))
}

/// What a replay would meet.
#[derive(Debug, Default)]
struct Account {
    known: usize,
    new: usize,
    unjudgeable: usize,
}

async fn account(
    session: &mut Session,
    database: &Database,
    lane: Option<LaneId>,
    stream: &str,
    since: EntryId,
    up_to: EntryId,
) -> Result<Account, Fault> {
    let (mut account, mut from) = (Account::default(), Some(since));
    while let Some(start) = from.filter(|start| *start <= up_to) {
        let page = trim::page(session, stream, start, up_to, STEP).await?;
        let (Some(first), Some(last)) = (page.entries().first(), page.entries().last()) else { break };
        let rows = match lane {
            Some(lane) => database.run(async |c| ledger::rows_within(c, lane, first.id, last.id).await).await?,
            None => Vec::new(),
        };
        let findings = judge::examine(&page, &rows);
        account.known += findings.known.len();
        account.new += findings.new.len();
        account.unjudgeable += findings.unjudgeable.len();
        from = last.id.next().filter(|_| page.len() == STEP);
    }
    Ok(account)
}

/// Closes the connections of the pipeline's workers and sets the group back, in one step; gives how many were closed.
///
/// Every connection that names the source and the pipeline is closed, whether or not its consumer is still in the group: what
/// it sent before a restore must not arrive after it. Workers of versions that name the consumer alone are found by the group.
async fn rewind(link: &Link, source: &str, pipeline: &Pipeline, since: EntryId) -> Result<usize, Fault> {
    let (stream, group) = (&*pipeline.stream, &*pipeline.group());
    let consumers = info::consumers(link.commands(), stream, group).await?;
    let former: HashSet<String> = consumers.iter().map(|c| names::former_connection(&c.name)).collect();
    let ours = names::connections_of(source, &pipeline.name);
    let peers = info::peers(link.commands(), None).await?;
    let ids: Vec<u64> = peers
        .into_iter()
        .filter(|peer| peer.name.starts_with(&ours) || former.contains(&peer.name))
        .map(|peer| peer.id)
        .collect();
    let before = since.number().checked_sub(1).map_or(EntryId::MIN, EntryId::from_number);
    link.commands().call(Command::new("MULTI")).await?;
    for id in &ids {
        link.commands().call(Command::new("CLIENT").arg("KILL").arg("ID").arg(id)).await?;
    }
    link.commands().call(Command::new("XGROUP").arg("SETID").arg(stream).arg(group).arg(before)).await?;
    let done = link.commands().call(Command::new("EXEC")).await?.into_array().ok_or_else(|| unexpected("EXEC"))?;
    // The last reply is XGROUP's.
    match done.last().and_then(Reply::into_refusal) {
        Some(fault) => Err(fault),
        None => Ok(ids.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_an_id_a_time_or_how_long_ago() {
        assert_eq!("17-3".parse(), Ok(Since::Id(EntryId { ms: 17, seq: 3 })));
        assert_eq!("30m".parse(), Ok(Since::Ago(Duration::from_secs(1800))));
        let time: Since = "1970-01-01T00:00:05Z".parse().expect("a time");
        assert_eq!(time.id(0), EntryId { ms: 5_000, seq: 0 });
        assert_eq!(Since::Ago(Duration::from_secs(2)).id(10_000), EntryId { ms: 8_000, seq: 0 });
        assert_eq!(Since::Ago(Duration::MAX).id(10_000), EntryId::MIN);
        assert!("yesterday".parse::<Since>().is_err_and(|words| words.contains("write an id")));
    }

    #[test]
    fn an_id_is_shown_with_its_moment_where_it_has_one() {
        assert_eq!(show(EntryId { ms: 5_000, seq: 1 }), "5000-1 (1970-01-01T00:00:05Z)");
        assert_eq!(show(EntryId::MAX), EntryId::MAX.to_string());
    }
}
