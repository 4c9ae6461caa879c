//! Incident: a fault that lasts, from its first occurrence until it is overcome.
//!
//! Takes faults as they are met; gives when to try again, and whether the operator is told: once a pipeline and side, however
//! many workers meet the same, and then now and then. It cannot fail. Time is an argument.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Fault;
use super::table::{Judgement, Verdict, judge};

/// The longest wait after a first failure.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest wait after any failure: how late a worker notices, at worst, that a server is back.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often an operator is reminded of a fault that lasts.
const REMIND_AFTER: Duration = Duration::from_secs(30);
/// So many different codes of faults are counted apart.
pub const MAX_CODES: usize = 64;
/// The code of all others.
const OTHER: &str = "other";

/// The waits between attempts: doubled from 50 ms to 5 s. Each is between half of that and all of it, at random, so that a fleet does
/// not knock in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    longest: Duration,
}

/// The waits between attempts.
pub fn backoff() -> Backoff {
    Backoff { longest: BACKOFF_MIN }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let longest = self.longest;
        self.longest = (longest * 2).min(BACKOFF_MAX);
        Some(longest.mul_f64(rand::random_range(0.5..=1.0)))
    }
}

/// The faults of one side of a pipeline, told once for all its workers. Its clones are one.
#[derive(Debug, Clone, Default)]
pub struct Incidents {
    told: Arc<Mutex<Told>>,
    /// Every fault ever met, by its code.
    counts: Arc<Mutex<BTreeMap<String, u64>>>,
}

/// What has been told, since the first worker met a fault.
#[derive(Debug, Default)]
struct Told {
    /// How many workers have met a fault and not overcome it.
    failing: usize,
    attempts: u32,
    since: Option<Instant>,
    /// When each verdict was told last.
    said: Vec<(Verdict, Instant)>,
    /// What was met last.
    last: Option<(Fault, Judgement)>,
}

/// A fault that lasts, as it is told to somebody who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lasting {
    /// What was met last.
    pub fault: Fault,
    /// What it means.
    pub judgement: Judgement,
    /// How long ago the first worker met one.
    pub lasted: Duration,
}

impl Incidents {
    /// What one worker meets: it counts its own attempts and has its own waits.
    pub fn incident(&self) -> Incident {
        Incident { attempts: 0, waits: backoff(), all: self.clone() }
    }

    /// How often each fault was met, by its code. A trigger may raise codes of its own: beyond [`MAX_CODES`] they are `other`.
    pub fn counts(&self) -> Vec<(String, u64)> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(code, count)| (code.clone(), *count)).collect()
    }

    fn count(&self, code: &str) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let code = if counts.len() < MAX_CODES || counts.contains_key(code) { code } else { OTHER };
        match counts.get_mut(code) {
            Some(count) => *count += 1,
            None => drop(counts.insert(code.to_owned(), 1)),
        }
    }

    /// What lasts, if some worker has met a fault and not overcome it.
    pub fn lasting(&self, now: Instant) -> Option<Lasting> {
        let told = self.lock();
        let (fault, judgement) = told.last.clone().filter(|_| told.failing > 0)?;
        let lasted = told.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        Some(Lasting { fault, judgement, lasted })
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        // Whoever held it did nothing but count.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fault that lasts, as one worker meets it.
#[derive(Debug)]
pub struct Incident {
    attempts: u32,
    waits: Backoff,
    all: Incidents,
}

/// What to do about a fault that was just met.
#[derive(Debug, Clone, Copy)]
pub struct Response {
    /// What to do, and what to tell.
    pub judgement: Judgement,
    /// How long to wait before trying again.
    pub wait: Duration,
    /// How long ago the first worker met it.
    pub lasted: Duration,
}

impl Default for Incident {
    fn default() -> Incident {
        Incidents::default().incident()
    }
}

impl Incident {
    /// A fault was met.
    pub fn met(&mut self, fault: &Fault, now: Instant) -> Response {
        self.all.count(fault.code());
        let mut told = self.all.lock();
        if self.attempts == 0 {
            told.failing += 1;
        }
        self.attempts += 1;
        told.attempts += 1;
        let since = *told.since.get_or_insert(now);
        let judgement = judge(fault, self.attempts);
        told.last = Some((fault.clone(), judgement));
        let wait = self.waits.next().unwrap_or(BACKOFF_MAX);
        Response { judgement, wait, lasted: now.saturating_duration_since(since) }
    }

    /// Whether the operator is to be told now that this fault lasts, by whichever worker: at first, when the verdict is a new one, and
    /// every now and then.
    pub fn is_news(&mut self, verdict: Verdict, now: Instant) -> bool {
        let mut told = self.all.lock();
        match told.said.iter_mut().find(|(said, _)| *said == verdict) {
            Some((_, at)) if now.saturating_duration_since(*at) < REMIND_AFTER => return false,
            Some((_, at)) => *at = now,
            None => told.said.push((verdict, now)),
        }
        true
    }

    /// Whether this worker met a fault and has not overcome it.
    pub fn lasts(&self) -> bool {
        self.attempts > 0
    }

    /// It works again for this worker. Where it was the last one: how often all had failed and for how long, if that was told.
    pub fn over(&mut self, now: Instant) -> Option<(u32, Duration)> {
        if self.attempts == 0 {
            return None;
        }
        let Told { attempts, since, said, .. } = self.leave()?;
        let lasted = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        (!said.is_empty()).then_some((attempts, lasted))
    }

    /// What was met was no incident, such as the search for poison: it is forgotten without a word.
    pub fn forget(&mut self) {
        self.leave();
    }

    /// This worker fails no longer. Gives what was told, where it was the last one.
    fn leave(&mut self) -> Option<Told> {
        let mut told = self.all.lock();
        if self.attempts > 0 {
            told.failing -= 1;
        }
        (self.attempts, self.waits) = (0, backoff());
        (told.failing == 0).then(|| std::mem::take(&mut *told))
    }
}

impl Drop for Incident {
    /// A worker that ends while it fails is not waited for by its peers.
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn postgres(code: &str) -> Fault {
        Fault::Postgres { sqlstate: code.into(), message: String::new(), schema: None, constraint: None, routine: None }
    }

    /// A fault is met: whether it is told, and how long it has lasted.
    fn met(incident: &mut Incident, fault: &Fault, now: Instant) -> (bool, Duration) {
        let response = incident.met(fault, now);
        (incident.is_news(response.judgement.verdict, now), response.lasted)
    }

    #[test]
    fn a_fault_that_lasts_is_told_once_and_then_now_and_then() {
        let (mut incident, start) = (Incident::default(), Instant::now());
        let lost = Fault::PostgresLost("reset".into());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(met(&mut incident, &lost, start).0);
        assert!(!met(&mut incident, &lost, after(1)).0);
        assert!(met(&mut incident, &postgres("42P01"), after(2)).0, "another verdict is news");
        assert!(!met(&mut incident, &lost, after(3)).0, "and no news when it comes by turns");
        let reminder = met(&mut incident, &postgres("42P01"), after(2) + REMIND_AFTER);
        assert_eq!(reminder, (true, Duration::from_secs(2) + REMIND_AFTER));
        assert_eq!(incident.over(after(60)), Some((5, Duration::from_secs(60))));
        assert_eq!(incident.over(start), None);
        incident.met(&lost, start);
        assert_eq!(incident.over(after(1)), None, "what was not told is not told to be over");
    }

    #[test]
    fn workers_of_one_pipeline_speak_once_and_each_counts_for_itself() {
        let (incidents, start) = (Incidents::default(), Instant::now());
        let lost = Fault::PostgresLost("reset".into());
        let mut workers: Vec<Incident> = (0..8).map(|_| incidents.incident()).collect();
        let told = |workers: &mut Vec<Incident>, at| {
            workers.iter_mut().map(|worker| met(worker, &lost, at).0).filter(|told| *told).count()
        };
        assert_eq!(told(&mut workers, start), 1);
        assert!(workers.iter().all(|worker| worker.attempts == 1));
        assert_eq!(told(&mut workers, start + REMIND_AFTER), 1);
        // A worker that ends while it fails does not keep the incident open.
        drop(workers.pop());
        let over: Vec<_> = workers.iter_mut().map(|worker| worker.over(start + 2 * REMIND_AFTER)).collect();
        assert!(over[..6].iter().all(Option::is_none));
        assert_eq!(over[6], Some((16, 2 * REMIND_AFTER)));
        assert!(met(&mut workers[0], &lost, start + 2 * REMIND_AFTER).0, "the next one is a new one");
    }

    #[test]
    fn faults_are_counted_by_their_code_and_the_codes_have_a_limit() {
        let (incidents, now) = (Incidents::default(), Instant::now());
        let mut incident = incidents.incident();
        for _ in 0..3 {
            incident.met(&postgres("23514"), now);
        }
        incident.over(now);
        assert_eq!(incidents.counts(), [("23514".to_owned(), 3)], "what is over still happened");
        for n in 0..1_000 {
            incident.met(&postgres(&format!("U{n:04}")), now);
        }
        let counts = incidents.counts();
        assert_eq!(counts.len(), MAX_CODES + 1);
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), 1_003);
    }

    #[test]
    fn what_lasts_is_told_until_the_last_worker_has_overcome_it() {
        let (incidents, start) = (Incidents::default(), Instant::now());
        let (mut one, mut other) = (incidents.incident(), incidents.incident());
        assert_eq!(incidents.lasting(start), None);
        one.met(&Fault::PostgresLost("reset".into()), start);
        other.met(&postgres("42P01"), start);
        one.over(start);
        let lasting = incidents.lasting(start + Duration::from_secs(3)).expect("one fails");
        assert_eq!((lasting.judgement.verdict, lasting.lasted), (Verdict::Halt, Duration::from_secs(3)));
        other.over(start);
        assert_eq!(incidents.lasting(start), None);
    }

    #[test]
    fn waits_grow_and_none_is_longer_than_the_longest() {
        for _ in 0..100 {
            let waits: Vec<_> = backoff().take(20).collect();
            assert!(waits.iter().all(|wait| *wait >= BACKOFF_MIN / 2 && *wait <= BACKOFF_MAX), "{waits:?}");
            assert!(waits[19] >= BACKOFF_MAX / 2);
        }
    }
}
