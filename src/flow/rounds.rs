//! Rounds: which streams the next read names, and how many entries it asks each of them for. Pure: time is an argument.
//!
//! Takes the streams that are read alone and what became of each read; gives the next one. It cannot fail.
//!
//! A read that names many streams finds those that have something, at a price that grows with their number; and a flush pays for each stream
//! that it has entries of. So streams whose last read brought all that was asked for are read by themselves, a few at a time and in large pieces, each
//! in its turn; the others are looked at again soon, and none waits for long.
//!
//! Where the server says which streams are written to ([`super::news`]) no read waits: the streams that were said are looked at, and all of them
//! every now and then, for what was not heard.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::news::Told;

/// How long after a look the other streams are looked at again while some are known to have more; later the more there are, and the longer the look
/// took: where the server is far away, looks must not become all that is done.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LOOK_EVERY_FOR_EACH: Duration = Duration::from_micros(20);
const LOOK_EVERY_FOR_ITS_TIME: u32 = 4;
/// The time from one look that waits for entries to the next one, for each stream: with ten thousand of them, ten looks a second.
const WAIT_FOR_EACH: Duration = Duration::from_micros(10);
/// While the server says which streams are written to: how often all of them are looked at all the same, and less often the more there are.
const LOOK_AT_ALL_EVERY: Duration = Duration::from_millis(500);
const LOOK_AT_ALL_EVERY_FOR_EACH: Duration = Duration::from_micros(400);

/// One read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// The streams that it names, ascending.
    pub streams: Vec<usize>,
    /// How many entries it asks each of them for.
    pub count: usize,
    /// Whether it waits for entries.
    pub waits: bool,
}

/// The streams that are read alone, and what is known of them.
#[derive(Debug)]
pub struct Rounds {
    /// All of them, ascending.
    all: Vec<usize>,
    /// Those that have more, as far as is known.
    full: BTreeSet<usize>,
    /// Of those that have more, the one whose turn comes next, or the first behind it.
    turn: usize,
    /// When the others are to be looked at again although some are known to have more.
    look_at: Instant,
    /// When they were looked at last.
    looked: Option<Instant>,
    /// Those that were said to have something, if anybody says so.
    told: Option<BTreeSet<usize>>,
    /// When all are to be looked at, whatever was said.
    look_at_all: Instant,
}

/// What bounds a read.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// So many entries are wanted.
    pub entries: usize,
    /// So many of one stream are worth its place in a flush, where there are more.
    pub worth: usize,
    /// So many of one stream at the most.
    pub of_one: usize,
    /// So many of all streams at the most, should each have as many as it is asked for: the server holds them all at once.
    pub of_all: usize,
}

impl Rounds {
    /// Of no stream yet.
    pub fn new(now: Instant) -> Rounds {
        let (all, full) = (Vec::new(), BTreeSet::new());
        Rounds { all, full, turn: 0, look_at: now, looked: None, told: None, look_at_all: now }
    }

    /// From now on these, ascending.
    pub fn over(&mut self, streams: Vec<usize>) {
        self.full.retain(|stream| streams.binary_search(stream).is_ok());
        if let Some(told) = &mut self.told {
            // What they have got before they were read here nobody has said.
            told.extend(streams.iter().filter(|stream| self.all.binary_search(stream).is_err()));
        }
        self.all = streams;
    }

    /// These were said to have something, or nobody says anything.
    pub fn hear(&mut self, told: Told) {
        match told {
            Told::Unknown => self.told = None,
            Told::Any => self.told = Some(self.all.iter().copied().collect()),
            Told::Of(streams) => match &mut self.told {
                Some(known) => known.extend(streams),
                None => self.told = Some(self.all.iter().copied().collect()),
            },
        }
    }

    /// When the next read may be sent, where there is none to be sent at once and none that waits: as soon as those that were said to have something may
    /// be looked at, or all of them.
    pub fn idle_until(&self, now: Instant) -> Option<Instant> {
        let told = self.told.as_ref().filter(|_| self.full.is_empty() && !self.all.is_empty())?;
        let at = if told.is_empty() { self.look_at_all } else { self.may_wait_at(now).min(self.look_at_all) };
        (at > now).then_some(at)
    }

    /// Whether something was said that may be looked at soon: nothing else need be heard until then.
    pub fn has_news(&self) -> bool {
        self.told.as_ref().is_some_and(|told| !told.is_empty())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The next read. `has_some`: whether something was read that need not wait for more. None: nothing more is known to be there.
    pub fn next(&mut self, room: Room, has_some: bool, now: Instant) -> Option<Round> {
        let waits = self.full.is_empty();
        if self.all.is_empty() || waits && has_some {
            return None;
        }
        if waits || now >= self.look_at && self.full.len() < self.all.len() {
            let streams = self.others(now);
            self.look_at = self.next_look(now, Duration::ZERO);
            if !streams.is_empty() {
                self.looked = Some(now);
                let count = room.entries.min(room.of_one).min(room.of_all / streams.len()).max(1);
                return Some(Round { streams, count, waits: waits && self.told.is_none() });
            }
            if waits {
                return None;
            }
        }
        let most = (room.entries / room.worth.max(1)).max(1);
        let mut streams: Vec<usize> =
            self.full.range(self.turn..).chain(self.full.range(..self.turn)).copied().take(most).collect();
        self.turn = streams.last().map_or(0, |last| last + 1);
        streams.sort_unstable();
        let count = (room.entries / streams.len()).min(room.of_one).max(1);
        Some(Round { streams, count, waits })
    }

    /// Those that may have something, beside those that are known to have more.
    fn others(&mut self, now: Instant) -> Vec<usize> {
        let is_other = |stream: &usize| !self.full.contains(stream);
        match &mut self.told {
            Some(told) if now < self.look_at_all => {
                let told = std::mem::take(told);
                told.into_iter().filter(|stream| is_other(stream) && self.all.binary_search(stream).is_ok()).collect()
            }
            told => {
                told.iter_mut().for_each(BTreeSet::clear);
                self.look_at_all = now + LOOK_AT_ALL_EVERY.max(LOOK_AT_ALL_EVERY_FOR_EACH * self.all.len() as u32);
                self.all.iter().copied().filter(is_other).collect()
            }
        }
    }

    /// When the next read that waits may be sent.
    pub fn may_wait_at(&self, now: Instant) -> Instant {
        self.looked.map_or(now, |looked| looked + WAIT_FOR_EACH * self.all.len() as u32)
    }

    fn next_look(&self, now: Instant, took: Duration) -> Instant {
        let often = LOOK_EVERY.max(LOOK_EVERY_FOR_EACH * self.all.len() as u32);
        now + often.max(LOOK_EVERY_FOR_ITS_TIME * took)
    }

    /// A read brought so many entries of these streams.
    pub fn answered(&mut self, round: &Round, got: &[(usize, usize)], now: Instant) {
        // A look names none of those that are known to have more.
        let is_look = round.streams.first().is_some_and(|stream| !self.full.contains(stream));
        if let Some(since) = self.looked.filter(|_| is_look) {
            // How long one took that waits says nothing.
            self.look_at = self.next_look(now, if round.waits { Duration::ZERO } else { now - since });
        }
        for stream in &round.streams {
            self.full.remove(stream);
        }
        self.full.extend(got.iter().filter(|(_, got)| *got >= round.count).map(|(stream, _)| *stream));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room { entries: 40_000, worth: 1_000, of_one: 8_000, of_all: 160_000 };

    #[test]
    fn one_stream_is_asked_for_as_much_as_fits_for_as_long_as_it_has_more() {
        let now = Instant::now();
        let mut rounds = Rounds::new(now);
        assert_eq!(rounds.next(ROOM, false, now), None);
        rounds.over(vec![3]);
        let first = rounds.next(ROOM, false, now).expect("a read");
        assert_eq!(first, Round { streams: vec![3], count: 8_000, waits: true });
        rounds.answered(&first, &[(3, 8_000)], now);
        let room = Room { entries: 100, ..ROOM };
        let second = rounds.next(room, true, now).expect("a read");
        assert_eq!(second, Round { streams: vec![3], count: 100, waits: false });
        rounds.answered(&second, &[(3, 99)], now);
        assert_eq!(rounds.next(ROOM, true, now), None, "what is there need not wait");
        assert!(rounds.next(ROOM, false, now).is_some_and(|round| round.waits));
    }

    #[test]
    fn streams_that_have_more_are_read_by_themselves_and_the_others_are_looked_at_soon() {
        let now = Instant::now();
        let mut rounds = Rounds::new(now);
        rounds.over((0..1_000).collect());
        let look = rounds.next(ROOM, false, now).expect("a read");
        assert_eq!((look.streams.len(), look.count), (1_000, 160));
        rounds.answered(&look, &[(1, 160), (5, 7), (9, 160)], now);
        let few = rounds.next(ROOM, true, now).expect("a read");
        assert_eq!(few, Round { streams: vec![1, 9], count: 8_000, waits: false });
        rounds.answered(&few, &[(1, 8_000), (9, 8_000)], now);
        let later = now + Duration::from_millis(20);
        let look = rounds.next(ROOM, true, later).expect("a read");
        assert_eq!((look.streams.len(), look.waits), (998, false));
        rounds.answered(&look, &[], later);
        assert_eq!(rounds.next(ROOM, true, later).expect("a read").streams, [1, 9]);
    }

    #[test]
    fn of_many_that_have_more_each_has_its_turn_with_a_piece_that_is_worth_it() {
        let now = Instant::now();
        let mut rounds = Rounds::new(now);
        rounds.over((0..100).collect());
        let look = rounds.next(ROOM, false, now).expect("a read");
        rounds.answered(&look, &(0..100).map(|stream| (stream, 1_600)).collect::<Vec<_>>(), now);
        let mut turns = vec![0; 100];
        for _ in 0..5 {
            let round = rounds.next(ROOM, true, now).expect("a read");
            assert_eq!((round.streams.len(), round.count), (40, 1_000));
            assert!(round.streams.is_sorted());
            round.streams.iter().for_each(|stream| turns[*stream] += 1);
            rounds.answered(&round, &round.streams.iter().map(|stream| (*stream, 1_000)).collect::<Vec<_>>(), now);
        }
        assert_eq!(turns, [2; 100]);
    }

    #[test]
    fn a_stream_that_is_no_longer_read_is_named_no_more() {
        let now = Instant::now();
        let mut rounds = Rounds::new(now);
        rounds.over(vec![1, 2]);
        let look = rounds.next(ROOM, false, now).expect("a read");
        rounds.answered(&look, &[(1, 8_000), (2, 8_000)], now);
        rounds.over(vec![2, 4]);
        let next = rounds.next(ROOM, false, now).expect("a read");
        assert_eq!((next.streams, next.waits), (vec![2], false));
    }

    #[test]
    fn the_more_streams_there_are_the_less_often_all_are_asked_to_wait() {
        let now = Instant::now();
        let mut rounds = Rounds::new(now);
        rounds.over((0..10_000).collect());
        assert_eq!(rounds.may_wait_at(now), now);
        rounds.next(ROOM, false, now).expect("a read");
        assert_eq!(rounds.may_wait_at(now), now + Duration::from_millis(100));
    }

    #[test]
    fn while_the_server_says_which_are_written_to_these_are_looked_at_and_all_now_and_then() {
        let mut now = Instant::now();
        let mut rounds = Rounds::new(now);
        rounds.over((0..10_000).collect());
        rounds.hear(Told::Any);
        let all = rounds.next(ROOM, false, now).expect("a read");
        assert_eq!((all.streams.len(), all.waits), (10_000, false));
        rounds.answered(&all, &[], now);
        assert_eq!((rounds.next(ROOM, false, now), rounds.has_news()), (None, false));
        assert_eq!(rounds.idle_until(now), Some(now + Duration::from_secs(4)));
        // Some are written to: soon they are looked at, and nothing else.
        rounds.hear(Told::Of([7, 77, 10_000].into()));
        assert_eq!((rounds.idle_until(now), rounds.has_news()), (Some(now + Duration::from_millis(100)), true));
        now += Duration::from_millis(100);
        assert_eq!(rounds.idle_until(now), None);
        let few = rounds.next(ROOM, false, now).expect("a read");
        assert_eq!((&*few.streams, few.waits), (&[7, 77][..], false));
        // One has more: it is read by itself, and another one is heard of.
        rounds.answered(&few, &[(77, few.count), (7, 1)], now);
        rounds.hear(Told::Of([77, 8].into()));
        assert_eq!(rounds.idle_until(now), None);
        assert_eq!(rounds.next(ROOM, true, now).map(|round| round.streams), Some(vec![77]));
        now += Duration::from_millis(200);
        assert_eq!(rounds.next(ROOM, true, now).map(|round| round.streams), Some(vec![8]));
        // What was not heard of is found all the same.
        now += Duration::from_secs(4);
        let all = rounds.next(ROOM, true, now).expect("a read");
        assert_eq!(all.streams.len(), 9_999);
        // Nobody says anything any more.
        rounds.answered(&Round { streams: vec![77], count: 9, waits: false }, &[], now);
        rounds.hear(Told::Unknown);
        assert!(rounds.idle_until(now).is_none() && rounds.next(ROOM, false, now).is_some_and(|round| round.waits));
    }

    #[test]
    fn a_stream_that_joins_is_looked_at_though_nobody_said_that_it_has_something() {
        let now = Instant::now();
        let mut rounds = Rounds::new(now);
        rounds.over(vec![1, 2]);
        rounds.hear(Told::Any);
        let both = rounds.next(ROOM, false, now).expect("a read");
        rounds.answered(&both, &[], now);
        rounds.over(vec![1, 2, 5]);
        assert_eq!(rounds.next(ROOM, false, now).map(|round| round.streams), Some(vec![5]));
    }

    #[test]
    fn however_far_away_the_server_is_what_has_more_is_read_and_the_others_are_looked_at() {
        for away in [0, 5, 20, 300].map(Duration::from_millis) {
            let mut now = Instant::now();
            let mut rounds = Rounds::new(now);
            rounds.over(vec![1, 2, 3]);
            let (mut read, mut looks) = (0, 0);
            for _ in 0..100 {
                let round = rounds.next(ROOM, read > 0, now).expect("a read");
                now += away + Duration::from_millis(1);
                let got: Vec<_> =
                    round.streams.iter().filter(|stream| **stream == 2).map(|stream| (*stream, round.count)).collect();
                read += got.len();
                looks += usize::from(round.streams.contains(&3));
                rounds.answered(&round, &got, now);
            }
            assert!(read >= 75 && looks >= 4, "{away:?}: read {read} times, looked {looks} times");
        }
    }
}
