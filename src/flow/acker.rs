//! Acker: acknowledges what is settled.
//!
//! Takes receipts from the settler and sends the acknowledgement on the link the entries were read on. If that fails nothing
//! is lost: the entries are delivered again and recognised.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::info;

use super::ack::{self, Acked};
use super::flush::Settled;
use super::handoff::{Receipt, Shared};
use super::setup::WorkerSetup;
use crate::shutdown::Stop;
use crate::valkey::Link;

/// The part that acknowledges what is settled. If that fails nothing is lost: it is delivered again and recognised.
#[derive(Debug)]
pub struct Acker {
    pub(super) setup: WorkerSetup,
    pub(super) worker: Arc<str>,
    pub(super) shared: Arc<Shared>,
    pub(super) settled: mpsc::Receiver<Receipt>,
}

impl Acker {
    /// Acknowledges until the settler has left and everything is done with; or until the second phase of a stop.
    pub async fn run(mut self, stop: Stop) {
        loop {
            let receipt = tokio::select! {
                receipt = self.settled.recv() => receipt,
                () = stop.forced() => return,
            };
            match receipt {
                Some(Receipt::Settled(link, settled)) => self.acknowledge(&link, &settled).await,
                Some(Receipt::Done) => self.shared.done.send_modify(|done| *done += 1),
                None => return,
            }
        }
    }

    async fn acknowledge(&self, link: &Link, settled: &Settled) {
        let pipeline = self.setup.lane.pipeline();
        match ack::ack(link, &pipeline.group(), &pipeline.stream, settled).await {
            Ok(Acked::Removed(_)) => {}
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
