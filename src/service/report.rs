//! Report: asks at intervals how each pipeline stands, and tells what it did and what it has yet to settle, above all while something is wrong.
//!
//! Takes the flows and asks Valkey for their backlog and PostgreSQL for what it keeps; gives the gauges of the metrics, and the event
//! `metrics`, one for each flow: while it is not idle or has done anything, and always at the end. It cannot fail: a Valkey that does not
//! answer is told as the age of what is known.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::try_join_all;
use tokio::time::{MissedTickBehavior, interval_at};

use super::prepare::Flow;
use crate::care::kept::{Kept, kept};
use crate::flow::flush::Lane;
use crate::flow::read::{self, Backlog};
use crate::lanes::LaneId;
use crate::postgres::Database;
use crate::retry::Fault;
use crate::telemetry::contract::{Snapshot, Unsettled};
use crate::telemetry::registry::Registry;
use crate::valkey::{self, Link, Links};

/// How often it is told.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How many streams are asked about at once.
const ASKED_AT_ONCE: usize = 64;
/// How often Valkey is asked for the backlog; less often where there are many streams: each takes it some 50 µs.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What is left between two looks for each stream.
const LOOK_EVERY_OF_MANY: Duration = Duration::from_millis(20);
/// How often PostgreSQL is asked what it keeps.
const COUNT_EVERY: Duration = Duration::from_secs(30);
/// How soon it is asked at first, and again where it did not answer.
const COUNT_SOON: Duration = Duration::from_secs(1);
/// How long a stop waits for the last look at the backlog.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// The reports of one configuration's flows.
pub(super) struct Reporter {
    database: Database,
    registry: Registry,
    /// Kept from one look to the next.
    links: Links,
    lines: Vec<Line>,
}

/// What was told of one flow.
struct Line {
    told: Snapshot,
    /// When its backlog was last known, or when this began.
    known: Instant,
    looked: Instant,
}

impl Reporter {
    pub(super) fn new(valkey: &valkey::Endpoint, database: &Database, registry: &Registry, flows: &[Flow]) -> Reporter {
        let now = Instant::now();
        let line = |flow: &Flow| Line { told: flow.metrics.snapshot(), known: now, looked: now };
        let (database, registry) = (database.clone(), registry.clone());
        let links = Links::to(valkey, "tidegate:report");
        Reporter { database, registry, links, lines: flows.iter().map(line).collect() }
    }

    /// Reports for as long as it is polled.
    pub(super) async fn run(&mut self, flows: &[Flow]) -> std::convert::Infallible {
        let (database, registry) = (self.database.clone(), self.registry.clone());
        let counts = std::pin::pin!(count(&database, &registry, flows));
        let reports = std::pin::pin!(self.report(flows));
        match futures_util::future::select(reports, counts).await {
            futures_util::future::Either::Left((never, _)) | futures_util::future::Either::Right((never, _)) => {
                match never {}
            }
        }
    }

    async fn report(&mut self, flows: &[Flow]) -> std::convert::Infallible {
        let every =
            LOOK_EVERY.max(LOOK_EVERY_OF_MANY * flows.iter().map(|flow| flow.lanes.len()).sum::<usize>() as u32);
        let mut looks = interval_at(tokio::time::Instant::now() + LOOK_EVERY, every);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told_at = Instant::now();
        loop {
            looks.tick().await;
            self.look(flows).await;
            if told_at.elapsed() < REPORT_EVERY - LOOK_EVERY / 2 {
                continue;
            }
            told_at = Instant::now();
            for (flow, line) in flows.iter().zip(&mut self.lines) {
                let now = flow.metrics.snapshot();
                if !now.is_idle() || now.counted_since(&line.told) {
                    log(flow, &now);
                    line.told = now;
                }
            }
        }
    }

    /// The last report: always told, so that programs find the final counts in it.
    pub(super) async fn finish(&mut self, flows: &[Flow]) {
        // If it takes longer, what was known before is told.
        let _ = tokio::time::timeout(LAST_LOOK, self.look(flows)).await;
        flows.iter().for_each(|flow| log(flow, &flow.metrics.snapshot()));
    }

    /// Asks for every flow's backlog.
    async fn look(&mut self, flows: &[Flow]) {
        for (flow, line) in flows.iter().zip(&mut self.lines) {
            line.note(flow, backlog(&mut self.links, flow).await, Instant::now());
        }
    }
}

/// Asks PostgreSQL what it keeps, for as long as it is polled. While it does not answer, what it told last stays: the workers meet the
/// fault, too, and tell.
async fn count(database: &Database, registry: &Registry, flows: &[Flow]) -> std::convert::Infallible {
    let mut wait = COUNT_SOON;
    loop {
        tokio::time::sleep(wait).await;
        let lanes: Vec<LaneId> = flows.iter().flat_map(|flow| flow.lanes.iter().map(Lane::id)).collect();
        wait = match database.run(async |c| kept(c, &lanes).await).await {
            Ok((all, bytes)) => {
                registry.told_ledger_bytes(bytes);
                let of_lane: HashMap<LaneId, Kept> = all.into_iter().map(|kept| (kept.lane, kept)).collect();
                for flow in flows {
                    let kept = || flow.lanes.iter().filter_map(|lane| of_lane.get(&lane.id()));
                    let (rows, letters) =
                        (kept().map(|kept| kept.ledger_rows), kept().map(|kept| kept.dead_letters_open));
                    flow.metrics.told_kept(rows.sum(), letters.sum());
                }
                COUNT_EVERY
            }
            Err(_) => (wait * 2).min(COUNT_EVERY),
        };
    }
}

impl Line {
    fn note(&mut self, flow: &Flow, backlog: Result<Backlog, Fault>, now: Instant) {
        let ms = |duration: Duration| duration.as_millis() as u64;
        match backlog {
            Ok(backlog) => {
                self.known = now;
                let here = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                flow.metrics.valkey_is_ahead(backlog.now_ms as i64 - ms(here) as i64);
                flow.metrics.told_backlog(Unsettled {
                    undelivered: backlog.undelivered,
                    pending: backlog.pending,
                    age_ms: backlog.oldest.map_or(0, ms),
                });
            }
            // The workers meet the fault too, and tell.
            Err(_) => flow.metrics.backlog_unknown_for(ms(now - self.known), ms(now - self.looked)),
        }
        self.looked = now;
    }
}

/// The backlog of all streams of a flow; counted where the server cannot tell.
async fn backlog(links: &mut Links, flow: &Flow) -> Result<Backlog, Fault> {
    let mut all = Backlog { pending: 0, undelivered: Some(0), is_empty: true, first: None, oldest: None, now_ms: 0 };
    // In a cluster a flow has one stream.
    for some in flow.lanes.chunks(ASKED_AT_ONCE) {
        let look = async |link: &Link| try_join_all(some.iter().map(|lane| backlog_of(link, lane))).await;
        for one in links.look(&some[0].pipeline().stream, look).await? {
            all.pending += one.pending;
            all.undelivered = all.undelivered.zip(one.undelivered).map(|(all, one)| all + one);
            all.is_empty &= one.is_empty;
            all.first = all.first.into_iter().chain(one.first).min();
            all.oldest = all.oldest.max(one.oldest);
            all.now_ms = one.now_ms;
        }
    }
    Ok(all)
}

async fn backlog_of(link: &Link, lane: &Lane) -> Result<Backlog, Fault> {
    let (pipeline, group) = (lane.pipeline(), lane.pipeline().group());
    let mut backlog = read::backlog(link, &pipeline.stream, &group).await?;
    if backlog.is_empty {
        backlog.undelivered = Some(0);
    } else if backlog.undelivered.is_none() {
        backlog.undelivered = Some(read::count_undelivered(link, &pipeline.stream, &group).await?);
    }
    Ok(backlog)
}

fn log(flow: &Flow, snapshot: &Snapshot) {
    let pipeline = &flow.pipeline;
    snapshot.log(&pipeline.name, &pipeline.stream, &pipeline.table.to_string());
}
