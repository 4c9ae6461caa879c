//! Handoff: what the actors of a worker pass on to each other, and what they share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::select_all;
use tokio::sync::{mpsc, watch};

use super::batch::Batch;
use super::flush::Settled;
use super::tenure::Place;
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
    /// Set where it was read alone: nothing of it is pending, and its place counts instead of acknowledgements.
    pub(super) place: Option<Place>,
}

/// What a settler hands on.
#[derive(Debug)]
pub(super) enum Receipt {
    /// To be acknowledged on the link it was read by.
    Settled(Arc<Link>, Settled),
    /// One batch is done with.
    Done(Option<Place>),
}

/// What the actors tell each other beside batches.
#[derive(Debug)]
pub(super) struct Shared {
    /// How many batches are done with, acknowledgements included.
    pub(super) done: watch::Sender<u64>,
    /// Of each settler, whether its flushes are failing.
    pub(super) failing: Vec<AtomicBool>,
}

impl Shared {
    pub(super) fn of(settlers: usize) -> Shared {
        Shared { done: watch::Sender::new(0), failing: (0..settlers).map(|_| AtomicBool::new(false)).collect() }
    }

    /// Resolves when this many batches are done with.
    pub(super) async fn is_done_with(&self, batches: u64) {
        // The sender is beside it: it cannot be gone.
        let _ = self.done.subscribe().wait_for(|done| *done == batches).await;
    }

    /// Whether the flushes of any settler are failing.
    pub(super) fn is_failing(&self) -> bool {
        self.failing.iter().any(|failing| failing.load(Ordering::Relaxed))
    }
}

/// The ways from a taker to its settlers, each with room for one batch.
#[derive(Debug)]
pub(super) struct Outlets {
    settlers: Vec<mpsc::Sender<Held>>,
    /// Whose turn it is, if several have room.
    turn: usize,
}

/// A settler has ended: its task panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReceiverGone;

impl Outlets {
    pub(super) fn to(settlers: Vec<mpsc::Sender<Held>>) -> Outlets {
        Outlets { settlers, turn: 0 }
    }

    /// Resolves when a batch can be handed over, and says to whom. The room stays: there is one taker.
    pub(super) async fn room(&self) -> Result<usize, ReceiverGone> {
        let count = self.settlers.len();
        let in_turn = (0..count).map(|n| (self.turn + n) % count);
        let rooms = in_turn.map(|n| Box::pin(async move { self.settlers[n].reserve().await.map(|_| n) }));
        select_all(rooms).await.0.map_err(|_| ReceiverGone)
    }

    /// Resolves when a settler has ended.
    pub(super) async fn closed(&self) {
        select_all(self.settlers.iter().map(|settler| Box::pin(settler.closed()))).await;
    }

    /// Hands a batch over. False: that settler has ended.
    pub(super) async fn send(&mut self, to: usize, held: Held) -> bool {
        self.turn = (to + 1) % self.settlers.len();
        self.settlers[to].send(held).await.is_ok()
    }
}

/// The second phase of a stop has begun, or the acker has ended: what is held stays pending.
#[derive(Debug)]
pub(super) struct Interrupted;
