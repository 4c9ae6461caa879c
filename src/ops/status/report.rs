//! Report: a status as data, and as a page for people.
//!
//! Takes two looks; gives a [`Status`]. Rates are what happened between the two, by Valkey's clock. It cannot fail.

use serde::Serialize;

use super::reasons::{Limits, Reason, Severity, findings, reasons};
use crate::model::pipeline::Delivery;
use crate::ops::columns::{Page, Tone, bytes, count, count_or, cut, lasting, lasting_ms, plural};
use crate::ops::context::Report;
use crate::ops::observe::valkey::{Consumer, Stream};
use crate::ops::observe::{Look, Seen};
use crate::presence::{Finding, Presence, State};
use crate::retry::Fault;

/// How many streams and consumers a page shows before it says how many more there are.
const SHOWN: usize = 40;

/// How everything stands.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Status {
    /// The short answer.
    pub verdict: Verdict,
    /// What it rests on, worst first.
    pub reasons: Vec<Reason>,
    /// Valkey.
    pub valkey: Server,
    /// PostgreSQL.
    pub postgres: Server,
    /// The ledger's size on disk in bytes, indexes included; null where it is not known.
    pub ledger_bytes: Option<u64>,
    /// What keeps `tidegate run` from starting, and is there while daemons run, as they tell; see `doctor.accept` in docs/configuration.md.
    pub findings: Vec<Finding>,
    /// Every pipeline, in the order of the configuration.
    pub pipelines: Vec<PipelineStatus>,
}

/// The short answer.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Verdict {
    /// How bad it is.
    pub state: Severity,
    /// Whether entries are being flushed as they come; false too where that cannot be known.
    pub flushing: bool,
    /// Entries that are in Valkey alone; null where that is not known.
    pub at_risk: Option<u64>,
    /// How old the oldest of them is, in milliseconds; null where that is not known.
    pub oldest_ms: Option<u64>,
    /// All this in one sentence, with the next step.
    pub sentence: String,
}

/// A server, as far as it could be reached.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Server {
    /// Whether it answered.
    pub reachable: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

impl Server {
    fn of(fault: Option<&Fault>) -> Server {
        Server { reachable: fault.is_none(), fault: fault.map(Fault::to_string) }
    }
}

/// A pipeline.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PipelineStatus {
    /// Its name.
    pub name: String,
    /// The table it writes; of several the first.
    pub table: String,
    /// All tables it writes, those of pipelines that go with it behind its own.
    pub tables: Vec<String>,
    /// `group` or `exclusive`.
    pub delivery: &'static str,
    /// Whether an operator has paused it, and for how long; null where PostgreSQL does not tell.
    pub paused: Option<bool>,
    /// Open dead letters; null where PostgreSQL does not tell.
    pub dead_letters: Option<u64>,
    /// Its sums over all streams.
    #[serde(flatten)]
    pub flow: Flow,
    /// Its streams.
    pub streams: Vec<StreamStatus>,
}

/// What flows, and what waits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Flow {
    /// Entries that are not settled; null where Valkey does not tell.
    pub backlog: Option<u64>,
    /// Whether the backlog is exact; false: there are at least so many.
    pub backlog_is_exact: bool,
    /// How old the oldest of them is, in milliseconds, 0 if there is none; null where Valkey does not tell.
    pub oldest_ms: Option<u64>,
    /// Entries added a second; null where it is not known.
    pub in_per_second: Option<f64>,
    /// Entries settled a second; null where it is not known.
    pub out_per_second: Option<f64>,
    /// Seconds until nothing waits, at these rates; null where there is no end in sight.
    pub eta_seconds: Option<f64>,
}

/// A stream of a pipeline.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StreamStatus {
    /// Its key.
    pub stream: String,
    /// Whether it exists; null where Valkey does not tell.
    pub exists: Option<bool>,
    /// Whether the pipeline's group exists; null where Valkey does not tell.
    pub group_exists: Option<bool>,
    /// Entries in the stream, settled ones that are retained included.
    pub length: Option<u64>,
    /// What the stream takes of Valkey's memory, by its estimate, in bytes.
    pub memory_bytes: Option<u64>,
    /// Entries that nobody has read.
    pub undelivered: Option<u64>,
    /// Entries read and not settled.
    pub pending: Option<u64>,
    /// What flows.
    #[serde(flatten)]
    pub flow: Flow,
    /// The ledger's rows for it.
    pub ledger_rows: Option<u64>,
    /// Entries that these rows stand for.
    pub ledger_entries: Option<u64>,
    /// How long ago the last flush was, in milliseconds; null where there was none, or it is not known.
    pub last_flush_ms_ago: Option<u64>,
    /// Open dead letters.
    pub dead_letters: Option<u64>,
    /// The members of the group, with what they hold.
    pub consumers: Vec<Consumer>,
    /// The daemons, as they describe themselves.
    pub processes: Vec<Process>,
}

/// A daemon, as it describes itself.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Process {
    /// Machine and process id.
    pub process: String,
    /// Its version.
    pub version: String,
    /// `flowing`, `paused`, `interrupted` or `halted`.
    pub state: &'static str,
    /// Why it does not flush.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// What to do about that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// For how long it has been so, in milliseconds; 0 while it flows.
    pub lasted_ms: u64,
    /// How long ago it said so, in milliseconds.
    pub said_ms_ago: u64,
    /// Which PostgreSQL it flushes into: the system identifier and the name of the database; null where it does not know.
    pub postgres: Option<String>,
    /// Its workers.
    pub workers: usize,
    /// Whether it reads the stream alone; null where the delivery is `group`.
    pub reads_alone: Option<bool>,
    /// Entries applied since it started.
    pub applied: u64,
    /// Entries found in the ledger since it started.
    pub recognised: u64,
    /// Entries buried since it started.
    pub buried: u64,
}

impl Process {
    fn of(presence: &Presence) -> Process {
        Process {
            process: presence.process.clone(),
            version: presence.version.clone(),
            state: match presence.state {
                State::Flowing => "flowing",
                State::Paused => "paused",
                State::Interrupted => "interrupted",
                State::Halted => "halted",
            },
            fault: presence.fault.clone(),
            advice: presence.advice.clone(),
            lasted_ms: presence.lasted_ms,
            said_ms_ago: presence.said_ms_ago,
            postgres: presence.postgres.clone(),
            workers: presence.workers,
            reads_alone: presence.reads_alone,
            applied: presence.applied,
            recognised: presence.recognised,
            buried: presence.buried,
        }
    }
}

impl Flow {
    fn between(before: Option<&Stream>, now: &Stream) -> Flow {
        let backlog = now.backlog();
        let mut flow = Flow {
            backlog: Some(backlog),
            backlog_is_exact: now.exact_backlog().is_some(),
            oldest_ms: Some(now.age_ms()),
            ..Flow::default()
        };
        let rates = || {
            let before = before?;
            let seconds = (now.now_ms.checked_sub(before.now_ms)? as f64 / 1000.0).max(0.001);
            let added = now.added?.checked_sub(before.added?)?;
            let settled = (added + before.exact_backlog()?).saturating_sub(now.exact_backlog()?);
            (now.now_ms > before.now_ms).then_some((added as f64 / seconds, settled as f64 / seconds))
        };
        if let Some((incoming, outgoing)) = rates() {
            (flow.in_per_second, flow.out_per_second) = (Some(incoming), Some(outgoing));
        }
        flow.with_eta()
    }

    /// Of streams that were all seen.
    pub fn sum(flows: &[Flow]) -> Flow {
        let total = |of: fn(&Flow) -> Option<f64>| flows.iter().map(of).sum::<Option<f64>>();
        let sum = Flow {
            backlog: flows.iter().map(|flow| flow.backlog).sum(),
            backlog_is_exact: flows.iter().all(|flow| flow.backlog_is_exact),
            oldest_ms: flows
                .iter()
                .map(|flow| flow.oldest_ms)
                .collect::<Option<Vec<_>>>()
                .map(|ages| ages.into_iter().max().unwrap_or(0)),
            in_per_second: total(|flow| flow.in_per_second),
            out_per_second: total(|flow| flow.out_per_second),
            eta_seconds: None,
        };
        sum.with_eta()
    }

    fn with_eta(mut self) -> Flow {
        self.eta_seconds = match (self.backlog, self.in_per_second, self.out_per_second) {
            (Some(0), ..) => Some(0.0),
            (Some(backlog), Some(incoming), Some(outgoing)) if outgoing > incoming => {
                Some(backlog as f64 / (outgoing - incoming))
            }
            _ => None,
        };
        self
    }
}

impl Status {
    /// Of two looks, the later one being what is shown.
    pub fn of(before: &Look, now: &Look, limits: &Limits) -> Status {
        let seen_before = before.streams();
        let pipelines: Vec<PipelineStatus> = now
            .pipelines
            .iter()
            .map(|(pipeline, seen)| {
                let streams: Vec<StreamStatus> = seen
                    .iter()
                    .map(|seen| {
                        let before = seen_before.get(&(pipeline.name.as_str(), seen.shard.stream.as_str()));
                        stream(now, before.copied(), seen)
                    })
                    .collect();
                let flows: Vec<Flow> = streams.iter().map(|stream| stream.flow).collect();
                PipelineStatus {
                    name: pipeline.name.clone(),
                    table: pipeline.table.to_string(),
                    tables: pipeline.targets().iter().map(|target| target.table.to_string()).collect(),
                    delivery: match pipeline.delivery {
                        Delivery::Group => "group",
                        Delivery::Exclusive => "exclusive",
                    },
                    paused: now.books.as_ref().ok().map(|books| books.pause_of(&pipeline.name).is_some()),
                    dead_letters: now.books.is_ok().then(|| streams.iter().filter_map(|s| s.dead_letters).sum()),
                    flow: Flow::sum(&flows),
                    streams,
                }
            })
            .collect();
        let reasons = reasons(now, limits);
        let (valkey, postgres) = (Server::of(now.valkey_fault()), Server::of(now.books.as_ref().err()));
        let verdict = verdict(&reasons, &pipelines, now);
        let ledger_bytes = now.books.as_ref().ok().and_then(|books| books.ledger_bytes);
        Status { verdict, reasons, valkey, postgres, ledger_bytes, findings: findings(now), pipelines }
    }
}

fn stream(look: &Look, before: Option<&Stream>, seen: &Seen) -> StreamStatus {
    let told = seen.stream.as_ref().ok();
    let lane = look.books.as_ref().ok().and_then(|books| books.lane_of(&seen.shard));
    let ledger = lane.and_then(|lane| lane.ledger);
    StreamStatus {
        stream: seen.shard.stream.clone(),
        exists: told.map(|stream| stream.length.is_some()),
        group_exists: told.map(|stream| stream.group.is_some()),
        length: told.map(|stream| stream.length.unwrap_or(0)),
        memory_bytes: told.and_then(|stream| stream.memory_bytes),
        undelivered: told.map(|stream| stream.undelivered.number()),
        pending: told.map(|stream| stream.group.as_ref().map_or(0, |group| group.pending)),
        flow: told.map_or_else(Flow::default, |stream| Flow::between(before, stream)),
        ledger_rows: ledger.map(|size| size.rows),
        ledger_entries: ledger.map(|size| size.entries),
        last_flush_ms_ago: ledger.and_then(|size| size.last_flush_ms_ago),
        dead_letters: lane.map(|lane| lane.letters.values().sum()),
        consumers: told.map(|stream| stream.consumers.clone()).unwrap_or_default(),
        processes: told.and_then(|stream| stream.processes.as_ref()).into_iter().flatten().map(Process::of).collect(),
    }
}

fn verdict(reasons: &[Reason], pipelines: &[PipelineStatus], look: &Look) -> Verdict {
    let state = reasons.first().map_or(Severity::Ok, |reason| reason.severity);
    let all: Vec<Flow> = pipelines.iter().map(|pipeline| pipeline.flow).collect();
    let flow = Flow::sum(&all);
    let stops =
        ["halted", "interrupted", "paused", "no_daemon", "not_migrated", "postgres_unavailable", "valkey_unavailable"];
    let stopped: Vec<&Reason> = reasons.iter().filter(|reason| stops.contains(&reason.code)).collect();
    let flushing = stopped.is_empty();
    let word = match state {
        Severity::Ok | Severity::Notice => "OK",
        Severity::Degraded => "DEGRADED",
        Severity::Down => "DOWN",
    };
    let behind = match (flow.backlog, flow.oldest_ms) {
        (Some(0), _) => "nothing waits".to_owned(),
        (Some(backlog), Some(age)) => {
            let at_least = if flow.backlog_is_exact { "" } else { "at least " };
            format!(
                "{at_least}{} behind, the oldest {} old, in Valkey alone until flushed",
                plural(backlog, "entry", "entries"),
                lasting_ms(age)
            )
        }
        _ => last_known(look),
    };
    let does = match (&stopped[..], pipelines.len()) {
        ([], _) => "flushing".to_owned(),
        // Some pipelines stand and others flow.
        (stopped, total) => {
            let servers = stopped.iter().any(|reason| reason.pipeline.is_none());
            let mut names: Vec<&str> = stopped.iter().filter_map(|reason| reason.pipeline.as_deref()).collect();
            names.sort_unstable();
            names.dedup();
            if servers || names.len() == total {
                "not flushing".into()
            } else {
                format!("not flushing: {}", names.join(", "))
            }
        }
    };
    let why = reasons.first().filter(|reason| reason.severity > Severity::Notice).map(|reason| {
        let of = reason.pipeline.as_deref().map(|name| format!("{name} ")).unwrap_or_default();
        format!(". Why: {of}{}. Next: {}", reason.words.trim_end_matches('.'), reason.next_step)
    });
    let sentence = format!("{word}: {does}; {behind}{}", why.unwrap_or_default());
    Verdict { state, flushing, at_risk: flow.backlog, oldest_ms: flow.oldest_ms, sentence }
}

/// With Valkey away, what PostgreSQL knows of the time before.
fn last_known(look: &Look) -> String {
    let last = look
        .books
        .as_ref()
        .ok()
        .and_then(|books| books.lanes.iter().filter_map(|lane| lane.ledger?.last_flush_ms_ago).min());
    match last {
        Some(ms) => format!(
            "how far behind is not known; the last flush was {} ago, and what was flushed is safe",
            lasting_ms(ms)
        ),
        None => "how far behind is not known".into(),
    }
}

fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "?".into(), |rate| count(rate.round() as u64))
}

fn eta(flow: &Flow) -> String {
    match (flow.backlog, flow.eta_seconds) {
        (Some(0), _) => "-".into(),
        (_, Some(seconds)) => lasting(std::time::Duration::from_secs_f64(seconds.min(1e9))),
        _ => "?".into(),
    }
}

impl Report for Status {
    fn show(&self, page: &mut Page) {
        let tone = match self.verdict.state {
            Severity::Ok | Severity::Notice => Tone::Good,
            Severity::Degraded | Severity::Down => Tone::Bad,
        };
        page.toned(tone, &self.verdict.sentence);
        for reason in self.reasons.iter() {
            let tone = if reason.severity > Severity::Notice { Tone::Bad } else { Tone::Warn };
            let of = [reason.pipeline.as_deref(), reason.stream.as_deref()];
            let of: Vec<&str> = of.into_iter().flatten().collect();
            let of = if of.is_empty() { String::new() } else { format!("{}: ", of.join(" ")) };
            page.toned(tone, format!("  {of}{}", reason.words));
            page.line(format!("    {}", reason.next_step));
        }
        page.line("");
        let streams: Vec<(&PipelineStatus, &StreamStatus)> =
            self.pipelines.iter().flat_map(|p| p.streams.iter().map(move |s| (p, s))).collect();
        let rows: Vec<Vec<String>> = streams.iter().take(SHOWN).map(|(p, s)| row(p, s)).collect();
        let heading = [
            "pipeline",
            "stream",
            ">backlog",
            ">oldest",
            ">in/s",
            ">out/s",
            ">eta",
            ">dead",
            ">ledger rows",
            ">last flush",
            ">memory",
        ];
        page.table(&heading, &rows);
        more(page, streams.len(), "streams");
        let several = self.pipelines.iter().filter(|pipeline| pipeline.tables.len() > 1);
        for pipeline in several {
            page.line(format!("{} writes {}", pipeline.name, pipeline.tables.join(", ")));
        }
        let processes: Vec<Vec<String>> =
            streams.iter().flat_map(|(p, s)| s.processes.iter().map(move |x| process(p, s, x))).collect();
        if !processes.is_empty() {
            page.line("");
            page.table(
                &["daemon", "stream", "state", ">workers", ">applied", ">recognised", ">buried"],
                &processes[..processes.len().min(SHOWN)],
            );
            more(page, processes.len(), "daemons");
        }
        let consumers: Vec<Vec<String>> =
            streams.iter().flat_map(|(_, s)| s.consumers.iter().map(move |x| consumer(s, x))).collect();
        if !consumers.is_empty() {
            page.line("");
            page.table(
                &["consumer", "stream", ">holds", ">idle", "connected"],
                &consumers[..consumers.len().min(SHOWN)],
            );
            more(page, consumers.len(), "consumers");
        }
        if let Some(size) = self.ledger_bytes {
            page.line("");
            page.line(format!("ledger on disk  {}", bytes(size)));
        }
    }
}

fn more(page: &mut Page, all: usize, what: &str) {
    if all > SHOWN {
        page.line(format!("and {} more {what}; --output json has all", all - SHOWN));
    }
}

fn row(pipeline: &PipelineStatus, stream: &StreamStatus) -> Vec<String> {
    let flow = &stream.flow;
    let backlog = match (flow.backlog, flow.backlog_is_exact) {
        (Some(backlog), false) => format!("≥{}", count(backlog)),
        (backlog, _) => count_or(backlog, "?"),
    };
    vec![
        pipeline.name.clone(),
        stream.stream.clone(),
        backlog,
        flow.oldest_ms.map_or_else(|| "?".into(), |ms| if ms == 0 { "-".into() } else { lasting_ms(ms) }),
        rate(flow.in_per_second),
        rate(flow.out_per_second),
        eta(flow),
        count_or(stream.dead_letters, "?"),
        count_or(stream.ledger_rows, "?"),
        stream.last_flush_ms_ago.map_or_else(|| "?".into(), lasting_ms),
        stream.memory_bytes.map_or_else(|| "?".into(), bytes),
    ]
}

fn process(_: &PipelineStatus, stream: &StreamStatus, process: &Process) -> Vec<String> {
    let state = match (process.state, process.reads_alone) {
        ("flowing", Some(true)) => "reads alone",
        ("flowing", Some(false)) => "stands by",
        (state, _) => state,
    };
    vec![
        process.process.clone(),
        stream.stream.clone(),
        state.to_owned(),
        count(process.workers as u64),
        count(process.applied),
        count(process.recognised),
        count(process.buried),
    ]
}

fn consumer(stream: &StreamStatus, consumer: &Consumer) -> Vec<String> {
    vec![
        cut(&crate::ops::columns::printable(&consumer.name), 60),
        stream.stream.clone(),
        count(consumer.entries),
        lasting_ms(consumer.idle_ms),
        if consumer.alive { "yes" } else { "no" }.into(),
    ]
}
