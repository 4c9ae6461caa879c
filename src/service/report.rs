//! Report: tells at intervals what each pipeline did and what it has yet to settle, above all while something is wrong.
//!
//! Takes the flows and asks Valkey for their backlog; gives the event `metrics`, one for each pipeline: while it is not idle
//! or has done anything, and always at the end. It cannot fail: a Valkey that does not answer is told as the age of what is known.

use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use super::prepare::Flow;
use crate::flow::read::{self, Backlog};
use crate::retry::Fault;
use crate::telemetry::contract::{Snapshot, Unsettled};
use crate::valkey::{self, Link, Links};

/// How often it is told.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How long a stop waits for the last look at the backlog.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// The reports of one configuration's flows.
pub(super) struct Reporter {
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
    pub(super) fn new(valkey: &valkey::Endpoint, flows: &[Flow]) -> Reporter {
        let now = Instant::now();
        let line = |flow: &Flow| Line { told: flow.metrics.snapshot(), known: now, looked: now };
        Reporter { links: Links::to(valkey, "tidegate:report"), lines: flows.iter().map(line).collect() }
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
        for (flow, line) in flows.iter().zip(&mut self.lines) {
            let pipeline = flow.lane.pipeline();
            let look = async |link: &Link| read::backlog(link, &pipeline.stream, &pipeline.group()).await;
            line.note(flow, self.links.look(&pipeline.stream, look).await, Instant::now());
        }
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

fn log(flow: &Flow, snapshot: &Snapshot) {
    let pipeline = flow.lane.pipeline();
    snapshot.log(&pipeline.name, &pipeline.stream, &pipeline.table.to_string());
}
