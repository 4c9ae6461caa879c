//! TTL: how long a cached row lives, as one struct with a strategy for each way in which rows are used.
//!
//! Pure: takes a random number; gives times. A TTL in Valkey is `fresh` with its jitter, and `stale_for` on top, for which the row is kept only to be
//! served when it cannot be loaded.

use std::time::Duration;

/// A time that stands for any longer one: a hundred years. Servers and clocks can count no further than a few times that.
pub(super) const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A time as it can be used: at least a millisecond, and no longer than [`LONGEST`].
pub(super) fn usable(time: Duration) -> Duration {
    time.clamp(Duration::from_millis(1), LONGEST)
}

/// A share within 0..1; none of what is no number.
pub(super) fn share(share: f64) -> f64 {
    if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) }
}

/// How long a row lives in the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ttl {
    /// For how long a row is served without a question.
    pub fresh: Duration,
    /// By which share of `fresh` it is made shorter or longer at random, 0 to 1. Rows that were loaded together do not expire together.
    pub jitter: f64,
    /// Whether each read makes the row live for `fresh` again: for sessions. Such a row has no early refresh.
    pub sliding: bool,
    /// For how long it is remembered that a row does not exist. Zero: not at all.
    pub missing: Duration,
    /// So long before its end one reader loads the row again, while all others are served.
    pub early: Duration,
    /// For how long after its end a row is served where it cannot be loaded.
    pub stale_for: Duration,
}

impl Ttl {
    /// For most rows: `fresh` with 10 % of jitter, so that a burst of loads does not come back as a burst; a tenth of it for an early refresh, so that
    /// nobody waits for a row in use; missing rows for a tenth of it, 30 s at the most, because a row that was just created should be seen soon.
    pub fn of(fresh: Duration) -> Ttl {
        let missing = (fresh / 10).min(Duration::from_secs(30));
        Ttl { fresh, jitter: 0.1, sliding: false, missing, early: fresh / 10, stale_for: Duration::ZERO }
    }

    /// Exactly so long, with no jitter and no early refresh: for what must end at a known time.
    pub fn fixed(fresh: Duration) -> Ttl {
        Ttl { jitter: 0.0, early: Duration::ZERO, ..Ttl::of(fresh) }
    }

    /// From the last read on: for sessions.
    pub fn sliding(idle: Duration) -> Ttl {
        Ttl { jitter: 0.0, early: Duration::ZERO, sliding: true, ..Ttl::of(idle) }
    }

    /// A few seconds: for rows that others write without telling the cache. It takes the load off PostgreSQL and is never older than that.
    pub fn short() -> Ttl {
        Ttl::of(Duration::from_secs(5))
    }

    /// A day: for rows that are invalidated by whoever writes them. The TTL is only the net below that, for what a lost invalidation leaves behind; and
    /// for an hour more where PostgreSQL is away.
    pub fn safety_net() -> Ttl {
        Ttl { stale_for: Duration::from_secs(3600), ..Ttl::of(Duration::from_secs(86_400)) }
    }

    /// The same, served for so long after its end where it cannot be loaded.
    pub fn stale_for(self, stale_for: Duration) -> Ttl {
        Ttl { stale_for, ..self }
    }

    /// The same with times that servers and clocks can count.
    pub(super) fn usable(self) -> Ttl {
        Ttl {
            fresh: usable(self.fresh),
            missing: self.missing.min(LONGEST),
            early: self.early.min(LONGEST),
            stale_for: self.stale_for.min(LONGEST),
            ..self
        }
    }

    /// The TTL of a row that is stored now; `random` is within 0..1. A millisecond at the least.
    pub fn in_valkey(&self, is_missing: bool, random: f64) -> Duration {
        let fresh = if is_missing { self.missing } else { self.fresh };
        let factor = 1.0 + share(self.jitter) * (2.0 * share(random) - 1.0);
        let stale_for = if is_missing { Duration::ZERO } else { self.stale_for };
        (fresh.mul_f64(factor) + stale_for).max(Duration::from_millis(1))
    }

    /// What a row with so much of its TTL left is good for.
    pub fn age(&self, left: Duration, is_missing: bool) -> Age {
        let stale_for = if is_missing { Duration::ZERO } else { self.stale_for };
        let early = if self.sliding || is_missing { Duration::ZERO } else { self.early };
        match left {
            left if left <= stale_for && !stale_for.is_zero() => Age::Stale,
            left if left <= stale_for + early => Age::Early,
            _ => Age::Fresh,
        }
    }
}

/// What a cached row is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// To be served.
    Fresh,
    /// To be served, while one reader loads it again.
    Early,
    /// To be served only by who cannot load it.
    Stale,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_row_is_fresh_then_early_then_stale() {
        let ttl = Ttl { early: s(10), ..Ttl::of(s(100)) }.stale_for(s(50));
        assert_eq!(ttl.in_valkey(false, 0.5), s(150));
        assert_eq!([s(150), s(61), s(60), s(51), s(50), s(1)].map(|left| ttl.age(left, false)), {
            use Age::*;
            [Fresh, Fresh, Early, Early, Stale, Stale]
        });
        assert_eq!(ttl.in_valkey(true, 0.5), s(10), "a missing row is not kept for later");
        assert_eq!(ttl.age(s(1), true), Age::Fresh);
    }

    #[test]
    fn each_strategy_is_what_it_says() {
        assert_eq!([0.0, 0.9].map(|random| Ttl::fixed(s(60)).in_valkey(false, random)), [s(60); 2]);
        assert_eq!(Ttl::sliding(s(60)).age(s(1), false), Age::Fresh);
        assert_eq!(Ttl::of(s(1000)).missing, s(30));
        assert_eq!((Ttl::safety_net().stale_for, Ttl::short().fresh), (s(3600), s(5)));
    }

    #[test]
    fn times_that_nobody_can_count_stand_for_long_ones() {
        let max = Duration::MAX;
        let ttl =
            Ttl { fresh: max, jitter: f64::NAN, sliding: false, missing: max, early: max, stale_for: max }.usable();
        assert_eq!(ttl.in_valkey(false, f64::NAN), LONGEST * 2);
        assert_eq!(ttl.in_valkey(true, 0.5), LONGEST);
        assert_eq!(ttl.age(max, false), Age::Fresh);
        let zero = Duration::ZERO;
        let ttl =
            Ttl { fresh: zero, jitter: -1.0, sliding: true, missing: zero, early: zero, stale_for: zero }.usable();
        assert_eq!(ttl.in_valkey(false, 0.5), Duration::from_millis(1));
    }

    proptest! {
        #[test]
        fn jitter_stays_within_its_share_and_a_ttl_is_never_zero(fresh in 0u64..1_000_000, jitter in 0.0..2.0f64, random in -1.0..2.0f64) {
            let ttl = Ttl { jitter, ..Ttl::of(Duration::from_millis(fresh)) }.usable();
            let given = ttl.in_valkey(false, random);
            let share = jitter.min(1.0);
            prop_assert!(given >= Duration::from_millis(1));
            prop_assert!(given <= Duration::from_millis(fresh).mul_f64(1.0 + share) + Duration::from_millis(1));
            prop_assert!(given + Duration::from_millis(1) >= Duration::from_millis(fresh).mul_f64(1.0 - share));
        }
    }
}
