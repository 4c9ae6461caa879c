//! Steps: what the actors of a worker are at, and since when, so that one that is stuck is noticed.
//!
//! An actor takes a [`Step`] before it does something that must end by itself (a flush, an acknowledgement, a read) and drops it
//! afterwards; while it waits for work, for room, or between two attempts it has none. Gives how long the longest step lasts. It cannot fail.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The steps that one shard's actors are at. Its clones are one.
#[derive(Debug, Clone, Default)]
pub struct Steps(Arc<Mutex<Vec<Underway>>>);

#[derive(Debug, Clone, Copy)]
struct Underway {
    number: u64,
    what: &'static str,
    since: Instant,
}

/// A step: dropped, it is done.
#[derive(Debug)]
#[must_use = "a step lasts until it is dropped"]
pub struct Step {
    steps: Steps,
    number: u64,
}

impl Steps {
    /// A step begins. `what`: one word for people.
    pub fn begin(&self, what: &'static str, since: Instant) -> Step {
        let mut underway = self.lock();
        let number = underway.iter().map(|step| step.number).max().map_or(0, |highest| highest + 1);
        underway.push(Underway { number, what, since });
        Step { steps: self.clone(), number }
    }

    /// The step that lasts longest, and how long; none while all actors rest.
    pub fn longest(&self, now: Instant) -> Option<(&'static str, Duration)> {
        let oldest = self.lock().iter().copied().min_by_key(|step| step.since)?;
        Some((oldest.what, now.saturating_duration_since(oldest.since)))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Underway>> {
        // Whoever held it did nothing but push or remove.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.steps.lock().retain(|step| step.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_step_counts_and_one_that_is_done_does_not() {
        let (steps, start) = (Steps::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(steps.longest(start), None);
        let flush = steps.begin("flush", start);
        let ack = steps.begin("ack", after(3));
        assert_eq!(steps.longest(after(10)), Some(("flush", Duration::from_secs(10))));
        drop(flush);
        assert_eq!(steps.longest(after(10)), Some(("ack", Duration::from_secs(7))));
        drop(ack);
        assert_eq!(steps.longest(after(10)), None);
    }

    #[test]
    fn a_step_that_ends_takes_no_other_one_with_it() {
        let (steps, start) = (Steps::default(), Instant::now());
        let first = steps.begin("first", start);
        drop(steps.begin("second", start));
        let third = steps.begin("third", start);
        drop(first);
        assert_eq!(steps.longest(start).map(|(what, _)| what), Some("third"));
        drop(third);
    }
}
