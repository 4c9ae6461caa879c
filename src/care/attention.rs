//! Attention: which of many streams a round of care is about. Pure: time and counts are arguments.
//!
//! Takes of each stream how many batches of it were settled in this process; gives those that need a look. Looking at a stream costs a few questions to
//! both servers, and of ten thousand streams most have had nothing since the last round. So a stream is looked at in the round after something of it was
//! settled, once more in the one behind that, for what was not acknowledged yet, and otherwise in its turn: what other processes have left, and what has
//! become old enough. It cannot fail.

use std::time::Duration;

/// In a round so many streams are looked at in their turn as fit into its length, if each takes this long. So with 200 streams and the default of 10 s
/// every one is looked at in every round, and with 10,000 each within ten minutes.
const FOR_EACH: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub(super) struct Attention {
    /// Of each stream, how many batches were settled when it was looked at last.
    seen: Vec<u64>,
    /// Whether it is to be looked at once more.
    again: Vec<bool>,
    /// Whose turn comes next.
    turn: usize,
}

impl Attention {
    /// Of so many streams.
    pub(super) fn of(streams: usize) -> Attention {
        Attention { seen: vec![0; streams], again: vec![false; streams], turn: 0 }
    }

    /// The streams of the next round, each once; rounds are so far apart.
    pub(super) fn round(&mut self, settled: impl Fn(usize) -> u64, every: Duration) -> Vec<usize> {
        let count = self.seen.len();
        let in_turn =
            usize::try_from(every.as_nanos() / FOR_EACH.as_nanos()).unwrap_or(usize::MAX).clamp(1, count.max(1));
        let (first, turn) = (self.turn, |n: usize| (n + count - self.turn) % count.max(1) < in_turn);
        let mut round: Vec<usize> = Vec::new();
        for n in 0..count {
            let settled = settled(n);
            let is_new = settled != self.seen[n];
            if is_new || self.again[n] || turn(n) {
                round.push(n);
            }
            (self.seen[n], self.again[n]) = (settled, is_new);
        }
        self.turn = (first + in_turn) % count.max(1);
        round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND: Duration = Duration::from_secs(10);

    #[test]
    fn few_streams_are_looked_at_in_every_round() {
        let mut attention = Attention::of(200);
        for _ in 0..3 {
            assert_eq!(attention.round(|_| 0, ROUND), (0..200).collect::<Vec<_>>());
        }
        assert_eq!(Attention::of(1).round(|_| 0, Duration::from_millis(1)), [0]);
        assert!(Attention::of(0).round(|_| 0, ROUND).is_empty());
    }

    #[test]
    fn of_many_those_are_looked_at_that_have_something_and_each_in_its_turn() {
        let mut attention = Attention::of(10_000);
        let mut looks = vec![0; 10_000];
        let busy = |n: usize, round: u64| if n == 7_777 { round.min(3) } else { 0 };
        for round in 1..=50 {
            let these = attention.round(|n| busy(n, round), ROUND);
            assert!(these.len() <= 201 && these.is_sorted(), "{}", these.len());
            // It changes in the first three rounds, and is looked at once more.
            assert_eq!(
                these.contains(&7_777),
                round <= 4 || (round - 1) * 200 <= 7_777 && 7_777 < round * 200,
                "{round}"
            );
            these.into_iter().for_each(|n| looks[n] += 1);
        }
        assert!(looks.iter().all(|looks| *looks >= 1));
    }
}
