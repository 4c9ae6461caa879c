//! Lanes of a producer: how a repeated increment is recognised.
//!
//! A lane is a name and a sequence number; the shard's state remembers the last number of each lane, and an operation whose number is not higher was done
//! before. So a lane has one operation under way at a time, and whoever adds takes one of a bounded number of lanes. (Not to be taken for a lane of the
//! ledger, which is a shard's place there.)
//!
//! A lane's name begins with the hour in which it was made. A lane that is a day old is given up for a new one; the daemon forgets those that nobody has used
//! for two days more, so that the lanes of processes that are gone do not add up. For that it looks at their numbers: this process's clock may be wrong.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, SemaphorePermit};

/// A lane older than this many hours is given up.
const OLDEST_HOURS: u64 = 24;
const HOUR: Duration = Duration::from_secs(3600);

/// The lanes of one producer.
#[derive(Debug)]
pub(super) struct Lanes {
    turns: Semaphore,
    free: Mutex<Vec<Lane>>,
}

/// One lane, taken: nobody else uses it meanwhile. Dropped, it is free again.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    lanes: &'a Lanes,
    lane: Lane,
    _turn: Option<SemaphorePermit<'a>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lane {
    name: String,
    seq: u64,
    made: u64,
}

impl Lanes {
    /// As many as this at the most, at least one.
    pub(super) fn new(count: usize) -> Lanes {
        Lanes { turns: Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)), free: Mutex::default() }
    }

    /// A lane with the number of its next operation; waits while all of them are taken.
    pub(super) async fn take(&self) -> Taken<'_> {
        // The semaphore is never closed.
        let turn = self.turns.acquire().await.ok();
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let now = hours(SystemTime::now());
        let mut lane = free.filter(|lane| lane.made + OLDEST_HOURS > now).unwrap_or_else(|| Lane::made_at(now));
        lane.seq += 1;
        Taken { lanes: self, lane, _turn: turn }
    }
}

impl Lane {
    fn made_at(hour: u64) -> Lane {
        Lane { name: format!("{hour:x}-{:016x}", rand::random::<u64>()), seq: 0, made: hour }
    }
}

impl Taken<'_> {
    /// The lane's name.
    pub(super) fn name(&self) -> &str {
        &self.lane.name
    }

    /// The operation's number.
    pub(super) fn seq(&self) -> u64 {
        self.lane.seq
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        // An operation whose end is unknown used its number up: if it arrives later it is refused, or it was done.
        self.lanes.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.lane.clone());
    }
}

/// The hour of the lane with this name, as hours since 1970; none if the name is another program's.
#[cfg(any(test, feature = "daemon"))]
pub(crate) fn hour_of(name: &str) -> Option<u64> {
    u64::from_str_radix(name.split_once('-')?.0, 16).ok()
}

fn hours(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / HOUR.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lane_has_one_operation_at_a_time_and_numbers_that_rise() {
        let lanes = Lanes::new(2);
        let (first, second) = (lanes.take().await, lanes.take().await);
        assert_ne!(first.name(), second.name());
        assert_eq!((first.seq(), second.seq()), (1, 1));
        let third = tokio::time::timeout(Duration::from_millis(20), lanes.take()).await;
        assert!(third.is_err(), "a third lane");
        let name = first.name().to_owned();
        drop(first);
        let again = lanes.take().await;
        assert_eq!((again.name(), again.seq()), (name.as_str(), 2));
    }

    #[tokio::test]
    async fn a_lane_that_is_a_day_old_is_given_up() {
        let lanes = Lanes::new(1);
        let old = Lane::made_at(hours(SystemTime::now()) - OLDEST_HOURS);
        assert_eq!(hour_of(&old.name), Some(old.made));
        lanes.free.lock().expect("free").push(old.clone());
        assert_ne!(lanes.take().await.name(), old.name);
    }
}
