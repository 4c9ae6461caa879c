//! Sample: what the fields of a stream's entries hold. Pure.
//!
//! Takes entries; gives for each field how often it is there, how many different values it has, and the narrowest kind that reads all of them. It cannot fail.
//! Memory is bounded by limits on fields and on remembered values, whatever the stream holds.

use std::collections::{BTreeMap, HashSet};

use crate::model::datum;
use crate::model::target::Kind;

/// So many fields are told apart.
const MOST_FIELDS: usize = 200;
/// So many different values of a field are counted.
const MOST_VALUES: usize = 10_000;
/// Milliseconds since 1970 of the years 2001 to 2100: whole numbers that are probably moments.
const MOMENTS: std::ops::Range<i64> = 978_307_200_000..4_102_444_800_000;

/// What was seen of a stream.
#[derive(Debug, Default)]
pub(super) struct Sample {
    /// How many entries.
    pub(super) entries: usize,
    /// The fields by name.
    pub(super) fields: BTreeMap<Vec<u8>, Seen>,
    /// Whether there were more fields than are told apart.
    pub(super) is_cut: bool,
    order: usize,
}

/// What was seen of a field.
#[derive(Debug)]
pub(super) struct Seen {
    /// Its place in the order in which fields were met first.
    pub(super) order: usize,
    /// In how many entries it is.
    pub(super) entries: usize,
    /// Whether an entry has it twice.
    pub(super) is_twice: bool,
    values: HashSet<u64>,
    /// The kinds that read all values so far.
    kinds: Vec<Kind>,
    /// The most digits behind the point.
    scale: usize,
    are_moments: bool,
    last_entry: usize,
}

impl Sample {
    /// Takes an entry: name, value, name, value.
    pub(super) fn add<'a>(&mut self, fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        self.entries += 1;
        let entry = self.entries;
        for (name, value) in fields {
            if !self.fields.contains_key(name) {
                if self.fields.len() == MOST_FIELDS {
                    self.is_cut = true;
                    continue;
                }
                self.fields.insert(name.to_vec(), Seen::new(self.order));
                self.order += 1;
            }
            let Some(seen) = self.fields.get_mut(name) else { continue };
            if std::mem::replace(&mut seen.last_entry, entry) == entry {
                seen.is_twice = true;
                continue;
            }
            seen.entries += 1;
            seen.take(value);
        }
    }
}

impl Seen {
    fn new(order: usize) -> Seen {
        // The narrowest first.
        let kinds = vec![
            Kind::Boolean,
            Kind::Bigint,
            Kind::Numeric(None),
            Kind::Uuid,
            Kind::Date,
            Kind::Timestamptz,
            Kind::Inet,
            Kind::Jsonb,
            Kind::Text,
            Kind::Bytea,
        ];
        let values = HashSet::new();
        Seen { order, entries: 0, is_twice: false, values, kinds, scale: 0, are_moments: true, last_entry: 0 }
    }

    fn take(&mut self, value: &[u8]) {
        if self.values.len() < MOST_VALUES {
            self.values.insert(xxhash_rust::xxh3::xxh3_64(value));
        }
        self.kinds.retain(|kind| reads(*kind, value));
        let number = std::str::from_utf8(value).ok().and_then(|text| text.parse::<i64>().ok());
        self.are_moments &= number.is_some_and(|number| MOMENTS.contains(&number));
        if let Some(point) = value.iter().position(|byte| *byte == b'.') {
            self.scale = self.scale.max(value.len() - point - 1);
        }
    }

    /// How many different values it has, up to a limit.
    pub(super) fn values(&self) -> usize {
        self.values.len()
    }

    /// The narrowest kind that reads all its values.
    pub(super) fn kind(&self) -> Kind {
        match self.kinds.first() {
            Some(Kind::Bigint) if self.are_moments => Kind::Timestamptz,
            Some(Kind::Numeric(_)) => Kind::Numeric(u16::try_from(self.scale).ok()),
            Some(kind) => *kind,
            None => Kind::Bytea,
        }
    }
}

/// Whether a value is meant as this kind: narrower than what the kind accepts, where another reading is as likely.
fn reads(kind: Kind, value: &[u8]) -> bool {
    let Ok(read) = datum::read(kind, value) else { return false };
    let digits = value.strip_prefix(b"-").unwrap_or(value);
    match kind {
        // A number that begins with a zero is a code.
        Kind::Bigint | Kind::Numeric(_) => {
            !(digits.len() > 1 && digits[0] == b'0' && digits[1] != b'.') && digits.first() != Some(&b'.')
        }
        // 0 and 1 are numbers, and a single letter is a code.
        Kind::Boolean => value.len() > 1,
        // A whole number is one until all of them look like moments.
        Kind::Timestamptz => !digits.iter().all(u8::is_ascii_digit),
        Kind::Jsonb => {
            value.first() == Some(&b'{')
                && read
                    .text()
                    .is_some_and(|text| serde_json::from_str::<serde_json::Map<_, serde_json::Value>>(&text).is_ok())
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind_of(values: &[&[u8]]) -> Kind {
        let mut sample = Sample::default();
        for value in values {
            sample.add([(b"f".as_slice(), *value)].into_iter());
        }
        sample.fields[b"f".as_slice()].kind()
    }

    #[test]
    fn the_narrowest_kind_reads_all_values() {
        for (values, kind) in [
            (&[b"1".as_slice(), b"-7"][..], Kind::Bigint),
            (&[b"1", b"2.50"], Kind::Numeric(Some(2))),
            (&[b"007", b"1"], Kind::Text),
            (&[b"0", b"0.5"], Kind::Numeric(Some(1))),
            (&[b"1", b"0"], Kind::Bigint),
            (&[b"true", b"False"], Kind::Boolean),
            (&[b"t", b"f"], Kind::Text),
            (&[b"6ba7b810-9dad-11d1-80b4-00c04fd430c8"], Kind::Uuid),
            (&[b"2026-11-27"], Kind::Date),
            (&[b"2026-11-27T08:00:00Z", b"2026-11-27T08:00:00+01:00"], Kind::Timestamptz),
            (&[b"1764230400000", b"1764230400001"], Kind::Timestamptz),
            (&[b"1764230400000", b"7"], Kind::Bigint),
            (&[b"192.0.2.7"], Kind::Inet),
            (&[b"{\"a\":1}"], Kind::Jsonb),
            (&[b"{\"a\":1}", b"[1]"], Kind::Text),
            (&[b"99999999999999999999"], Kind::Numeric(Some(0))),
            (&[b"a", b"1"], Kind::Text),
            (&[b"a", b"\xff"], Kind::Bytea),
            (&[b""], Kind::Text),
        ] {
            assert_eq!(kind_of(values), kind, "{values:?}");
        }
    }

    #[test]
    fn fields_are_counted_and_those_that_stand_twice_are_known() {
        let mut sample = Sample::default();
        sample.add([(b"a".as_slice(), b"1".as_slice()), (b"a", b"2")].into_iter());
        sample.add([(b"b".as_slice(), b"x".as_slice()), (b"a", b"1")].into_iter());
        let seen =
            |name: &[u8]| (sample.fields[name].entries, sample.fields[name].values(), sample.fields[name].is_twice);
        assert_eq!((seen(b"a"), seen(b"b"), sample.entries), ((2, 1, true), (1, 1, false), 2));
    }

    proptest! {
        #[test]
        fn what_is_inferred_reads_every_value(values in prop::collection::vec(prop_oneof![
            "[0-9]{1,3}", "-?[0-9]{1,4}\\.[0-9]{1,3}", "true|false", "2026-1[0-2]-0[1-9]", "[a-z]{0,3}"], 1..8)) {
            let bytes: Vec<&[u8]> = values.iter().map(|value| value.as_bytes()).collect();
            let kind = kind_of(&bytes);
            for value in bytes {
                prop_assert!(datum::read(kind, value).is_ok(), "{kind}: {value:?}");
            }
        }
    }
}
