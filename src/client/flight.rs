//! Flight: of those who want the same thing at the same time one fetches it, and all of them get it.
//!
//! Takes a key and the work; gives the work's result. Nobody is given a result that was out of date when he asked: whoever joined after the work began
//! takes its result only where it was confirmed later than that; else one of those who wait does the work again, for all of them. Whoever leads may be
//! dropped at any time; the next one then leads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The flights of one kind of thing.
#[derive(Debug)]
pub struct Flights<V>(Mutex<HashMap<String, Arc<Flight<V>>>>);

#[derive(Debug)]
struct Flight<V> {
    landed: tokio::sync::Mutex<Option<(V, Validity)>>,
}

/// From when on a result is known to have been right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// When the work began: it saw everything that had happened by then.
    pub began: Instant,
    /// When it was still right, as far as that was asked later.
    pub confirmed: Option<Instant>,
}

impl Validity {
    fn covers(&self, joined: Instant) -> bool {
        joined <= self.began || self.confirmed.is_some_and(|confirmed| joined <= confirmed)
    }
}

impl<V> Default for Flights<V> {
    fn default() -> Flights<V> {
        Flights(Mutex::default())
    }
}

impl<V: Clone> Flights<V> {
    /// Does the work, or gets the result of whoever does it. The work says until when its result was confirmed, if it was. Behind somebody who takes
    /// longer than `patience` nobody waits: the next one then leads.
    pub async fn join(&self, key: &str, patience: Duration, work: impl AsyncFnOnce() -> (V, Option<Instant>)) -> V {
        let joined = Instant::now();
        loop {
            let flight = self.flight(key);
            let Ok(mut landed) = tokio::time::timeout(patience, flight.landed.lock()).await else {
                self.leave(key, &flight);
                continue;
            };
            if let Some((value, validity)) = &*landed
                && validity.covers(joined)
            {
                return value.clone();
            }
            let began = Instant::now();
            let (value, confirmed) = work().await;
            *landed = Some((value.clone(), Validity { began, confirmed }));
            self.leave(key, &flight);
            return value;
        }
    }

    /// Whoever asks from now on does not join this flight.
    fn leave(&self, key: &str, flight: &Arc<Flight<V>>) {
        let mut flights = self.flights();
        if flights.get(key).is_some_and(|current| Arc::ptr_eq(current, flight)) {
            flights.remove(key);
        }
    }

    /// Whoever asks from now on does not join a flight under way.
    pub fn forget(&self, key: &str) {
        self.flights().remove(key);
    }

    fn flight(&self, key: &str) -> Arc<Flight<V>> {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(key) {
            // A leader that was dropped leaves a flight that nobody is on: it is used again.
            return Arc::clone(flight);
        }
        let flight = Arc::new(Flight { landed: tokio::sync::Mutex::new(None) });
        flights.insert(key.to_owned(), Arc::clone(&flight));
        flight
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<String, Arc<Flight<V>>>> {
        // Whoever held it did nothing but look up.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn under_way(&self) -> usize {
        self.flights().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn many_who_want_the_same_do_the_work_once() {
        let (flights, count, go) = (Flights::default(), AtomicUsize::new(0), Notify::new());
        let work = async || {
            count.fetch_add(1, Ordering::Relaxed);
            go.notified().await;
            (7, Some(Instant::now()))
        };
        let all = futures_util::future::join_all((0..50).map(|_| flights.join("a", LONG, work)));
        let (values, ()) = tokio::join!(all, async {
            tokio::task::yield_now().await;
            go.notify_one();
        });
        assert_eq!((values, count.load(Ordering::Relaxed), flights.under_way()), (vec![7; 50], 1, 0));
    }

    #[tokio::test]
    async fn what_was_not_confirmed_is_fetched_once_more_for_those_who_joined_later() {
        let (flights, count) = (Flights::default(), AtomicUsize::new(0));
        let begun = Notify::new();
        let go = Notify::new();
        let work = async || {
            let turn = count.fetch_add(1, Ordering::SeqCst);
            begun.notify_one();
            go.notified().await;
            (turn, None)
        };
        let first = flights.join("a", LONG, work);
        let later = async {
            begun.notified().await;
            let late = futures_util::future::join_all((0..10).map(|_| flights.join("a", LONG, work)));
            let release = async {
                go.notify_one();
                begun.notified().await;
                go.notify_one();
            };
            tokio::join!(late, release).0
        };
        let (first, late) = tokio::join!(first, later);
        assert_eq!((first, late), (0, vec![1; 10]));
    }

    #[tokio::test]
    async fn a_leader_that_is_dropped_leaves_the_work_to_the_next_one() {
        let flights = Flights::default();
        let never = flights.join("a", LONG, async || std::future::pending::<(i32, Option<Instant>)>().await);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(10), never).await.is_err());
        assert_eq!(flights.join("a", LONG, async || (3, None)).await, 3);
        assert_eq!(flights.under_way(), 0);
    }

    #[tokio::test]
    async fn behind_a_leader_that_never_ends_the_others_wait_for_as_long_as_they_will_and_then_share_another_one() {
        let (flights, count) = (Flights::default(), AtomicUsize::new(0));
        let never = flights.join("a", LONG, async || std::future::pending::<(i32, Option<Instant>)>().await);
        let work = async || {
            count.fetch_add(1, Ordering::Relaxed);
            // Longer than they are apart.
            tokio::time::sleep(Duration::from_millis(200)).await;
            (3, Some(Instant::now()))
        };
        let patience = Duration::from_millis(400);
        let others = futures_util::future::join_all((0..10).map(|_| flights.join("a", patience, work)));
        let values = tokio::select! {
            biased;
            _ = never => panic!("it has no end"),
            values = others => values,
        };
        assert_eq!((values, count.load(Ordering::Relaxed)), (vec![3; 10], 1));
    }
}
