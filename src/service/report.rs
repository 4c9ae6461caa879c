//! Report: tells at intervals what each pipeline did and what it has yet to settle, above all while something is wrong.
//!
//! Takes the flows and asks Valkey for their backlog; gives the event `metrics`, one for each pipeline: while it is not idle
//! or has done anything, and always at the end. It cannot fail: a Valkey that does not answer is told as the age of what is known.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::time::MissedTickBehavior;

use super::prepare::Flow;
use crate::flow::flush::Lane;
use crate::flow::read::{self, Backlog};
use crate::retry::Fault;
use crate::telemetry::contract::{Snapshot, Unsettled};
use crate::valkey::{self, Link};

/// How often it is told.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How many streams are asked about at once.
const ASKED_AT_ONCE: usize = 64;
/// How long a stop waits for the last look at the backlog.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// The reports of one configuration's flows.
pub(super) struct Reporter {
    valkey: valkey::Endpoint,
    /// Kept from one look to the next; none after a look that failed.
    link: Option<Link>,
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
    pub(super) fn new(valkey: &valkey::Endpoint, flows: &[Flow]) -> Reporter {
        let now = Instant::now();
        let line = |flow: &Flow| Line { told: flow.metrics.snapshot(), known: now, looked: now };
        Reporter { valkey: valkey.clone(), link: None, lines: flows.iter().map(line).collect() }
    }

    /// Reports for as long as it is polled.
    pub(super) async fn run(&mut self, flows: &[Flow]) -> std::convert::Infallible {
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + REPORT_EVERY, REPORT_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.look(flows).await;
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
        let link = match self.link.take() {
            Some(link) => Ok(link),
            None => Link::open(&self.valkey, "tidegate:report").await,
        };
        for (flow, line) in flows.iter().zip(&mut self.lines) {
            let backlog = match &link {
                Ok(link) => backlog(link, flow).await,
                Err(fault) => Err(fault.clone()),
            };
            line.note(flow, backlog, Instant::now());
        }
        self.link = link.ok().filter(|link| !link.is_lost());
    }
}

impl Line {
    fn note(&mut self, flow: &Flow, backlog: Result<Backlog, Fault>, now: Instant) {
        let ms = |duration: Duration| duration.as_millis() as u64;
        match backlog {
            Ok(backlog) => {
                self.known = now;
                flow.metrics.told_backlog(Unsettled {
                    undelivered: if backlog.is_empty { Some(0) } else { backlog.undelivered },
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

/// The backlog of all streams of a flow.
async fn backlog(link: &Link, flow: &Flow) -> Result<Backlog, Fault> {
    let mut all = Backlog { pending: 0, undelivered: Some(0), is_empty: true, oldest: None };
    for some in flow.lanes.chunks(ASKED_AT_ONCE) {
        let ask = |lane: &Lane| {
            let (stream, group) = (lane.pipeline().stream.clone(), lane.pipeline().group());
            async move { read::backlog(link, &stream, &group).await }
        };
        for one in try_join_all(some.iter().map(ask)).await? {
            all.pending += one.pending;
            all.undelivered = all.undelivered.zip(one.undelivered).map(|(all, one)| all + one);
            all.is_empty &= one.is_empty;
            all.oldest = all.oldest.max(one.oldest);
        }
    }
    Ok(all)
}

fn log(flow: &Flow, snapshot: &Snapshot) {
    let pipeline = &flow.pipeline;
    snapshot.log(&pipeline.name, &pipeline.stream, &pipeline.table.to_string());
}
