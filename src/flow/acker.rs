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
use crate::valkey::Link;

/// How often the position is moved at the most; sooner where much is settled meanwhile.
const MOVE_EVERY: Duration = Duration::from_millis(100);
/// The same where everything that was read is settled: whoever looks at the lag sees soon that there is none.
const MOVE_EVERY_IN_THE_END: Duration = Duration::from_millis(20);

/// The part that gives back what is settled. If that fails nothing is lost: it is delivered again and recognised.
#[derive(Debug)]
pub struct Acker {
    setup: WorkerSetup,
    worker: Arc<str>,
    shared: Arc<Shared>,
    settled: mpsc::Receiver<Receipt>,
    /// Whose position is to be moved, and when.
    to_move: Option<(Arc<Tenure>, Instant)>,
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
        Acker { setup, worker, shared, settled, to_move: None, moved_at: Instant::now() }
    }

    /// Gives back until the settlers have left and everything is done with; or until the second phase of a stop.
    pub async fn run(mut self, stop: Stop) {
        loop {
            let due = self.to_move.as_ref().map(|(_, at)| *at);
            let receipt = tokio::select! {
                receipt = self.settled.recv() => receipt,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.move_position().await;
                    continue;
                }
                () = stop.forced() => return,
            };
            match receipt {
                Some(Receipt::Settled(link, settled)) => self.acknowledge(&link, &settled).await,
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

    /// A batch that was read alone is settled: the position is moved soon, or at once where much is between.
    async fn settled(&mut self, place: Place) {
        let (unmoved, is_all) = place.settled();
        let at = match is_all {
            _ if unmoved >= self.setup.most_unmoved() => Instant::now(),
            true => self.moved_at + MOVE_EVERY_IN_THE_END,
            false => self.moved_at + MOVE_EVERY,
        };
        if self.to_move.as_ref().is_none_or(|(tenure, due)| at < *due || !Arc::ptr_eq(tenure, &place.tenure)) {
            self.to_move = Some((place.tenure, at));
        }
        // Receipts may come without a pause: then nobody looks at the clock but here.
        if at <= Instant::now() {
            self.move_position().await;
        }
    }

    async fn move_position(&mut self) {
        if let Some((tenure, _)) = self.to_move.take() {
            tenure.advance().await;
            self.moved_at = Instant::now();
            self.setup.acknowledged.notify_one();
        }
    }

    async fn acknowledge(&self, link: &Link, settled: &Settled) {
        let pipeline = self.setup.lane.pipeline();
        match ack::ack(link, &pipeline.group(), &pipeline.stream, settled).await {
            Ok(Acked::Removed(_)) => self.setup.acknowledged.notify_one(),
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
