//! Streams: what the doctor makes of each stream, its group and its last entries.
//!
//! Takes what was seen, and asks both servers for more; puts findings. What may not be asked is a finding of its own and no failure.

use std::time::Duration;

use super::{Findings, Severity};
use crate::care::session::Session;
use crate::care::trim;
use crate::client::OP_FIELD;
use crate::config::Config;
use crate::flow::rows::Plan;
use crate::flow::{judge, ledger, strangers};
use crate::lanes::{self, Identity};
use crate::model::entry::{Canonical, EntryId, write_canonical};
use crate::model::pipeline::{Delivery, Pipeline};
use crate::ops::columns::{lasting, lasting_ms, plural};
use crate::ops::observe::valkey::{Consumer, Stream};
use crate::ops::observe::{Look, Seen, Servers};
use crate::retry::Fault;
use crate::valkey::{Command, Delivered, Link, unexpected};

/// How many of a stream's last entries are looked at.
const SAMPLE: usize = 100;
/// How many of the entries before the group's position are compared with the ledger, at the stream's start and right before the position.
const COMPARED: usize = 2_000;

pub(super) async fn examine(
    config: &Config,
    pipelines: &[&Pipeline],
    servers: &mut Servers,
    look: &Look,
    findings: &mut Findings,
) {
    slots(pipelines, servers, findings);
    for (pipeline, seen) in &look.pipelines {
        for seen in seen {
            let stream = match &seen.stream {
                Ok(stream) => stream,
                Err(fault) => {
                    findings.unknown("D7", fault);
                    continue;
                }
            };
            of_stream(config, pipeline, seen, stream, findings);
            if let Err(fault) = others(config, servers, pipeline, seen, stream, findings).await {
                findings.unknown("D21", &fault);
            }
            if let Err(fault) = group(config, servers, pipeline, seen, stream, findings).await {
                findings.unknown("D7", &fault);
            }
            if let Err(fault) = producers(servers, pipeline, seen, stream, findings).await {
                findings.unknown("D13", &fault);
            }
        }
    }
    if look.valkey_fault().is_none() {
        findings.rest(&[
            ("D8", "nobody who has gone holds entries for longer than a running daemon needs to take them over"),
            ("D9", "no entry waits for longer than a worker's death explains"),
            ("D10", "nothing was cut unread, and Valkey tells how many entries are not read"),
            ("D21", "no other group holds back trimming"),
        ]);
    }
}

/// Whether producers can write a counter and its stream in one step.
fn slots(pipelines: &[&Pipeline], servers: &Servers, findings: &mut Findings) {
    if !servers.valkey.is_cluster() {
        return findings.well("D12", "this is no cluster");
    }
    for pipeline in pipelines.iter().filter(|pipeline| !pipeline.is_in_one_slot()) {
        let (stream, counter) = (pipeline.stream_of(0), pipeline.counter_of("…"));
        let evidence = format!("the stream {stream} and its counters {counter} lie in different slots of the cluster");
        let fix = format!(
            "give pipelines.{}.stream a hash tag, in daemons and producers, such as {{{stream}}} (docs/cluster.md, \"Streams and their slots\")",
            pipeline.name
        );
        findings.of(pipeline, "D12", Severity::Warning, evidence, fix);
    }
    findings.rest(&[("D12", "each counter lies in the slot of its stream")]);
}

/// How long an entry waits at the most when nothing worse happens than its worker's death: until that is noticed, until somebody looks, and until
/// the entry is flushed.
fn longest_wait(config: &Config, pipeline: &Pipeline, noticed: Duration) -> Duration {
    let noticed = match pipeline.delivery {
        Delivery::Group => noticed,
        // Who takes over begins as a member of the group, among members that may have died, too.
        Delivery::Exclusive => noticed.max(config.exclusive.lease),
    };
    noticed + config.reclaim.sweep_every + config.postgres.statement_timeout
}

fn of_stream(config: &Config, pipeline: &Pipeline, seen: &Seen, stream: &Stream, findings: &mut Findings) {
    let name = &seen.shard.stream;
    dead_consumers(config, pipeline, name, stream, findings);
    let longest = longest_wait(config, pipeline, config.reclaim.dead_after);
    if stream.backlog() > 0 && Duration::from_millis(stream.age_ms()) > longest {
        let evidence = format!(
            "the oldest unsettled entry of {name} was added {} ago; more than {} is not explained by the death of a worker",
            lasting_ms(stream.age_ms()),
            lasting(longest)
        );
        findings.of(pipeline, "D9", Severity::Warning, evidence, "see `tidegate status` for why");
    }
    if let Some(cut) = stream.cut_unread() {
        let evidence =
            format!("{} of {name} cut from the stream before the group had read them", plural(cut, "entry", "entries"));
        let mut fix = "let nobody but Tidegate trim the stream (no MAXLEN or MINID in XADD, no XTRIM); `tidegate audit --full` finds the counters that are concerned".to_owned();
        // Valkey goes on counting what is gone. A position that was read meanwhile is set back by this, and what comes again is recognised.
        if let (Some(group), Some(added)) = (&stream.group, stream.added) {
            let read = added.saturating_sub(group.lag.unwrap_or(0).saturating_sub(cut));
            fix.push_str(&format!(
                "; when that is done: XGROUP SETID {name} {} {} ENTRIESREAD {read}",
                pipeline.group(),
                group.last_delivered
            ));
        }
        findings.of(pipeline, "D10", Severity::Warning, evidence, fix);
    } else if stream.first_undelivered.is_some() && stream.group.as_ref().is_some_and(|group| group.lag.is_none()) {
        let evidence = format!("Valkey cannot tell how many entries of {name} the group has not read");
        findings.of(pipeline, "D10", Severity::Info, evidence, "nothing: Tidegate counts them itself");
    }
}

/// Dead consumers that hold entries, where nobody will take them over, or should have. A worker shows a sign of life several times in each
/// `reclaim.gone_after`, so a dead one has been silent for as long as it is dead.
fn dead_consumers(config: &Config, pipeline: &Pipeline, name: &str, stream: &Stream, findings: &mut Findings) {
    let is_read = stream.is_read();
    let is_left = |consumer: &&Consumer| {
        let noticed = if consumer.gone { config.reclaim.gone_after } else { config.reclaim.dead_after };
        !is_read || Duration::from_millis(consumer.idle_ms) > longest_wait(config, pipeline, noticed)
    };
    let dead = stream.consumers.iter().filter(|consumer| !consumer.alive && consumer.entries > 0);
    let left: Vec<_> = dead.filter(is_left).collect();
    let Some(longest) = left.iter().map(|consumer| consumer.idle_ms).max() else { return };
    let entries: u64 = left.iter().map(|consumer| consumer.entries).sum();
    let (why, fix) = match is_read {
        false => ("no daemon runs", "start a daemon, and keep it running: it takes them over; see `tidegate pending`"),
        true => (
            "no running daemon has taken them over",
            "see `tidegate status` and the daemon's log for why; `tidegate pending` tells who holds what",
        ),
    };
    let evidence = format!(
        "{} of {name} held by {} whose connection has gone, for {}, and {why}",
        plural(entries, "entry", "entries"),
        plural(left.len() as u64, "consumer", "consumers"),
        lasting_ms(longest)
    );
    findings.of(pipeline, "D8", Severity::Warning, evidence, fix);
}

/// Other groups that hold back trimming: whose next entry should have left the stream.
async fn others(
    config: &Config,
    servers: &mut Servers,
    pipeline: &Pipeline,
    seen: &Seen,
    stream: &Stream,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let name = &seen.shard.stream;
    let ours: Vec<String> = config.pipelines.iter().map(Pipeline::group).collect();
    let retention = config.trim.retention.as_millis() as u64;
    for group in stream.groups.iter().filter(|group| !ours.contains(&group.name)) {
        if group.last_delivered >= stream.last_generated {
            continue;
        }
        let link = servers.link(name).await?;
        let Some(next) = id_of(&link, NEXT, name, group.last_delivered, 1).await? else { continue };
        let behind = stream.now_ms.saturating_sub(next.ms);
        if behind > retention {
            let evidence =
                format!("group {} of {name} has not read what was added {} ago", group.name, lasting_ms(behind));
            let fix = format!("if nobody uses it any more: `tidegate group repair --group {}`", group.name);
            findings.of(pipeline, "D21", Severity::Warning, evidence, fix);
        }
    }
    Ok(())
}

/// Whether what lies before the group's position is in the ledger: if not, somebody moved the group past it.
async fn group(
    config: &Config,
    servers: &mut Servers,
    pipeline: &Pipeline,
    seen: &Seen,
    stream: &Stream,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let name = &seen.shard.stream;
    let Some(group) = &stream.group else {
        if stream.length.is_some_and(|length| length > 0) {
            let evidence = format!("stream {name} has entries, and no group {}", pipeline.group());
            findings.of(
                pipeline,
                "D7",
                Severity::Warning,
                evidence,
                "start `tidegate run`: it creates the group at the stream's start",
            );
        }
        return Ok(());
    };
    let source = &config.valkey.source;
    let identity = Identity::of(source, &seen.shard);
    let lane = match servers.database.run(async |c| lanes::find(c, &identity).await).await {
        Ok(lane) => lane,
        // PostgreSQL's own checks say so.
        Err(_) => return Ok(()),
    };
    let position = group.oldest_pending.and_then(|id| id.number().checked_sub(1).map(EntryId::from_number));
    let position = position.unwrap_or(group.last_delivered).min(group.last_delivered);
    let mut session = Session::open(&servers.valkey.of_stream(name), "tidegate:doctor").await?;
    let newest = id_of(&session.link, NEWEST, name, position, COMPARED).await?;
    let Some(newest) = newest else { return Ok(()) };
    // A group is as likely moved past the oldest entries as past the newest.
    let (mut next, mut is_whole) = (EntryId::MIN, true);
    for from in [EntryId::MIN, newest] {
        is_whole &= from <= next;
        let page = trim::page(&mut session, name, from.max(next), position, COMPARED).await?;
        let (Some(first), Some(last)) = (page.entries().first(), page.entries().last()) else { continue };
        let (first, last) = (first.id, last.id);
        next = behind(last);
        let rows = match lane {
            Some(lane) => servers.database.run(async |c| ledger::rows_within(c, lane, first, last).await).await?,
            None => Vec::new(),
        };
        let found = judge::examine(&page, &rows);
        if let Some(&index) = found.new.first() {
            let from = page.entries()[index].id;
            let evidence = format!(
                "{} of {name} lie before the group's position and are not in the ledger, from {from} on (was the group created at $, or were entries acknowledged by hand?)",
                plural(found.new.len() as u64, "entry", "entries")
            );
            let fix = format!("tidegate replay --pipeline {} --since {from} --yes", pipeline.name);
            findings.of(pipeline, "D7", Severity::Error, evidence, fix);
            return Ok(());
        }
        if let Some(&index) = found.unjudgeable.last() {
            let evidence = format!(
                "of {} in {name} the ledger no longer has the digests, so nobody can tell whether they were flushed (was Valkey restored from an old copy?)",
                plural(found.unjudgeable.len() as u64, "entry", "entries")
            );
            let fix = format!(
                "`tidegate audit --full` tells which counters differ, and its --repair corrects them; then: XTRIM {name} MINID {}",
                behind(page.entries()[index].id)
            );
            findings.of(pipeline, "D15", Severity::Warning, evidence, fix);
            return Ok(());
        }
    }
    let which = if is_whole { "what lies".into() } else { format!("the first and the last {COMPARED} entries") };
    findings.well("D7", format!("{}: the ledger has {which} before the group's position", pipeline.name));
    Ok(())
}

/// The least id behind this one.
fn behind(id: EntryId) -> EntryId {
    EntryId::from_number(id.number().saturating_add(1))
}

/// Answers the first of the last so many entries up to an id.
const NEWEST: &str = "
local found = redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', ARGV[2])
return found[#found] and found[#found][1] or ''";

/// Answers the last of the first so many entries behind an id.
const NEXT: &str = "
local found = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
return found[#found] and found[#found][1] or ''";

/// The id that a script answers; none if there is none. What entries hold is never sent.
async fn id_of(link: &Link, script: &str, stream: &str, from: EntryId, count: usize) -> Result<Option<EntryId>, Fault> {
    let reply = link.commands().call(Command::new("EVAL").arg(script).arg(1).arg(stream).arg(from).arg(count)).await?;
    Ok(reply.as_text().ok_or_else(|| unexpected("EVAL"))?.parse().ok())
}

/// Looks at the last entries of a stream.
async fn producers(
    servers: &mut Servers,
    pipeline: &Pipeline,
    seen: &Seen,
    stream: &Stream,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let name = &seen.shard.stream;
    if stream.length.unwrap_or(0) == 0 {
        return Ok(());
    }
    // A zone that is not known keeps the daemon from starting, which says so.
    let Ok(plan) = Plan::of(pipeline) else { return Ok(()) };
    let link = servers.link(name).await?;
    let (bounds, mut sampled, mut with_op, mut plain, mut bad) =
        (crate::valkey::resp::Bounds { entry: 64 << 10, kept: 1 << 10 }, 0u64, 0u64, 0u64, None);
    let (mut wire, _) = link.open_wire("tidegate:doctor", bounds).await?;
    wire.send(&Command::new("XREVRANGE").arg(name).arg("+").arg("-").arg("COUNT").arg(SAMPLE));
    let read = wire.run(Duration::ZERO, |delivered| {
        if let Delivered::Whole(id, strings) = delivered {
            let mut bytes = Vec::new();
            write_canonical(&mut bytes, id, strings);
            let entry = Canonical(&bytes);
            sampled += 1;
            with_op += u64::from(entry.fields().any(|(name, _)| name == OP_FIELD.as_bytes()));
            plain += u64::from(pipeline.is_managed() && !strangers::is_marked(entry));
            if let Some(death) = plan.refusal_of(entry) {
                bad.get_or_insert((id, death.detail));
            }
        }
        std::ops::ControlFlow::Continue(())
    });
    read.await?;
    if let Some((id, why)) = &bad {
        let evidence = format!("entry {id} of {name} cannot be applied: {why}");
        findings.of(
            pipeline,
            "D13",
            Severity::Warning,
            evidence,
            "correct the producer, or the fields that the pipeline names",
        );
    }
    if plain > 0 {
        let evidence = format!(
            "{plain} of the last {sampled} entries of {name} came from plain producers, whose INCRBY may begin at zero again"
        );
        let fix = "have all producers of a managed pipeline call the functions (docs/functions.md)";
        findings.of(pipeline, "D13", Severity::Warning, evidence, fix);
    }
    if with_op < sampled {
        let evidence =
            format!("{} of the last {sampled} entries of {name} have no field {OP_FIELD}", sampled - with_op);
        let fix = format!("have producers add a field {OP_FIELD}, unique for each increment");
        findings.of(pipeline, "D13", Severity::Info, evidence, fix);
    } else if bad.is_none() && plain == 0 {
        findings
            .well("D13", format!("the last {sampled} entries of {name} can be applied and have a field {OP_FIELD}"));
    }
    Ok(())
}
