//! Acker: gives back what is settled: acknowledges it, or moves the group's position over it.
//!
//! Takes receipts from the settlers and sends the acknowledgement on the link the entries were read on. If that fails nothing
//! is lost: the entries are delivered again and recognised.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::info;

use super::ack::{self, Acked};
use super::flush::Settled;
use super::handoff::{Receipt, Shared};
use super::setup::WorkerSetup;
use super::tenure::{Place, Tenure};
use crate::shutdown::Stop;
use crate::telemetry::trace::Trace;
use crate::valkey::Link;

/// How often positions are moved at the most; sooner where much is settled meanwhile.
const MOVE_EVERY: Duration = Duration::from_millis(100);
/// The same where everything that was read is settled: whoever looks at the lag sees soon that there is none.
const MOVE_EVERY_IN_THE_END: Duration = Duration::from_millis(20);
/// The least time for each position that is moved: with very many streams this must not become Valkey's work.
const MOVE_EVERY_FOR_EACH: Duration = Duration::from_micros(500);
/// How many positions are moved at once.
const MOVED_AT_ONCE: usize = 64;

/// The part that gives back what is settled. If that fails nothing is lost: it is delivered again and recognised.
#[derive(Debug)]
pub struct Acker {
    setup: WorkerSetup,
    worker: Arc<str>,
    shared: Arc<Shared>,
    settled: mpsc::Receiver<Receipt>,
    /// Whose positions are to be moved, each with its lane, and when.
    to_move: Vec<(usize, Arc<Tenure>)>,
    move_at: Instant,
    moved_at: Instant,
}

impl Acker {
    /// Takes receipts from this receiver.
    pub(super) fn new(
        setup: WorkerSetup,
        worker: Arc<str>,
        shared: Arc<Shared>,
        settled: mpsc::Receiver<Receipt>,
    ) -> Acker {
        let now = Instant::now();
        Acker { setup, worker, shared, settled, to_move: Vec::new(), move_at: now, moved_at: now }
    }

    /// Gives back until the settlers have left and everything is done with; or until the second phase of a stop.
    pub async fn run(mut self, stop: Stop) {
        loop {
            let receipt = tokio::select! {
                receipt = self.settled.recv() => receipt,
                () = sleep_until(self.move_at), if !self.to_move.is_empty() => {
                    self.move_positions().await;
                    continue;
                }
                () = stop.forced() => return,
            };
            match receipt {
                Some(Receipt::Settled(link, settled)) => {
                    settled.trace().covers(self.acknowledge(&link, &settled)).await
                }
                Some(Receipt::Done(place)) => {
                    if let Some(place) = place {
                        self.settled(place).await;
                    }
                    self.shared.done.send_modify(|done| *done += 1);
                }
                None => return,
            }
        }
    }

    /// A batch that was read alone is settled: positions are moved soon, or at once where much is between.
    async fn settled(&mut self, place: Place) {
        for (lane, tenure, unmoved) in place.settled() {
            if tenure.queue() {
                self.to_move.push((lane, tenure));
            }
            let at = match unmoved.is_all {
                _ if unmoved.entries >= self.setup.most_unmoved() => Instant::now(),
                true => self.moved_at + MOVE_EVERY_IN_THE_END.max(self.least()),
                false => self.moved_at + MOVE_EVERY.max(self.least()),
            };
            self.move_at = if self.to_move.len() == 1 { at } else { self.move_at.min(at) };
        }
        // Receipts may come without a pause: then nobody looks at the clock but here.
        if !self.to_move.is_empty() && self.move_at <= Instant::now() {
            self.move_positions().await;
        }
    }

    fn least(&self) -> Duration {
        MOVE_EVERY_FOR_EACH * self.to_move.len() as u32
    }

    async fn move_positions(&mut self) {
        let tenures = std::mem::take(&mut self.to_move);
        let _acking = self.setup.metrics.ack_begins(&Trace::default(), 0);
        for some in tenures.chunks(MOVED_AT_ONCE) {
            Tenure::advance(&some.iter().map(|(_, tenure)| tenure.clone()).collect::<Vec<_>>()).await;
            some.iter().for_each(|(lane, _)| self.setup.lanes[*lane].acknowledged().notify_one());
        }
        self.moved_at = Instant::now();
    }

    async fn acknowledge(&self, link: &Link, settled: &Settled) {
        let pipeline = &self.setup.pipeline;
        let _acking = self.setup.metrics.ack_begins(settled.trace(), settled.ids().len());
        match ack::ack(link, &pipeline.group(), &pipeline.stream, settled).await {
            Ok(Acked::Removed(_)) => self.setup.lanes[0].acknowledged().notify_one(),
            Ok(Acked::Dropped) => {
                self.setup.metrics.ack_dropped();
                info!(worker = %self.worker, entries = settled.ids().len(), "the connection changed: acknowledgement dropped");
            }
            Err(fault) => {
                self.setup.metrics.ack_dropped();
                info!(worker = %self.worker, %fault, entries = settled.ids().len(), "acknowledgement failed");
            }
        }
    }
}
