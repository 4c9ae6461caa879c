//! Tenure: the time for which one process reads a stream alone, from the group's position on.
//!
//! Takes the batches of one reader in the order in which they were read, and in any order that they are settled; gives the group's
//! position, which only ever moves over what is settled from the first batch on (E1). It ends when anything is not as it
//! should be; who reads then begins again at the group's position, and the ledger recognises what was settled beyond it.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::join_all;

use super::lease::Doubt;
use super::position::{self, Claim, Move, Moved, Position};
use crate::model::entry::EntryId;
use crate::retry::Fault;
use crate::valkey::Link;

/// How many positions one script moves: half a millisecond of the server's time.
const MOVED_AT_ONCE: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Tenure {
    link: Arc<Link>,
    claim: Claim,
    /// Raised when a flush met what somebody else has flushed: is the lease still this process's?
    doubt: Doubt,
    stretches: Mutex<Stretches>,
    /// Where the group stands, as far as this tenure has moved it; held while it is moved.
    stands: tokio::sync::Mutex<Position>,
    ended: Mutex<Option<End>>,
    /// Whether it waits for its position to be moved.
    queued: AtomicBool,
}

/// Why a tenure has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Something is not as this process believed.
    Displaced(&'static str),
    /// The group is gone, or Valkey could not be asked.
    Fault(Fault),
}

/// A batch's place in the tenures of the streams that its entries are of.
#[derive(Debug, Clone, Default)]
pub struct Place {
    parts: Vec<Part>,
}

/// What a batch has of one stream.
#[derive(Debug, Clone)]
struct Part {
    lane: usize,
    tenure: Arc<Tenure>,
    number: u64,
}

impl Place {
    /// So many entries up to `last` were read of this lane's stream, behind all others.
    pub fn add(&mut self, lane: usize, tenure: &Arc<Tenure>, last: EntryId, entries: u64) {
        let number = tenure.stretches().read(last, entries);
        self.parts.push(Part { lane, tenure: tenure.clone(), number });
    }

    /// Everything of the batch is settled. Gives the tenures whose positions can be moved, each with its lane.
    pub fn settled(self) -> impl Iterator<Item = (usize, Arc<Tenure>, Unmoved)> {
        self.parts.into_iter().map(|part| {
            let mut stretches = part.tenure.stretches();
            let unmoved = Unmoved { entries: stretches.settled(part.number), is_all: stretches.open.is_empty() };
            drop(stretches);
            (part.lane, part.tenure, unmoved)
        })
    }

    /// A flush met what somebody else has flushed of this lane.
    pub fn is_in_doubt(&self, lane: usize) {
        self.parts.iter().filter(|part| part.lane == lane).for_each(|part| part.tenure.doubt.raise());
    }

    /// Which of these ids of a lane lie behind the group's position, wherever it stands by now: nobody has said that they are settled.
    /// Where that cannot be asked the tenure ends, and they come again.
    pub async fn still_unsettled(&self, lane: usize, ids: &[EntryId]) -> Result<HashSet<EntryId>, Fault> {
        match self.parts.iter().find(|part| part.lane == lane) {
            Some(part) => part.tenure.still_unsettled(ids).await,
            None => Ok(HashSet::new()),
        }
    }
}

/// What a tenure's position could be moved over.
#[derive(Debug, Clone, Copy)]
pub struct Unmoved {
    /// So many entries.
    pub entries: u64,
    /// Whether that is all that was read.
    pub is_all: bool,
}

impl Tenure {
    /// One that begins where the group stands.
    pub fn new(link: Arc<Link>, claim: Claim, doubt: Doubt, position: Position) -> Tenure {
        let (stretches, stands) = (Mutex::new(Stretches::from(position)), tokio::sync::Mutex::new(position));
        Tenure { link, claim, doubt, stretches, stands, ended: Mutex::default(), queued: AtomicBool::new(false) }
    }

    /// Whether it was not queued before, to have its position moved. Moving it ends that.
    pub fn queue(&self) -> bool {
        !self.queued.swap(true, Ordering::Relaxed)
    }

    /// Whether nothing that was read is unsettled.
    pub fn is_settled(&self) -> bool {
        self.stretches().open.is_empty()
    }

    /// Moves the positions of these groups over what is settled, or looks whether they still are where they were left.
    pub async fn advance(tenures: &[Arc<Tenure>]) {
        // Each is locked while it is moved: always in the same order.
        let mut tenures: Vec<&Arc<Tenure>> = tenures.iter().collect();
        let place = |tenure: &'_ Arc<Tenure>| Arc::as_ptr(&tenure.link);
        tenures.sort_unstable_by(|a, b| (place(a), &a.claim.stream).cmp(&(place(b), &b.claim.stream)));
        tenures.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let of_one_link = tenures.chunk_by(|a, b| Arc::ptr_eq(&a.link, &b.link));
        join_all(of_one_link.flat_map(|tenures| tenures.chunks(MOVED_AT_ONCE)).map(Tenure::advance_together)).await;
    }

    /// Some of one link's, by one script.
    async fn advance_together(tenures: &[&Arc<Tenure>]) {
        let mut moved = Vec::with_capacity(tenures.len());
        for tenure in tenures {
            tenure.queued.store(false, Ordering::Relaxed);
            let stands = tenure.stands.lock().await;
            if tenure.ended().is_none() {
                let to = tenure.stretches().reached;
                moved.push((tenure, stands, to));
            }
        }
        let Some((first, ..)) = moved.first() else { return };
        let moves: Vec<Move<'_>> =
            moved.iter().map(|(tenure, stands, to)| Move { claim: &tenure.claim, from: stands.id, to: *to }).collect();
        match position::advance(&first.link, &moves).await {
            Ok(ends) => {
                moved.into_iter().zip(ends).for_each(|((tenure, stands, to), end)| tenure.has_moved(stands, to, end));
            }
            Err(fault) => moved.iter().for_each(|(tenure, ..)| tenure.end(End::Fault(fault.clone()))),
        }
    }

    fn has_moved(&self, mut stands: tokio::sync::MutexGuard<'_, Position>, to: Position, end: Result<Moved, Fault>) {
        match end {
            Ok(Moved::There(read)) => {
                *stands = Position { id: to.id, read };
                self.stretches().moved(*stands);
            }
            Ok(Moved::Displaced(why)) => self.end(End::Displaced(why)),
            Err(fault) => self.end(End::Fault(fault)),
        }
    }

    async fn still_unsettled(&self, ids: &[EntryId]) -> Result<HashSet<EntryId>, Fault> {
        let stands = self.stands_now().await.inspect_err(|fault| self.end(End::Fault(fault.clone())))?;
        Ok(ids.iter().copied().filter(|id| *id > stands).collect())
    }

    /// Where the group stands by now, by whomever it was moved.
    async fn stands_now(&self) -> Result<EntryId, Fault> {
        let position = position::of_group(&self.link, &self.claim).await?;
        // In another history the same id may be another entry.
        if !self.link.is_same_server().await? {
            return Err(Fault::ValkeyLost("the server has another history of writes".into()));
        }
        Ok(position.id)
    }

    fn end(&self, why: End) {
        if why == End::Displaced(position::LEASE_GONE) {
            self.doubt.raise();
        }
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    /// Why it has ended, if it has.
    pub fn ended(&self) -> Option<End> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stretches(&self) -> MutexGuard<'_, Stretches> {
        // Whoever held it did nothing but count.
        self.stretches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was read, in order, and how far all of it is settled. Pure.
#[derive(Debug)]
struct Stretches {
    /// Those from the first one that is not settled on.
    open: VecDeque<Stretch>,
    /// The number of the first of them.
    first: u64,
    /// Everything up to there is settled.
    reached: Position,
    /// How many entries that is more than the group knows of.
    unmoved: u64,
}

#[derive(Debug)]
struct Stretch {
    last: EntryId,
    entries: u64,
    is_settled: bool,
}

impl Stretches {
    fn from(position: Position) -> Stretches {
        Stretches { open: VecDeque::new(), first: 0, reached: position, unmoved: 0 }
    }

    fn read(&mut self, last: EntryId, entries: u64) -> u64 {
        self.open.push_back(Stretch { last, entries, is_settled: false });
        self.first + self.open.len() as u64 - 1
    }

    fn settled(&mut self, number: u64) -> u64 {
        if let Some(stretch) = number.checked_sub(self.first).and_then(|n| self.open.get_mut(n as usize)) {
            stretch.is_settled = true;
        }
        while let Some(stretch) = self.open.pop_front_if(|stretch| stretch.is_settled) {
            self.first += 1;
            let read = self.reached.read.map(|read| read + stretch.entries);
            self.reached = Position { id: stretch.last, read };
            self.unmoved += stretch.entries;
        }
        self.unmoved
    }

    /// The group stands there, and has read as many entries as the server says.
    fn moved(&mut self, to: Position) {
        if self.reached.id == to.id {
            (self.reached, self.unmoved) = (to, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(ms: u64) -> EntryId {
        EntryId { ms, seq: 0 }
    }

    #[test]
    fn the_position_moves_over_what_is_settled_from_the_first_batch_on() {
        let mut stretches = Stretches::from(Position { id: id(10), read: Some(100) });
        let numbers: Vec<u64> = [(12, 2), (15, 3), (16, 1)].map(|(last, n)| stretches.read(id(last), n)).into();
        assert_eq!(stretches.settled(numbers[1]), 0, "the first one is not settled");
        assert_eq!(stretches.reached, Position { id: id(10), read: Some(100) });
        assert_eq!(stretches.settled(numbers[0]), 5);
        assert_eq!(stretches.reached, Position { id: id(15), read: Some(105) });
        // Two entries were deleted from the stream before they could be read: the server knows.
        stretches.moved(Position { id: id(15), read: Some(107) });
        assert_eq!(stretches.settled(numbers[2]), 1);
        assert_eq!(stretches.reached, Position { id: id(16), read: Some(108) });
    }

    #[test]
    fn a_batch_that_is_settled_twice_or_is_unknown_moves_nothing() {
        let mut stretches = Stretches::from(Position { id: id(0), read: None });
        let first = stretches.read(id(1), 1);
        assert_eq!((stretches.settled(first), stretches.settled(first), stretches.settled(99)), (1, 1, 1));
        assert_eq!(stretches.reached, Position { id: id(1), read: None });
    }

    proptest! {
        #[test]
        fn whatever_the_order_nothing_unsettled_is_passed(order in Just((0..20u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut stretches = Stretches::from(Position { id: id(0), read: Some(0) });
            let numbers: Vec<u64> = (1..=20).map(|ms| stretches.read(id(ms), 1)).collect();
            let mut settled = [false; 20];
            for n in order {
                stretches.settled(numbers[n as usize]);
                settled[n as usize] = true;
                let prefix = settled.iter().take_while(|is_settled| **is_settled).count() as u64;
                prop_assert_eq!(stretches.reached, Position { id: id(prefix), read: Some(prefix) });
            }
        }
    }
}
