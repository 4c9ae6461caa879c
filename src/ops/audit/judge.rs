//! Judge: what the sums of one counter say, over several looks. Pure.
//!
//! Takes [`Sums`], look after look; gives a [`Class`] when it is certain. It cannot fail.

use serde::Serialize;

/// So many looks with the same difference, and none without one, make it a drift. A counter whose producer is between its two steps in a
/// tenth of all looks would be called one by mistake in one of 10^8.
const CERTAIN: usize = 8;

/// What is known of one counter, all of it as of the moment at which the counter was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sums {
    /// The counter in Valkey; none if there is none.
    pub(super) valkey: Option<i128>,
    /// The row in PostgreSQL; none if there is none.
    pub(super) stored: Option<i128>,
    /// Deltas that the counter has and the row has not yet.
    pub(super) pending: i128,
    /// Deltas that the row has and the counter had not yet.
    pub(super) ahead: i128,
    /// Deltas that the counter has and that are open or discarded dead letters.
    pub(super) letters: i128,
    /// Why it cannot be said what the counter should be.
    pub(super) doubt: Option<String>,
}

impl Sums {
    /// What the counter should be.
    pub(super) fn expected(&self) -> i128 {
        self.stored.unwrap_or(0) + self.pending - self.ahead + self.letters
    }

    /// What it has more.
    pub(super) fn difference(&self) -> i128 {
        self.valkey.unwrap_or(0) - self.expected()
    }

    /// What may be the cause of the difference.
    pub(super) fn why(&self) -> Option<String> {
        if self.doubt.is_some() {
            return self.doubt.clone();
        }
        let words = match (self.difference(), self.valkey, self.stored) {
            (0, ..) => return None,
            (_, None, Some(_)) => "the counter is missing in Valkey: evicted, expired, or never loaded from the table",
            (1.., _, None) => {
                "the row is missing in PostgreSQL: entries were lost before they were flushed, or PostgreSQL was restored (replay)"
            }
            (1.., ..) => {
                "entries were lost before they were flushed, PostgreSQL was restored (replay), or the counter is increased without an entry"
            }
            _ => "Valkey lost increments (a failover or restart), or the row is changed by others than Tidegate",
        };
        Some(words.into())
    }

    fn class(&self) -> Class {
        match self.difference() {
            _ if self.doubt.is_some() => Class::Unexplained,
            0 if self.pending != self.ahead => Class::Pending,
            0 if self.letters != 0 => Class::DeadLetters,
            0 => Class::Equal,
            1.. => Class::ValkeyAhead,
            _ => Class::PgAhead,
        }
    }
}

/// How a counter stands to its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// It has the same value.
    Equal,
    /// It differs by what is on the way.
    Pending,
    /// It differs by dead letters.
    DeadLetters,
    /// It is above its row and all that is on the way.
    ValkeyAhead,
    /// It is below.
    PgAhead,
    /// It cannot be said what it should be.
    Unexplained,
}

impl Class {
    /// Whether it is a drift, or may be one.
    pub fn differs(self) -> bool {
        matches!(self, Class::ValkeyAhead | Class::PgAhead | Class::Unexplained)
    }

    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Class::Equal => "equal",
            Class::Pending => "pending",
            Class::DeadLetters => "dead letters",
            Class::ValkeyAhead => "valkey ahead",
            Class::PgAhead => "pg ahead",
            Class::Unexplained => "unexplained",
        }
    }
}

/// What several looks at one counter have shown.
#[derive(Debug, Default)]
pub(super) struct History {
    differences: Vec<i128>,
}

impl History {
    /// A look. Gives the class when it is certain; `is_last`: there will be no other look.
    ///
    /// A producer that adds the counter first and the entry a moment later makes the counter seem ahead, each time by something else. One
    /// look without a difference is proof that there is none, for differences do not go away by themselves.
    pub(super) fn see(&mut self, sums: Sums, is_last: bool) -> Option<(Class, Sums)> {
        if sums.doubt.is_some() && !is_last {
            // What was in doubt may be settled by the next look.
            self.differences.clear();
            return None;
        }
        if sums.doubt.is_some() || sums.difference() == 0 {
            return Some((sums.class(), sums));
        }
        self.differences.push(sums.difference());
        let same = self.differences.iter().filter(|other| **other == sums.difference()).count();
        match (same >= CERTAIN, is_last) {
            (true, _) => Some((sums.class(), sums)),
            (false, false) => None,
            (false, true) => {
                let doubt = "it differs by something else at each look: its producers add counter and entry in two steps, or are very busy; \
                             look at it alone with --key, or when they rest";
                let sums = Sums { doubt: Some(doubt.into()), ..sums };
                Some((Class::Unexplained, sums))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sums(valkey: i128, stored: i128, pending: i128, letters: i128) -> Sums {
        Sums { valkey: Some(valkey), stored: Some(stored), pending, letters, ..Sums::default() }
    }

    #[test]
    fn a_counter_is_classed_by_what_is_left_when_everything_known_is_taken_off() {
        for (sums, class) in [
            (sums(5, 5, 0, 0), Class::Equal),
            (sums(5, 3, 2, 0), Class::Pending),
            (sums(5, 3, 0, 2), Class::DeadLetters),
            (sums(5, 3, 0, 0), Class::ValkeyAhead),
            (sums(5, 6, 0, 0), Class::PgAhead),
            (Sums { ahead: 1, ..sums(5, 6, 0, 0) }, Class::Pending),
            (Sums { doubt: Some("x".into()), ..sums(5, 5, 0, 0) }, Class::Unexplained),
        ] {
            assert_eq!(sums.class(), class, "{sums:?}");
        }
    }

    #[test]
    fn a_difference_is_certain_when_it_is_often_the_same_and_disproved_by_one_look() {
        let mut history = History::default();
        let drift = || sums(7, 5, 0, 0);
        for _ in 1..CERTAIN {
            assert_eq!(history.see(drift(), false), None);
            // A producer between its two steps.
            assert_eq!(history.see(sums(100, 5, 0, 0), false), None);
        }
        assert_eq!(history.see(drift(), false).map(|seen| seen.0), Some(Class::ValkeyAhead));
        let mut history = History::default();
        assert_eq!(history.see(drift(), false), None);
        assert_eq!(history.see(sums(9, 9, 0, 0), false).map(|seen| seen.0), Some(Class::Equal));
        let mut history = History::default();
        for more in 0..5 {
            assert_eq!(history.see(sums(7 + more, 5, 0, 0), false), None);
        }
        assert_eq!(history.see(sums(30, 5, 0, 0), true).map(|seen| seen.0), Some(Class::Unexplained));
    }

    proptest! {
        #[test]
        fn what_is_explained_never_differs(stored: i64, pending: i32, ahead: i32, letters: i32) {
            let (pending, ahead, letters) = (i128::from(pending), i128::from(ahead), i128::from(letters));
            let valkey = Some(i128::from(stored) + pending - ahead + letters);
            let sums = Sums { valkey, stored: Some(stored.into()), pending, ahead, letters, doubt: None };
            prop_assert!(!sums.class().differs());
            let drifted = Sums { valkey: valkey.map(|value| value + 1), ..sums };
            prop_assert_eq!(drifted.class(), Class::ValkeyAhead);
        }
    }
}
