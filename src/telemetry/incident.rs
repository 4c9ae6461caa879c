//! Incident: a fault that several workers of a pipeline meet is told once for all of them, not once by each.
//!
//! Takes the faults and recoveries of all workers; says when to tell the operator, and how long it has lasted. It cannot fail.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::retry::Verdict;

/// How often an operator is reminded of a fault that lasts.
const REMIND_AFTER: Duration = Duration::from_secs(30);

/// What the workers of one pipeline have met on one side.
#[derive(Debug, Default)]
pub struct Incident(Mutex<Option<Told>>);

/// What the operator was told, and when.
#[derive(Debug, Clone, Copy)]
struct Told {
    verdict: Verdict,
    at: Instant,
    since: Instant,
}

impl Incident {
    /// A worker met a fault. Where it is to be told now, at first, when the verdict changes and every now and then: how long
    /// the incident has lasted.
    pub fn met(&self, verdict: Verdict, now: Instant) -> Option<Duration> {
        let mut told = self.lock();
        let since = told.map_or(now, |told| told.since);
        if told.is_some_and(|told| told.verdict == verdict && now.saturating_duration_since(told.at) < REMIND_AFTER) {
            return None;
        }
        *told = Some(Told { verdict, at: now, since });
        Some(now.saturating_duration_since(since))
    }

    /// It works again for a worker. If nobody has said so yet: how long the incident lasted.
    pub fn over(&self, now: Instant) -> Option<Duration> {
        self.lock().take().map(|told| now.saturating_duration_since(told.since))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Told>> {
        // Whoever held it did nothing but read and write.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_workers_meet_is_told_once_and_then_now_and_then_with_its_duration() {
        let (incident, start) = (Incident::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(incident.met(Verdict::Retry, start), Some(Duration::ZERO));
        assert_eq!(incident.met(Verdict::Retry, after(1)), None, "another worker");
        assert_eq!(incident.met(Verdict::Halt, after(2)), Some(Duration::from_secs(2)), "another verdict is news");
        assert_eq!(incident.met(Verdict::Halt, after(3)), None);
        assert_eq!(incident.met(Verdict::Halt, after(32)), Some(Duration::from_secs(32)));
        assert_eq!(incident.over(after(40)), Some(Duration::from_secs(40)));
        assert_eq!(incident.over(after(40)), None, "another worker");
        assert_eq!(incident.met(Verdict::Retry, after(50)), Some(Duration::ZERO));
    }
}
