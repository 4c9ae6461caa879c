//! Accounts: what producers of managed counters were told, beside which rows and shown values are judged.
//!
//! Counters are `c0`, `c1` and so on, and all increments are positive. A value that is read is compared at once: nobody who was told an exact value was told
//! a wrong one.

use std::sync::atomic::{AtomicI64, Ordering};

use rand::RngExt;
use rand::rngs::StdRng;
use tidegate::client::postgres::Database;
use tidegate::client::{Count, Counters, NotAdded};
use tidegate::retry::Fault;

/// What the producers of a run say of their counters: all that was ever accepted, and all that was ever sent, read without a lock while they go on.
#[derive(Debug)]
pub struct Accounts {
    initial: Vec<i64>,
    accepted: Vec<AtomicI64>,
    sent: Vec<AtomicI64>,
}

impl Accounts {
    /// These are the values that the counters have when it begins.
    pub fn new(initial: Vec<i64>) -> Accounts {
        let zeros = || initial.iter().map(|_| AtomicI64::new(0)).collect();
        Accounts { accepted: zeros(), sent: zeros(), initial }
    }

    /// What the counter was when it began.
    pub fn initial(&self, of: usize) -> i64 {
        self.initial[of]
    }

    /// An increment was sent; or, less than zero, it was not done.
    pub fn sent(&self, of: usize, by: i64) {
        self.sent[of].fetch_add(by, Ordering::SeqCst);
    }

    /// An increment was accepted.
    pub fn accepted(&self, of: usize, by: i64) {
        self.accepted[of].fetch_add(by, Ordering::SeqCst);
    }

    /// What the counter is at the least: all increments are positive.
    pub fn least(&self, of: usize) -> i64 {
        self.initial[of] + self.accepted[of].load(Ordering::SeqCst)
    }

    /// What the counter is at the most.
    pub fn most(&self, of: usize) -> i64 {
        self.initial[of] + self.sent[of].load(Ordering::SeqCst)
    }

    /// Adds to one, two or three counters; whether that was accepted.
    pub async fn add(&self, counters: &Counters<Database>, random: &mut StdRng, picks: &[usize]) -> bool {
        let pairs: Vec<(String, i64)> = picks.iter().map(|of| (format!("c{of}"), random.random_range(1..5))).collect();
        let note = |account: &[AtomicI64], sign: i64| {
            picks.iter().zip(&pairs).for_each(|(of, (_, by))| {
                account[*of].fetch_add(sign * by, Ordering::SeqCst);
            });
        };
        note(&self.sent, 1);
        let added = match &pairs[..] {
            [(id, by)] if random.random_bool(0.5) => counters.add(id, *by).await,
            [(id, by)] => counters.incr(id, *by).await.map(drop),
            many => counters.add_many(many).await.into_iter().try_for_each(|added| added.map(drop)),
        };
        match added {
            Ok(()) => note(&self.accepted, 1),
            Err(NotAdded::Unavailable(Fault::Valkey { code, .. })) if code == "OOM" => {
                note(&self.sent, -1);
                return false;
            }
            Err(other) => panic!("{other:?}"),
        }
        true
    }

    /// Reads a counter, and compares: an exact value is all that was accepted before the question and nothing that was sent after the answer.
    pub async fn get(&self, counters: &Counters<Database>, of: usize) -> String {
        let least = self.least(of);
        let count = counters.get(&format!("c{of}")).await;
        let most = self.most(of);
        match count {
            Count::Exact(value) => assert!((least..=most).contains(&value), "c{of}: {least} <= {value} <= {most}"),
            Count::Stored(value) => assert!((self.initial[of]..=most).contains(&value), "c{of}: {value} <= {most}"),
            Count::Unknown(_) => {}
        }
        format!("{count:?}").replace(|c: char| c.is_numeric() || c == '-', "")
    }
}
