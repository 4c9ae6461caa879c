//! Reasons: what of a look is not as it should be, how bad that is, and what to do. Pure.
//!
//! Takes a [`Look`]; gives a [`Reason`] for each thing that somebody should know, worst first. It cannot fail.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::model::pipeline::Pipeline;
use crate::ops::columns::{count, lasting, lasting_ms, plural, printable};
use crate::ops::observe::postgres::Books;
use crate::ops::observe::valkey::Stream;
use crate::ops::observe::{Look, Seen};
use crate::presence::{Accepted, Finding, Presence, State};
use crate::retry::{Fault, judge};

/// What is too much.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How old an unsettled entry may be.
    pub max_age: Duration,
    /// How long a consumer may be silent before its peers take what it holds.
    pub dead_after: Duration,
}

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is well.
    Ok,
    /// Worth knowing: nothing waits because of it.
    Notice,
    /// Entries wait, or will.
    Degraded,
    /// Neither server can be reached.
    Down,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Reason {
    /// How bad it is.
    pub severity: Severity,
    /// One word, for programs.
    pub code: &'static str,
    /// The pipeline it is about; none where it is about a server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<String>,
    /// The stream it is about; none where it is about all of a pipeline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// What it is, for people.
    pub words: String,
    /// What to do.
    pub next_step: String,
}

impl Reason {
    fn new(severity: Severity, code: &'static str, words: impl Into<String>, next_step: impl Into<String>) -> Reason {
        Reason { severity, code, pipeline: None, stream: None, words: words.into(), next_step: next_step.into() }
    }

    fn of(self, pipeline: &Pipeline) -> Reason {
        Reason { pipeline: Some(pipeline.name.clone()), ..self }
    }

    fn at(self, seen: &Seen) -> Reason {
        Reason { stream: Some(seen.shard.stream.clone()), ..self.of(&seen.shard.pipeline) }
    }
}

/// Every reason, worst first.
pub fn reasons(look: &Look, limits: &Limits) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let (valkey, postgres) = (look.valkey_fault(), look.books.as_ref().err());
    let severity = if valkey.is_some() && postgres.is_some() { Severity::Down } else { Severity::Degraded };
    if let Some(fault) = postgres {
        reasons.push(away(severity, "postgres_unavailable", fault));
    }
    if let Some(fault) = valkey {
        reasons.push(away(severity, "valkey_unavailable", fault));
    }
    if let Ok(Books { missing_migrations: missing @ 1.., .. }) = &look.books {
        let words = format!("the database lacks {}", plural(*missing as u64, "migration", "migrations"));
        reasons.push(Reason::new(Severity::Degraded, "not_migrated", words, "run `tidegate migrate`"));
    }
    for (pipeline, seen) in &look.pipelines {
        if let Some(pause) = look.books.as_ref().ok().and_then(|books| books.pause_of(&pipeline.name)) {
            let left =
                pause.left.map_or_else(|| "until it is resumed".into(), |left| format!("for {} more", lasting(left)));
            let why = pause.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            let words = format!("paused by an operator {} ago{why}, {left}", lasting(pause.lasted));
            let next = format!("run `tidegate resume {}`", pipeline.name);
            reasons.push(Reason::new(Severity::Degraded, "paused", words, next).of(pipeline));
        }
        for seen in seen {
            if let Ok(stream) = &seen.stream {
                of_stream(look, seen, stream, limits, &mut reasons);
            }
        }
        letters(look, pipeline, seen, &mut reasons);
    }
    reasons.extend(findings(look).iter().map(of_finding));
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.severity));
    // The same fault of several shards, or of several processes, is said once.
    let mut said = Vec::new();
    reasons.retain(|reason| {
        let is_new = !said.contains(&(reason.code, reason.pipeline.clone(), reason.words.clone()));
        said.push((reason.code, reason.pipeline.clone(), reason.words.clone()));
        is_new
    });
    reasons
}

/// What keeps a daemon from starting and is there, as the daemons tell. Each is told once.
pub fn findings(look: &Look) -> Vec<Finding> {
    let streams = look.pipelines.iter().flat_map(|(_, seen)| seen).filter_map(|seen| seen.stream.as_ref().ok());
    let told = streams.flat_map(|stream| stream.processes.iter().flatten()).flat_map(|process| &process.findings);
    let mut findings: Vec<Finding> = Vec::new();
    for finding in told {
        if !findings.contains(finding) {
            findings.push(finding.clone());
        }
    }
    findings
}

fn of_finding(Finding { finding, evidence, accepted, until, reason, ends_soon }: &Finding) -> Reason {
    // Whoever may write to Valkey may have said it.
    let [finding, evidence] = [finding, evidence].map(|text| printable(text));
    let [until, why] = [until, reason].map(|text| printable(text.as_deref().unwrap_or("?")));
    match accepted {
        Accepted::InForce if *ends_soon => {
            let words = format!("{finding} is accepted until {until} ({why}), 7 days more at the most: {evidence}");
            let next = "correct it before then, as `tidegate doctor` says, or write a later until in [[doctor.accept]]: afterwards daemons go on, and \
                        `tidegate run` refuses to start";
            Reason::new(Severity::Notice, "acceptance_ends_soon", words, next)
        }
        Accepted::InForce => {
            let words = format!("{finding} is accepted until {until} ({why}): {evidence}");
            let next = "correct it before then, as `tidegate doctor` says: no daemon starts with it afterwards";
            Reason::new(Severity::Notice, "accepted", words, next)
        }
        Accepted::Expired => {
            let words = format!("{finding} was accepted until {until} ({why}), and that is over: {evidence}");
            let next = "correct it, as `tidegate doctor` says, or write a later until in [[doctor.accept]]; until then no daemon starts";
            Reason::new(Severity::Degraded, "acceptance_expired", words, next)
        }
        Accepted::No => {
            let words = format!("{finding} is not accepted: {evidence}");
            let next = "correct it, as `tidegate doctor` says; until then no daemon starts";
            Reason::new(Severity::Degraded, "not_accepted", words, next)
        }
    }
}

fn away(severity: Severity, code: &'static str, fault: &Fault) -> Reason {
    Reason::new(severity, code, fault.to_string(), judge(fault, u32::MAX).advice)
}

fn of_stream(look: &Look, seen: &Seen, stream: &Stream, limits: &Limits, reasons: &mut Vec<Reason>) {
    let processes = stream.processes.as_deref().unwrap_or_default();
    let worst = processes.iter().filter(|process| matches!(process.state, State::Halted | State::Interrupted));
    if let Some(process) = worst.max_by_key(|process| (process.state == State::Halted, process.lasted_ms)) {
        reasons.push(stands(process).at(seen));
    }
    let into: BTreeMap<&str, &str> =
        processes.iter().filter_map(|process| Some((process.postgres.as_deref()?, &*process.process))).collect();
    if into.len() > 1 {
        let each: Vec<String> =
            into.iter().map(|(postgres, process)| printable(&format!("{process} into {postgres}"))).collect();
        let words =
            format!("daemons flush into several databases, and each has a part of the increments: {}", each.join(", "));
        let next = "stop those whose postgres.url is wrong; what they have flushed is in the tables of their database";
        reasons.push(Reason::new(Severity::Degraded, "several_databases", words, next).at(seen));
    }
    let is_read = stream.is_read();
    let is_registered = look.books.as_ref().is_ok_and(|books| books.lane_of(&seen.shard).is_some());
    if !is_read {
        let next = "start `tidegate run`, or look why it has stopped";
        let words = match stream.backlog() {
            0 => "no daemon is at work".to_owned(),
            backlog => format!("no daemon is at work, and {} unsettled", are(backlog)),
        };
        reasons.push(Reason::new(Severity::Degraded, "no_daemon", words, next).at(seen));
    }
    if stream.length.is_some() && stream.group.is_none() && is_read && stream.backlog() > 0 {
        let words =
            format!("the group {} is missing; it is created again at the stream's start", seen.shard.pipeline.group());
        reasons.push(
            Reason::new(Severity::Notice, "no_group", words, "wait a moment; what was flushed is recognised").at(seen),
        );
    }
    if stream.length.is_none() && is_registered && is_read {
        let words =
            "the stream does not exist (FLUSHALL, DEL, a restart without persistence?, or nothing was produced yet)";
        reasons.push(
            Reason::new(Severity::Notice, "no_stream", words, "nothing, if producers have added nothing since")
                .at(seen),
        );
    }
    let age = Duration::from_millis(stream.age_ms());
    if stream.backlog() > 0 && age > limits.max_age {
        let words = format!("{} unsettled, the oldest for {}", are(stream.backlog()), lasting(age));
        let next = "see `tidegate pending` for who holds what; with all workers busy, look at PostgreSQL's load";
        reasons.push(Reason::new(Severity::Degraded, "behind", words, next).at(seen));
    }
    let of_dead: u64 = stream.consumers.iter().filter(|c| !c.alive).map(|c| c.entries).sum();
    let longest = stream.consumers.iter().filter(|c| !c.alive && c.entries > 0).map(|c| c.idle_ms).max().unwrap_or(0);
    if of_dead > 0 && Duration::from_millis(longest) > limits.dead_after * 2 {
        let words = format!(
            "{} held by consumers that have gone, for {}, and nobody has taken them over",
            are(of_dead),
            lasting_ms(longest)
        );
        let next = "see `tidegate pending`; a running daemon takes them over after reclaim.dead_after";
        reasons.push(Reason::new(Severity::Degraded, "not_reclaimed", words, next).at(seen));
    }
    if stream.processes.is_none() {
        let words = "what the daemons say of themselves may not be read by this user of Valkey";
        let next = "grant `~tidegate:presence:* +hgetall` (docs/permissions.md)";
        reasons.push(Reason::new(Severity::Notice, "cannot_see_daemons", words, next));
    }
    let lost = look.books.as_ref().ok().and_then(|books| books.lane_of(&seen.shard)).and_then(|lane| lane.ledger);
    if let Some(size) = lost.filter(|size| size.lost > 0) {
        let words = format!(
            "Valkey has lost {} that were flushed: PostgreSQL keeps them",
            plural(size.lost, "entry", "entries")
        );
        let next = "compare the counters with `tidegate audit`";
        reasons.push(Reason::new(Severity::Notice, "lost_upstream", words, next).at(seen));
    }
    let unflushed: u64 = processes.iter().map(|process| process.lost).sum();
    if unflushed > 0 {
        let words = format!("Valkey has lost {} before they were flushed", plural(unflushed, "entry", "entries"));
        let next = "the daemon's log names them; compare the counters with `tidegate audit`";
        reasons.push(Reason::new(Severity::Degraded, "lost_unflushed", words, next).at(seen));
    }
}

/// Entries, as the subject of a sentence.
fn are(entries: u64) -> String {
    if entries == 1 { "1 entry is".into() } else { format!("{} entries are", count(entries)) }
}

fn stands(process: &Presence) -> Reason {
    let (code, word) = match process.state {
        State::Halted => ("halted", "halted"),
        _ => ("interrupted", "interrupted"),
    };
    let fault = process.fault.as_deref().unwrap_or("the daemon's log says why");
    let words = format!("{word} for {}: {fault}", lasting_ms(process.lasted_ms + process.said_ms_ago));
    let next = process.advice.clone().unwrap_or_else(|| "see the daemon's log".into());
    Reason::new(Severity::Degraded, code, words, next)
}

fn letters(look: &Look, pipeline: &Pipeline, seen: &[Seen], reasons: &mut Vec<Reason>) {
    let Ok(books) = &look.books else { return };
    let lanes = seen.iter().filter_map(|seen| books.lane_of(&seen.shard));
    let open: u64 = lanes.flat_map(|lane| lane.letters.values()).sum();
    if open > 0 {
        let words = format!("{} open", plural(open, "dead letter is", "dead letters are"));
        let next = format!("see `tidegate dead list --pipeline {}`", pipeline.name);
        reasons.push(Reason::new(Severity::Notice, "dead_letters", words, next).of(pipeline));
    }
}
