//! Attention: which of many streams a round of care is about. Pure: time and counts are arguments.
//!
//! Takes of each stream how much of it was settled in this process; gives those that need a look. Looking at a stream costs a few questions to
//! both servers, and of ten thousand streams most have had little since the last round. So a stream is looked at in the round after much of it was
//! settled, and once more in the one behind that, for what was not acknowledged yet; otherwise in its turn, if it had anything since the last one: and every
//! fourth turn if not, for what other processes have left, and what has become old enough. It cannot fail.

use std::time::Duration;

/// In a round so many streams are looked at in their turn as fit into its length, if each takes this long. So with 200 streams and the default of 10 s
/// every one is looked at in every round, and with 10,000 each that had anything within ten minutes.
const FOR_EACH: Duration = Duration::from_millis(50);
/// So many entries, or a dozen flushes with any of it, are worth a look before a stream's turn.
const WORTH_IT: u64 = 100;
/// A stream that had nothing is looked at in its turn once more, and then every so many turns.
const QUIET_TURNS: u8 = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Attention {
    /// Of each stream, how much was settled when it was looked at last.
    seen: Vec<u64>,
    /// Whether it is to be looked at once more.
    again: Vec<bool>,
    /// For how many turns it has had nothing.
    quiet: Vec<u8>,
    /// Whose turn comes next.
    turn: usize,
}

impl Attention {
    /// Of so many streams.
    pub(super) fn of(streams: usize) -> Attention {
        Attention { seen: vec![0; streams], again: vec![false; streams], quiet: vec![0; streams], turn: 0 }
    }

    /// The streams of the next round, each once; rounds are so far apart.
    pub(super) fn round(&mut self, settled: impl Fn(usize) -> u64, every: Duration) -> Vec<usize> {
        let count = self.seen.len();
        let in_turn =
            usize::try_from(every.as_nanos() / FOR_EACH.as_nanos()).unwrap_or(usize::MAX).clamp(1, count.max(1));
        let (first, are_few) = (self.turn, in_turn >= count);
        let mut round: Vec<usize> = Vec::new();
        for n in 0..count {
            let settled = settled(n);
            let since = settled.wrapping_sub(self.seen[n]);
            let has_turn = are_few || (n + count - first) % count < in_turn;
            let is_much = since >= WORTH_IT;
            let is_due = has_turn && (are_few || self.is_worth_its_turn(n, since > 0));
            if is_much || self.again[n] || is_due {
                round.push(n);
                self.seen[n] = settled;
            }
            self.again[n] = is_much;
        }
        self.turn = (first + in_turn) % count.max(1);
        round
    }

    /// Its turn has come: whether it is looked at.
    fn is_worth_its_turn(&mut self, n: usize, had_anything: bool) -> bool {
        self.quiet[n] = match self.quiet[n] + 1 {
            _ if had_anything => 0,
            turns if turns == 2 * QUIET_TURNS => QUIET_TURNS,
            turns => turns,
        };
        self.quiet[n] <= 1 || self.quiet[n] == QUIET_TURNS
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
    fn of_many_those_are_looked_at_that_have_much_and_each_in_its_turn() {
        let mut attention = Attention::of(10_000);
        let mut looks = vec![0; 10_000];
        let busy = |n: usize, round: u64| if n == 7_777 { round.min(3) * WORTH_IT } else { 0 };
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

    /// In which turns a stream is looked at whose settled entries are these, turn by turn.
    fn turns(settled: &[u64]) -> Vec<usize> {
        let mut attention = Attention::of(400);
        let looked = settled.iter().enumerate().filter(|(_, settled)| {
            let first = attention.round(|n| if n == 7 { **settled } else { 0 }, ROUND).contains(&7);
            // The other half of the streams.
            first | attention.round(|n| if n == 7 { **settled } else { 0 }, ROUND).contains(&7)
        });
        looked.map(|(turn, _)| turn).collect()
    }

    #[test]
    fn a_stream_that_has_little_is_looked_at_in_its_turn_and_a_quiet_one_every_fourth_time() {
        assert_eq!(turns(&[1, 2, 3, 4, 5]), [0, 1, 2, 3, 4]);
        assert_eq!(turns(&[0; 14]), [0, 3, 7, 11]);
        // Once more behind the last entry, then every so often, and at once when there is one again.
        assert_eq!(turns(&[1, 1, 1, 1, 1, 1, 1, 2, 2]), [0, 1, 4, 7, 8]);
    }

    #[test]
    fn however_its_entries_come_none_waits_for_longer_than_its_turns() {
        for step in [0, 1, 7, WORTH_IT, 3 * WORTH_IT] {
            let mut attention = Attention::of(10_000);
            let mut last_looked = vec![0u64; 10_000];
            for round in 1..=600 {
                let settled = |n: usize| if n.is_multiple_of(2) { round / 40 * step } else { 0 };
                for n in attention.round(settled, ROUND) {
                    last_looked[n] = round;
                }
                assert!(
                    round < 300 || last_looked.iter().all(|last| round - last <= 250),
                    "step {step}, round {round}"
                );
            }
        }
    }
}
