//! Handoff: what the three actors of a worker pass on to each other, and what they share.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::watch;

use super::batch::Batch;
use super::flush::Settled;
use crate::model::entry::EntryId;
use crate::valkey::Link;

/// A batch on its way from one half to the other, with the link it came by and must be acknowledged on.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) link: Arc<Link>,
    pub(super) batch: Option<Batch>,
    pub(super) gone: Vec<EntryId>,
    /// Set where the batch is one entry that is tried alone: to be acquitted when its flush is sent.
    pub(super) suspect: Option<EntryId>,
}

/// What the settler hands on.
#[derive(Debug)]
pub(super) enum Receipt {
    /// To be acknowledged on the link it was read by.
    Settled(Arc<Link>, Settled),
    /// One batch is done with.
    Done,
}

/// What the three tell each other beside batches.
#[derive(Debug)]
pub(super) struct Shared {
    /// How many batches are done with, acknowledgements included.
    pub(super) done: watch::Sender<u64>,
    /// Whether its flushes are failing.
    pub(super) failing: AtomicBool,
}

impl Shared {
    /// Resolves when this many batches are done with.
    pub(super) async fn is_done_with(&self, batches: u64) {
        // The sender is beside it: it cannot be gone.
        let _ = self.done.subscribe().wait_for(|done| *done == batches).await;
    }
}

/// The second phase of a stop has begun, or the acker has ended: what is held stays pending.
#[derive(Debug)]
pub(super) struct Interrupted;
