//! Stream: a pipeline proposed from a sample of a stream's entries. Pure.
//!
//! Takes a [`Sample`]; gives a draft with the table that it needs. Fails where no field could be a key. Names of fields become columns only as plain SQL names:
//! others are renamed, and that is told.

use super::draft::Draft;
use super::sample::{Sample, Seen};
use super::table::VERSION;
use crate::client::{MARK_FIELD, OP_FIELD, TRACEPARENT_FIELD};
use crate::merge::Merge;
use crate::model::pipeline::{Identifier, Table};
use crate::model::target::{Field, KeyColumn, Kind, Part, ValueColumn, is_field_name};
use crate::ops::columns::{count, cut, printable_bytes};
use crate::target::definition::create_table;

/// A wider row than this nobody wants; the rest is told.
const MOST_COLUMNS: usize = 40;
/// How many characters of a field's name a remark shows.
const SHOWN: usize = 60;
/// Numbers with these names are no amounts: their sum means nothing.
const CODES: [&str; 10] = ["status", "code", "version", "port", "level", "type", "kind", "year", "zip", "line"];

/// A field that may become a column.
struct Candidate<'a> {
    name: &'a str,
    column: Identifier,
    seen: &'a Seen,
    kind: Kind,
}

/// A pipeline for this stream. The error says what to do.
pub(super) fn draft(name: &str, stream: &str, table: &Table, sample: &Sample) -> Result<Draft, String> {
    let made_from = format!(
        "Made from {} entries of the stream: read it and correct it, for a sample does not tell what is meant.",
        count(sample.entries as u64)
    );
    let mut draft = Draft::of(name, stream, table, made_from);
    if sample.is_cut {
        draft.notes.push("There are more different fields than are told apart: some are missing here.".into());
    }
    let mut columns = Columns::default();
    let candidates = candidates(sample, &mut columns, &mut draft);
    let keys = keys(&candidates, sample.entries);
    if keys.is_empty() {
        return Err("no field is in every entry, so none can be a key: write the section by hand, or sample a stream whose entries are alike (--count)".into());
    }
    for candidate in keys.iter().map(|key| &candidates[*key]) {
        let Candidate { name, column, seen, kind } = candidate;
        draft.of_keys.push(format!("{column}: {} different values.", count(seen.values() as u64)));
        let kind = if let Kind::Jsonb = kind { Kind::Text } else { *kind };
        draft.keys.push(KeyColumn { column: column.clone(), part: Part::Field((*name).to_owned(), kind) });
    }
    let moment =
        candidates.iter().find(|candidate| candidate.kind == Kind::Timestamptz && is_always(candidate, sample.entries));
    let day = columns.unused("day");
    draft.of_keys.push(format!(
        "For a row a day add {day} = day({}, UTC) to keys and to the table's primary key; minute, hour, week and month go, too.",
        moment.map_or("", |candidate| candidate.name)
    ));
    let entries = columns.take("entries");
    draft.values.push(ValueColumn { column: entries, merge: Merge::Count, field: None, by: None });
    for (n, candidate) in candidates.iter().enumerate() {
        if !keys.contains(&n) {
            value(&mut draft, candidate, sample.entries, &mut columns);
        }
    }
    draft.updated_at = Some(columns.take("updated_at"));
    draft.migration.push(create_table(&draft.target()));
    Ok(draft)
}

/// Names of columns that are taken.
#[derive(Default)]
struct Columns(Vec<String>);

impl Columns {
    /// A name like this one that nobody has, and nobody gets any more.
    fn take(&mut self, wanted: &str) -> Identifier {
        let name = self.unused(wanted);
        self.0.push(name.as_str().to_owned());
        name
    }

    /// A name like this one that nobody has.
    fn unused(&self, wanted: &str) -> Identifier {
        let plain: String =
            wanted.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
        let starts_well = plain.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        let plain = if starts_well { plain } else { format!("f_{plain}") };
        let numbered = |n: usize| if n == 1 { String::new() } else { format!("_{n}") };
        // With a number of up to four digits, and with a version's ending, it is still short enough for PostgreSQL.
        let stem = &plain[..plain.len().min(50)];
        let names = (1..10_000).map(|n| format!("{stem}{}", numbered(n)));
        let free = names.filter(|name| !self.0.contains(name)).find_map(|name| Identifier::parse(&name).ok());
        free.unwrap_or_else(|| unreachable!("there are fewer columns than numbers"))
    }
}

/// The fields that may become columns, in the order in which they were met.
fn candidates<'a>(sample: &'a Sample, columns: &mut Columns, draft: &mut Draft) -> Vec<Candidate<'a>> {
    let mut fields: Vec<(&Vec<u8>, &Seen)> = sample.fields.iter().collect();
    fields.sort_by_key(|(_, seen)| seen.order);
    let mut candidates = Vec::new();
    for (bytes, seen) in fields {
        let shown = cut(&printable_bytes(bytes), SHOWN);
        let name = std::str::from_utf8(bytes).ok().filter(|name| is_field_name(name));
        let Some(name) = name else {
            draft.notes.push(format!("The field {shown:?} is left out: a pipeline cannot name it. Give it a name without blanks, ( ) , ? = or : in the producer."));
            continue;
        };
        if [OP_FIELD, TRACEPARENT_FIELD].contains(&name) || name == MARK_FIELD && seen.kind() == Kind::Bigint {
            draft
                .notes
                .push(format!("The field {shown:?} is left out: producers of Tidegate fill it for its own purposes."));
            continue;
        }
        if seen.is_twice {
            draft.notes.push(format!(
                "The field {shown:?} is left out: an entry has it twice, and would become a dead letter."
            ));
            continue;
        }
        if candidates.len() == MOST_COLUMNS {
            draft
                .notes
                .push(format!("The field {shown:?} is left out: {MOST_COLUMNS} columns are proposed at the most."));
            continue;
        }
        let column = columns.take(name);
        if column.as_str() != name {
            draft.notes.push(format!("The field {shown:?} becomes the column {column}."));
        }
        candidates.push(Candidate { name, column, seen, kind: seen.kind() });
    }
    candidates
}

fn is_always(candidate: &Candidate<'_>, entries: usize) -> bool {
    candidate.seen.entries == entries
}

/// Which of them are keys: those that are named so or are uuids, if values come again; else the field that has the fewest different values, and more than one.
fn keys(candidates: &[Candidate<'_>], entries: usize) -> Vec<usize> {
    let all = || candidates.iter().enumerate().filter(|(_, candidate)| is_always(candidate, entries));
    let is_measured =
        |kind: Kind| matches!(kind, Kind::Numeric(_) | Kind::Timestamptz | Kind::Jsonb | Kind::Boolean | Kind::Bytea);
    let comes_again = |seen: &Seen| entries < 10 || seen.values() < entries;
    let named: Vec<usize> = all()
        .filter(|(_, candidate)| {
            (is_id(candidate.name) || candidate.kind == Kind::Uuid) && !is_measured(candidate.kind)
        })
        .filter(|(_, candidate)| comes_again(candidate.seen))
        .map(|(n, _)| n)
        .collect();
    if !named.is_empty() {
        return named;
    }
    let best = |is_fit: &dyn Fn(&Candidate<'_>) -> bool| {
        all()
            .filter(|(_, candidate)| is_fit(candidate))
            .min_by_key(|(_, candidate)| candidate.seen.values())
            .map(|(n, _)| n)
    };
    let is_word = |kind: Kind| matches!(kind, Kind::Text | Kind::Uuid | Kind::Inet | Kind::Date);
    best(&|candidate| is_word(candidate.kind) && candidate.seen.values() > 1)
        .or_else(|| best(&|candidate| is_word(candidate.kind)))
        .or_else(|| all().find(|(_, candidate)| candidate.kind == Kind::Bigint).map(|(n, _)| n))
        .or_else(|| all().next().map(|(n, _)| n))
        .into_iter()
        .collect()
}

fn is_id(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["id", "key", "tenant", "user", "account", "customer"].contains(&name.as_str())
        || ["_id", "-id", ".id", "_key", "_uuid"].iter().any(|end| name.ends_with(end))
}

/// Adds a field's value.
fn value(draft: &mut Draft, candidate: &Candidate<'_>, entries: usize, columns: &mut Columns) {
    let Candidate { name, column, seen, kind } = candidate;
    let is_code = is_id(name) || CODES.contains(&name.to_ascii_lowercase().as_str());
    let merge = match kind {
        Kind::Bigint if is_code => Merge::Last,
        Kind::Bigint | Kind::Numeric(_) => Merge::Sum,
        Kind::Date | Kind::Timestamptz => Merge::Max,
        Kind::Boolean => Merge::Or,
        Kind::Jsonb => Merge::JsonbMerge,
        Kind::Text | Kind::Uuid | Kind::Inet | Kind::Bytea => Merge::Last,
    };
    let by = merge.needs_version().map(|_| columns.take(&format!("{column}{VERSION}")));
    let is_optional = !is_always(candidate, entries);
    let mut remark = match merge {
        Merge::Sum => {
            format!("{column}: sum adds; write min, max or last(…) by a version, or make it a key, if it is no amount.")
        }
        Merge::Max => format!("{column}: max keeps the latest; min keeps the first."),
        Merge::Or => format!("{column}: or says whether one entry was true; and says whether all were."),
        Merge::JsonbMerge => format!(
            "{column}: each key of the object has the value of the newest entry that named it; last keeps the newest object whole."
        ),
        _ => format!(
            "{column}: last keeps the value of the newest entry; first keeps the oldest. distinct({name}: {kind}) in a bytea counts different ones. {} \
             different values.",
            count(seen.values() as u64)
        ),
    };
    if is_optional {
        remark.push_str(&format!(
            " {} of {} entries lack it.",
            count((entries - seen.entries) as u64),
            count(entries as u64)
        ));
    }
    draft.of_values.push(remark);
    let field = Field { name: (*name).to_owned(), kind: *kind, is_optional };
    draft.values.push(ValueColumn { column: column.clone(), merge, field: Some(field), by });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::target::{parse_keys, parse_values};
    use proptest::prelude::*;

    fn drafted(entries: &[&[(&str, &str)]]) -> Result<Draft, String> {
        let mut sample = Sample::default();
        for entry in entries {
            sample.add(entry.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        }
        draft("usage", "usage", &Table::parse("usage").expect("valid"), &sample)
    }

    fn shown(draft: &Draft) -> (String, String) {
        let list = |items: Vec<String>| items.join(", ");
        (
            list(draft.keys.iter().map(ToString::to_string).collect()),
            list(draft.values.iter().map(ToString::to_string).collect()),
        )
    }

    #[test]
    fn ids_are_keys_and_the_rest_is_merged_by_what_it_holds() {
        let draft = drafted(&[
            &[
                ("tenant_id", "a"),
                ("bytes", "5"),
                ("at", "2026-11-27T08:00:00Z"),
                ("User-Agent", "x"),
                ("status", "200"),
                ("op", "1"),
            ],
            &[
                ("tenant_id", "a"),
                ("bytes", "7"),
                ("at", "2026-11-27T08:00:01Z"),
                ("User-Agent", "y"),
                ("status", "404"),
                ("ok", "true"),
            ],
        ])
        .expect("a draft");
        let (keys, values) = shown(&draft);
        assert_eq!(keys, "tenant_id = tenant_id: text");
        assert_eq!(
            values,
            "entries = count(), bytes = sum(bytes: bigint), at = max(at: timestamptz), user_agent = last(User-Agent: text) by user_agent_version, \
             status = last(status: bigint) by status_version, ok = or(ok?: boolean)"
        );
        assert!(
            draft.notes.iter().any(|note| note.contains("\"User-Agent\" becomes the column user_agent")),
            "{:?}",
            draft.notes
        );
        assert!(
            draft.migration[0].contains("primary key (tenant_id)")
                && draft.migration[0].contains("status_version numeric")
        );
    }

    #[test]
    fn names_that_no_pipeline_can_have_are_left_out_and_told() {
        let draft =
            drafted(&[&[("a b", "1"), ("x", "y"), ("1st", "2"), ("1ST", "3"), ("x(y)", "z")]]).expect("a draft");
        let (keys, values) = shown(&draft);
        assert_eq!(
            (keys.as_str(), values.contains("f_1st = sum(1st: bigint), f_1st_2 = sum(1ST: bigint)")),
            ("x = x: text", true),
            "{values}"
        );
        assert_eq!(draft.notes.iter().filter(|note| note.contains("cannot name it")).count(), 2);
    }

    #[test]
    fn entries_that_share_no_field_have_no_key() {
        assert!(drafted(&[&[("a", "1")], &[("b", "1")]]).is_err_and(|why| why.contains("none can be a key")));
    }

    proptest! {
        #[test]
        fn every_draft_is_a_target_that_does_not_contradict_itself(
            entries in prop::collection::vec(prop::collection::btree_map("[a-zA-Z0-9_. -]{1,5}|id|entries|a_version|updated_at|é", "[0-9a-f.:{}-]{0,6}|true", 1..6), 1..5)
        ) {
            let entries: Vec<Vec<(&str, &str)>> =
                entries.iter().map(|entry| entry.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()).collect();
            let entries: Vec<&[(&str, &str)]> = entries.iter().map(Vec::as_slice).collect();
            if let Ok(draft) = drafted(&entries) {
                let (keys, values) = shown(&draft);
                prop_assert_eq!(parse_keys(&keys), Ok(draft.keys.clone()));
                prop_assert_eq!(parse_values(&values), Ok(draft.values.clone()));
                prop_assert_eq!(draft.target().contradiction(), None);
            }
        }
    }
}
