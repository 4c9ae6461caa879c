//! Book: the sums of all keys of a round, being added up. Pure.
//!
//! Takes what the counters held, what the rows hold, each entry with what the ledger says of it, and the dead letters; gives the sums of each key.

use std::collections::{BTreeMap, HashMap};

use super::judge::Sums;
use crate::model::entry::{Canonical, EntryId};
use crate::model::pipeline::Pipeline;
use crate::model::row;

/// When a counter was read: the stream's last id at that moment, and what it held.
pub(super) struct Counted {
    pub(super) value: Option<i128>,
    pub(super) doubt: Option<String>,
    /// Which stream's, and up to where.
    pub(super) own: usize,
    pub(super) up_to: EntryId,
}

/// A dead letter that was not applied.
pub(super) struct Letter {
    pub(super) id: EntryId,
    pub(super) digest: u64,
    pub(super) reason: String,
    pub(super) canonical: Vec<u8>,
}

/// What the snapshot says of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It is not in it.
    Missing,
    /// It is.
    Known,
    /// The ledger cannot tell.
    Doubtful,
}

/// The sums of all keys of a round, being added up.
pub(super) struct Book<'a> {
    counted: &'a BTreeMap<String, Counted>,
    /// The texts that stand for one row's key.
    spellings: HashMap<String, Vec<String>>,
    /// The row's key that a text stands for.
    canonical: HashMap<String, String>,
    sums: BTreeMap<String, Sums>,
}

impl<'a> Book<'a> {
    pub(super) fn open(counted: &'a BTreeMap<String, Counted>, ids: &[String], forms: &[Option<String>]) -> Book<'a> {
        let mut book = Book { counted, spellings: HashMap::new(), canonical: HashMap::new(), sums: BTreeMap::new() };
        for (id, form) in ids.iter().zip(forms) {
            let key = form.clone().unwrap_or_else(|| id.clone());
            let sums = book.sums.entry(key.clone()).or_default();
            let told = &counted[id];
            if let Some(value) = told.value {
                *sums.valkey.get_or_insert(0) += value;
            }
            if form.is_none() {
                sums.doubt = Some("its text is no key of the table's type".into());
            }
            if let Some(doubt) = &told.doubt {
                sums.doubt = Some(doubt.clone());
            }
            book.canonical.insert(id.clone(), key.clone());
            book.spellings.entry(key).or_default().push(id.clone());
        }
        book
    }

    pub(super) fn store(&mut self, key: &str, value: Option<String>) {
        let Some(sums) = self.sums.get_mut(key) else { return };
        match value.as_deref().map(whole) {
            None => sums.stored = Some(0),
            Some(Some(value)) => sums.stored = Some(value),
            Some(None) => sums.doubt = Some("the row's value is no whole number".into()),
        }
    }

    /// Whether a counter had an entry of a stream when it was read.
    fn had(&self, id: &str, stream: usize, entry: EntryId) -> bool {
        match self.counted.get(id) {
            // The entries of another stream than its own were there before: a stream that the pipeline has no longer.
            Some(told) => told.own != stream || entry <= told.up_to,
            None => true,
        }
    }

    pub(super) fn entry(
        &mut self,
        stream: usize,
        id: EntryId,
        canonical: Canonical<'_>,
        state: State,
        is_letter: bool,
        pipeline: &Pipeline,
    ) {
        let (key, amount) = match row::decode(canonical, pipeline) {
            Ok(delta) => (delta.key, Some(delta.amount)),
            Err(_) => match key_of(canonical, pipeline) {
                Some(key) => (key, None),
                None => return,
            },
        };
        let had = self.had(key, stream, id);
        let Some(sums) = self.canonical.get(key).and_then(|key| self.sums.get_mut(key)) else { return };
        match (state, amount, had) {
            // Letters are added up by themselves.
            (State::Known, ..) if is_letter => {}
            (State::Doubtful, ..) => {
                sums.doubt = Some(format!("the ledger no longer tells whether entry {id} was flushed"));
            }
            (State::Missing, Some(amount), true) => sums.pending += i128::from(amount),
            (State::Known, Some(amount), false) => sums.ahead += i128::from(amount),
            (State::Missing, None, true) => sums.doubt = Some(format!("the amount of entry {id} cannot be read")),
            (State::Missing, _, false) | (State::Known, _, true) | (State::Known, None, false) => {}
        }
    }

    pub(super) fn letter(&mut self, stream: usize, letter: &Letter, pipeline: &Pipeline) {
        let canonical = Canonical(&letter.canonical);
        let Some(key) = key_of(canonical, pipeline) else { return };
        if !self.had(key, stream, letter.id) {
            return;
        }
        let Some(sums) = self.canonical.get(key).and_then(|key| self.sums.get_mut(key)) else { return };
        match row::decode(canonical, pipeline) {
            _ if letter.reason == "cannot_be_judged" => {
                sums.doubt = Some(format!("whether the dead letter {} was applied cannot be known", letter.id));
            }
            Ok(delta) => sums.letters += i128::from(delta.amount),
            Err(_) => sums.doubt = Some(format!("the amount of the dead letter {} cannot be read", letter.id)),
        }
    }

    pub(super) fn close(self) -> BTreeMap<String, Sums> {
        // By the text that was asked for; several of one row are one.
        let Book { spellings, mut sums, .. } = self;
        spellings
            .into_iter()
            .filter_map(|(key, mut ids)| {
                ids.sort_unstable();
                let name = if ids.contains(&key) { key.clone() } else { ids.swap_remove(0) };
                Some((name, sums.remove(&key)?))
            })
            .collect()
    }
}

/// A number without a fraction, as PostgreSQL writes it.
fn whole(text: &str) -> Option<i128> {
    let (number, fraction) = text.split_once('.').unwrap_or((text, ""));
    fraction.bytes().all(|digit| digit == b'0').then(|| number.parse().ok())?
}

/// The key of an entry whose amount may be anything.
fn key_of<'a>(canonical: Canonical<'a>, pipeline: &Pipeline) -> Option<&'a str> {
    let mut keys = canonical.fields().filter(|(name, _)| *name == pipeline.key_field.as_bytes());
    let (_, key) = keys.next()?;
    std::str::from_utf8(key).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_of_any_type_are_read() {
        assert_eq!((whole("12"), whole("-3.00"), whole("1.5"), whole("NaN")), (Some(12), Some(-3), None, None));
    }
}
