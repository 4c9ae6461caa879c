//! Jsonb merge: each key of the object has the value of the newest entry that named it. A second column, a `jsonb` too, holds for each key the id of that
//! entry, so older entries that arrive later never win.
//!
//! The id is a JSON number, ms · 2^64 + seq: the same number as the version of `last`, and as PostgreSQL's `jsonb` keeps all digits of a number it is exact.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::model::json;
use crate::retry::Fault;

/// Of each row the newest value of each key, as it was written. None where no entry brought an object.
#[derive(Debug, Default)]
pub(crate) struct Objects<'a>(Vec<Option<Newest<'a>>>);

type Newest<'a> = BTreeMap<String, (EntryId, Cow<'a, str>)>;

impl<'a> Fold<'a> for Objects<'a> {
    fn meet(&mut self, row: usize, id: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.0.len() <= row {
            self.0.resize_with(row + 1, || None);
        }
        let Some(text) = datum.and_then(Datum::text) else { return Ok(()) };
        let newest = self.0[row].get_or_insert_default();
        // What is no object was refused when it was read.
        match &text {
            Cow::Borrowed(text) => {
                json::members(text)
                    .into_iter()
                    .flatten()
                    .for_each(|(name, value)| keep(newest, id, name, value.into()));
            }
            Cow::Owned(text) => {
                let members = json::members(text).into_iter().flatten();
                members.for_each(|(name, value)| keep(newest, id, name, value.to_owned().into()));
            }
        }
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        let object = |newest: &Newest<'a>, value: fn(&(EntryId, Cow<'a, str>)) -> Cow<'a, str>| {
            let mut text = String::from("{");
            for (n, (name, member)) in newest.iter().enumerate() {
                let comma = if n > 0 { "," } else { "" };
                let _ = write!(text, "{comma}{}:{}", serde_json::Value::from(name.as_str()), value(member));
            }
            Some(Cow::Owned(text + "}"))
        };
        let rows = || order.iter().map(|row| self.0[*row].as_ref());
        packed.texts(rows().map(|newest| object(newest?, |(_, value)| value.clone())));
        packed.texts(rows().map(|newest| object(newest?, |(id, _)| id.number().to_string().into())));
    }
}

fn keep<'a>(newest: &mut Newest<'a>, id: EntryId, name: String, value: Cow<'a, str>) {
    match newest.get_mut(&name) {
        Some(held) if held.0 >= id => {}
        Some(held) => *held = (id, value),
        None => {
            newest.insert(name, (id, value));
        }
    }
}

/// Its SQL.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    let [object, versions] = sent.expressions else {
        return Terms { folded: vec![], inserted: vec![], merged: vec![] };
    };
    let (column, by) = (sent.column, sent.by.unwrap_or_default());
    Terms {
        folded: ["jsonb_newest_of", "jsonb_newest_by_of"]
            .map(|aggregate| format!("tidegate.{aggregate}({object}::jsonb, {versions}::jsonb)"))
            .into(),
        inserted: vec![(column.into(), format!("{object}::jsonb")), (by.into(), format!("{versions}::jsonb"))],
        merged: vec![
            (column.into(), format!("tidegate.jsonb_newest(t.{column}, t.{by}, excluded.{column}, excluded.{by})")),
            (by.into(), format!("tidegate.jsonb_newest_by(t.{by}, excluded.{by})")),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packed(objects: &[(u64, &str)]) -> Vec<Option<String>> {
        let (mut folded, mut packed) = (Objects::default(), Packed::default());
        for (ms, text) in objects {
            let id = EntryId { ms: *ms, seq: 0 };
            folded.meet(0, id, Some(Datum::Text(Cow::Borrowed(text)))).expect("no range to leave");
        }
        folded.pack(&[0], &mut packed);
        packed.texts.into_iter().map(|text| text.map(Cow::into_owned)).collect()
    }

    #[test]
    fn of_each_key_the_newest_value_stays_as_it_was_written() {
        let got = packed(&[(2, r#"{"a":1.10,"b":null}"#), (1, r#"{"a":2,"\u0063":"\"é"}"#)]);
        assert_eq!(got[0].as_deref(), Some(r#"{"a":1.10,"b":null,"c":"\"é"}"#));
        let one = 1u128 << 64;
        assert_eq!(got[1], Some(format!("{{\"a\":{},\"b\":{},\"c\":{one}}}", 2 * one, 2 * one)));
    }

    proptest! {
        #[test]
        fn order_does_not_matter(keys in prop::collection::vec(prop::collection::btree_set(0u8..4, 0..3), 1..8), turn in 0usize..8) {
            let texts: Vec<String> = (keys.iter().enumerate())
                .map(|(n, keys)| format!("{{{}}}", keys.iter().map(|key| format!("\"{key}\":{n}")).collect::<Vec<_>>().join(",")))
                .collect();
            let objects: Vec<(u64, &str)> = texts.iter().enumerate().map(|(n, text)| (n as u64, text.as_str())).collect();
            let mut turned = objects.clone();
            turned.rotate_left(turn % objects.len());
            prop_assert_eq!(packed(&objects), packed(&turned));
        }
    }
}
