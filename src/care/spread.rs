//! Spread: how entries are spread over counters, and so how many counters become dirty while entries go on.
//!
//! Pure. Takes what was seen of the entries until now; gives how many counters that are clean so many more entries will touch. A few counters may be hot
//! beside a long cold tail, all may be alike, each entry may be about a new one: no single number tells these apart. So counters are sorted into classes
//! by how likely an entry is about one of them, and a class has as many counters as make what was seen the most likely (expectation maximization for
//! counts that are Poisson distributed, made faster by squared extrapolation; the question of the unseen species, asked of more than one sample).

/// Each class of counters is so many times as likely as the next one.
const STEP: f64 = 2.0;
/// From one that every entry is about to one in 5 * 10^11 entries.
const CLASSES: i32 = 40;
/// Counters that occur so often in the sample, and more often than the number before, are taken together; and so are those that occur still more often,
/// which are dirty at once.
const OFTEN: [usize; 8] = [1, 2, 3, 4, 6, 9, 13, 20];
/// How often the estimate is improved, by three steps each time: half a millisecond. Ten times as many change what is told by a few hundredths.
const ROUNDS: usize = 200;
/// How many steps the third one of a round may stand for.
const LONGEST: f64 = 100.0;

/// What is known of the entries until now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// How often each counter of the newest entries occurs among them.
    pub occurrences: Vec<usize>,
    /// Counters that are dirty.
    pub dirty: u64,
    /// How many entries have made them so; none where that is not known.
    pub unsettled: Option<u64>,
    /// How many entries came while nothing was settled, and how many counters they made dirty.
    pub latest: Option<(u64, u64)>,
}

/// How entries are spread over counters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Spread {
    classes: Vec<Class>,
    /// So many entries have made counters dirty.
    unsettled: f64,
}

/// Counters of which each is as likely as the other.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Class {
    counters: f64,
    /// That an entry is about a certain one of them.
    chance: f64,
}

/// How many counters were seen in one way, and how likely each class is seen so.
struct Sight {
    seen: f64,
    chances: Vec<f64>,
}

impl Spread {
    /// As what is known tells; of nothing known it says that nothing is touched.
    pub fn of(known: &Known) -> Spread {
        let chances: Vec<f64> = (0..CLASSES).map(|n| STEP.powi(-n)).collect();
        let sample: usize = known.occurrences.iter().sum();
        if sample == 0 {
            return Spread::default();
        }
        let mut sights = in_sample(&known.occurrences, sample, &chances);
        if let Some(entries) = known.unsettled {
            // What a sweep has not come to yet was touched by others than these.
            let seen = known.dirty.min(entries) as f64;
            let all = entries as f64;
            sights.push(Sight { seen, chances: chances.iter().map(|chance| touched(all, *chance)).collect() });
            if let Some((latest, new)) = known.latest.filter(|(latest, _)| *latest <= entries) {
                let before = (entries - latest) as f64;
                let is_new = |chance: &f64| untouched(before, *chance) * touched(latest as f64, *chance);
                sights.push(Sight { seen: new as f64, chances: chances.iter().map(is_new).collect() });
            }
        }
        let counters = most_likely(&sights, &chances);
        let classes = chances.into_iter().zip(counters).map(|(chance, counters)| Class { counters, chance }).collect();
        // Each dirty counter stands for an entry at the least.
        Spread { classes, unsettled: known.unsettled.unwrap_or(known.dirty) as f64 }
    }

    /// How many counters that are clean will be touched by so many more entries.
    pub fn becomes_dirty(&self, entries: f64) -> f64 {
        let of =
            |class: &Class| class.counters * untouched(self.unsettled, class.chance) * touched(entries, class.chance);
        self.classes.iter().map(of).sum()
    }

    /// That of so many streams like this one, taken together.
    pub fn times(self, streams: f64) -> Spread {
        let of = |class: Class| Class { counters: class.counters * streams, chance: class.chance / streams };
        Spread { classes: self.classes.into_iter().map(of).collect(), unsettled: self.unsettled * streams }
    }
}

/// The chance that one of so many entries is about a certain counter.
fn touched(entries: f64, chance: f64) -> f64 {
    -(-entries * chance).exp_m1()
}

fn untouched(entries: f64, chance: f64) -> f64 {
    (-entries * chance).exp()
}

/// How many counters occur once in a sample, twice, and so on.
fn in_sample(occurrences: &[usize], sample: usize, chances: &[f64]) -> Vec<Sight> {
    let (mut sights, mut from) = (Vec::new(), 1);
    // Of each class, the chance of a counter to occur a certain number of times, and that of no more than these.
    let mut exactly: Vec<f64> = chances.iter().map(|chance| untouched(sample as f64, *chance)).collect();
    let mut no_more = exactly.clone();
    for to in OFTEN {
        let fewer = no_more.clone();
        for times in from..=to {
            for ((exactly, no_more), chance) in exactly.iter_mut().zip(&mut no_more).zip(chances) {
                *exactly *= chance * sample as f64 / times as f64;
                *no_more += *exactly;
            }
        }
        let seen = occurrences.iter().filter(|occurrences| (from..=to).contains(*occurrences)).count() as f64;
        sights.push(Sight {
            seen,
            chances: no_more.iter().zip(&fewer).map(|(no_more, fewer)| no_more - fewer).collect(),
        });
        from = to + 1;
    }
    let seen = occurrences.iter().filter(|occurrences| **occurrences >= from).count() as f64;
    sights.push(Sight { seen, chances: no_more.iter().map(|no_more| (1.0 - no_more).max(0.0)).collect() });
    sights
}

/// How many counters of each class make what was seen the most likely.
fn most_likely(sights: &[Sight], chances: &[f64]) -> Vec<f64> {
    // At first each class has the same share of the entries.
    let mut counters: Vec<f64> = chances.iter().map(|chance| 1.0 / chance / f64::from(CLASSES)).collect();
    let all: Vec<f64> = (0..chances.len()).map(|class| sights.iter().map(|sight| sight.chances[class]).sum()).collect();
    for _ in 0..ROUNDS {
        let one = likelier(sights, &all, &counters);
        let two = likelier(sights, &all, &one);
        // The two steps go on in their direction, further the less it turned; and the third one sets right what that made less likely.
        let turns: Vec<(f64, f64)> = (0..counters.len())
            .map(|class| {
                let (first, second) = ((one[class] / counters[class]).ln(), (two[class] / one[class]).ln());
                (first, second - first)
            })
            .collect();
        let weighed = |of: fn(&(f64, f64)) -> f64| -> f64 {
            turns.iter().zip(&two).zip(&all).map(|((turn, counters), all)| counters * all * of(turn).powi(2)).sum()
        };
        let (way, turn) = (weighed(|(way, _)| *way), weighed(|(_, turn)| *turn));
        let far = if turn > 0.0 { (way / turn).sqrt().clamp(1.0, LONGEST) } else { 1.0 };
        for (counters, (way, turn)) in counters.iter_mut().zip(turns) {
            *counters = (counters.ln() + 2.0 * far * way + far * far * turn).exp().clamp(LEAST, MOST);
        }
        counters = likelier(sights, &all, &counters);
    }
    counters
}

/// A class has no fewer counters than this, which is none, and no more than this.
const LEAST: f64 = 1e-300;
const MOST: f64 = 1e30;

/// One step: each class has more or fewer counters by what was seen of it, beside what was to be expected.
fn likelier(sights: &[Sight], all: &[f64], counters: &[f64]) -> Vec<f64> {
    let mut factors = vec![0.0; counters.len()];
    for sight in sights.iter().filter(|sight| sight.seen > 0.0) {
        let expected: f64 = sight.chances.iter().zip(counters).map(|(chance, counters)| chance * counters).sum();
        if expected > 0.0 {
            let by = sight.seen / expected;
            factors.iter_mut().zip(&sight.chances).for_each(|(factor, chance)| *factor += chance * by);
        }
    }
    let next = |((counters, factor), all): ((&f64, f64), &f64)| counters * factor / all.max(f64::MIN_POSITIVE);
    counters.iter().zip(factors).zip(all).map(next).map(|counters| counters.clamp(LEAST, MOST)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// How likely which counter is.
    #[derive(Debug, Clone, Copy)]
    enum Shape {
        Alike(u64),
        /// Four of five are about one of ten, and every fifth is about a new one.
        HotAndNew,
        Zipf(u64),
    }

    impl Shape {
        fn draw(self, random: &mut StdRng) -> u64 {
            match self {
                Shape::Alike(count) => random.random_range(0..count),
                Shape::HotAndNew if random.random_bool(0.8) => random.random_range(0..10),
                Shape::HotAndNew => random.random(),
                Shape::Zipf(count) => (random.random_range(0.0..1.0) * (count as f64 + 1.0).ln()).exp() as u64,
            }
        }
    }

    const SHAPES: [Shape; 7] = [
        Shape::Alike(500),
        Shape::Alike(20_000),
        Shape::Alike(100_000),
        Shape::Alike(1_000_000),
        Shape::HotAndNew,
        Shape::Zipf(100_000),
        Shape::Zipf(1_000_000),
    ];

    /// How many counters are said to become dirty by `ahead` more entries behind `entries`, and how many do, as a share of those entries.
    fn told_and_true(shape: Shape, entries: usize, sample: usize, latest: usize, ahead: usize) -> (f64, f64) {
        let mut random = StdRng::seed_from_u64(entries as u64);
        let (mut dirty, mut newest, mut before) = (HashSet::new(), HashMap::<u64, usize>::new(), 0);
        for n in 0..entries {
            let id = shape.draw(&mut random);
            if n == entries - latest {
                before = dirty.len();
            }
            dirty.insert(id);
            if n >= entries - sample {
                *newest.entry(id).or_default() += 1;
            }
        }
        let known = Known {
            occurrences: newest.into_values().collect(),
            dirty: dirty.len() as u64,
            unsettled: Some(entries as u64),
            latest: (latest > 0).then(|| (latest as u64, (dirty.len() - before) as u64)),
        };
        let was_dirty = dirty.len();
        dirty.extend((0..ahead).map(|_| shape.draw(&mut random)));
        let share = |counters: f64| counters / ahead as f64;
        (share(Spread::of(&known).becomes_dirty(ahead as f64)), share((dirty.len() - was_dirty) as f64))
    }

    /// An entry takes about half of what a counter that becomes dirty takes: that is how much a wrong share of these is worth.
    fn assert_right(of: &str, sample: usize, entries: usize, latest: usize, ahead: usize) {
        let mut wrong = Vec::new();
        for shape in SHAPES {
            let (told, real) = told_and_true(shape, entries, sample, latest, ahead);
            let room = |share: f64| 0.5 + share;
            let by = room(real) / room(told);
            eprintln!("{of}, {shape:?}: told {told:.3}, true {real:.3}, runway {by:.2}");
            if !(0.85..=1.15).contains(&by) {
                wrong.push(format!("{of}, {shape:?}: {told:.3} told, {real:.3} true"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn of_all_entries_a_third_of_the_way_tells_the_rest() {
        assert_right("all entries", 10_000, 10_000, 0, 20_000);
        assert_right("all entries, and the latest", 10_000, 10_000, 1_000, 20_000);
    }

    #[test]
    fn of_a_long_backlog_a_small_sample_and_the_index_tell_the_rest() {
        assert_right("a large sample", 10_000, 200_000, 2_000, 400_000);
        assert_right("a small sample", 500, 100_000, 5_000, 200_000);
    }

    #[test]
    fn what_is_not_known_is_not_needed() {
        assert_eq!(Spread::of(&Known::default()).becomes_dirty(1e6), 0.0);
        let known = Known { occurrences: vec![1; 100], dirty: 100, ..Known::default() };
        let ahead = Spread::of(&known).becomes_dirty(1_000.0);
        assert!((800.0..=1_000.0).contains(&ahead), "each one is new: {ahead}");
        // More are dirty than entries have made so: a sweep is behind.
        let behind = Known { occurrences: vec![5; 100], dirty: 1_000, unsettled: Some(3), latest: Some((10, 4)) };
        let ahead = Spread::of(&behind).becomes_dirty(1e6);
        assert!((80.0..=120.0).contains(&ahead), "{ahead}");
    }

    #[test]
    fn many_streams_like_one_fill_as_each_of_them_does() {
        let known = Known { occurrences: vec![1; 300], dirty: 300, unsettled: Some(300), latest: None };
        let one = Spread::of(&known);
        let (three, alone) = (one.clone().times(3.0).becomes_dirty(3_000.0), one.becomes_dirty(1_000.0));
        assert!((three - 3.0 * alone).abs() < 1e-6 * three, "{three} {alone}");
    }
}
