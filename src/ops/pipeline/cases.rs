//! Cases: tests of pipelines, as files have them.
//!
//! Takes a TOML file; gives its [`Case`]s, each part with its line. Fails with every problem that can be found, each with its place and what to write.

use std::borrow::Cow;
use std::collections::BTreeSet;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::model::entry::EntryId;

/// The longest file.
pub(super) const MAX_FILE_BYTES: u64 = 16 << 20;

/// A test.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) name: String,
    /// `path:line`.
    pub(super) place: String,
    /// The pipeline, where it is named.
    pub(super) pipeline: Option<String>,
    pub(super) entries: Vec<CaseEntry>,
    pub(super) rows: Vec<CaseRow>,
    pub(super) dead: Vec<CaseDead>,
}

/// An entry of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CaseEntry {
    pub(super) id: EntryId,
    /// Name, value, name, value.
    pub(super) strings: Vec<Vec<u8>>,
}

/// A row that is expected.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CaseRow {
    pub(super) place: String,
    /// The table, where it is named.
    pub(super) table: Option<String>,
    /// Columns and what they hold; none is null.
    pub(super) columns: Vec<(String, Option<Vec<u8>>)>,
}

/// An entry that is expected to be buried.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CaseDead {
    pub(super) place: String,
    /// Its number among the test's entries, from 1 on.
    pub(super) entry: usize,
    pub(super) reason: String,
}

/// Reads all tests of a file. `path` names it in places.
pub(super) fn read(path: &str, text: &str) -> Result<Vec<Case>, Vec<String>> {
    let mut reader = Reader { path, text, problems: Vec::new() };
    let (table, mut errors) = DeTable::parse_recoverable(text);
    errors.sort_by_key(|error| error.span().map_or(0, |span| span.start));
    let mut reported = BTreeSet::new();
    for error in errors {
        // One mistake can cause several errors: one a line is enough.
        let place = reader.place(error.span().map_or(0, |span| span.start));
        if reported.insert(place.clone()) {
            let reason = error.message().trim().replace('\n', ", ");
            reader.problems.push(format!("{place}: is not TOML ({reason})"));
        }
    }
    if !reader.problems.is_empty() {
        return Err(reader.problems);
    }
    let cases = reader.cases(table.get_ref());
    if cases.is_empty() && reader.problems.is_empty() {
        reader
            .problems
            .push(format!("{path}: has no test; write [[test]] and, below it, [[test.entry]] and [[test.row]]"));
    }
    if reader.problems.is_empty() { Ok(cases) } else { Err(reader.problems) }
}

/// The pass over a file that is TOML.
struct Reader<'a> {
    path: &'a str,
    text: &'a str,
    problems: Vec<String>,
}

type Item<'a, 'i> = (&'a str, usize, &'a Spanned<DeValue<'i>>);

/// The entries of a table in the order in which they were written.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Item<'a, 'i>> {
    let mut items: Vec<Item<'a, 'i>> = table
        .iter()
        .map(|(key, value): (&Spanned<Cow<'_, str>>, _)| (key.get_ref().as_ref(), key.span().start, value))
        .collect();
    items.sort_by_key(|(_, start, _)| *start);
    items
}

impl Reader<'_> {
    fn place(&self, offset: usize) -> String {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        format!("{}:{}", self.path, 1 + before.iter().filter(|byte| **byte == b'\n').count())
    }

    fn report(&mut self, at: usize, sentence: impl AsRef<str>) {
        let place = self.place(at);
        self.problems.push(format!("{place}: {}", sentence.as_ref()));
    }

    fn cases(&mut self, root: &DeTable<'_>) -> Vec<Case> {
        let mut cases = Vec::new();
        for (name, at, value) in in_order(root) {
            match (name, value.get_ref()) {
                ("test", DeValue::Array(tests)) => {
                    for test in tests.iter() {
                        match test.get_ref() {
                            DeValue::Table(test_table) => {
                                let case = self.case(test_table, test.span().start);
                                cases.push(case);
                            }
                            _ => self.report(test.span().start, "a test is a section; write [[test]]"),
                        }
                    }
                }
                ("test", _) => self.report(at, "test is a list; write [[test]] for each"),
                _ => self.report(at, format!("unknown key {name:?}; write [[test]]")),
            }
        }
        let mut names = BTreeSet::new();
        for case in &cases {
            if !names.insert(case.name.clone()) {
                self.problems
                    .push(format!("{}: the name {:?} is used twice; give each test its own", case.place, case.name));
            }
        }
        cases
    }

    fn case(&mut self, table: &DeTable<'_>, at: usize) -> Case {
        let mut case = Case { place: self.place(at), ..Case::default() };
        let mut dead_at = Vec::new();
        for (key, at, value) in in_order(table) {
            match key {
                "name" => case.name = self.text_of(at, key, value).unwrap_or_default(),
                "pipeline" => case.pipeline = self.text_of(at, key, value),
                "entry" => {
                    for (at, table) in self.sections(at, key, value) {
                        let id = EntryId { ms: case.entries.len() as u64 + 1, seq: 0 };
                        let entry = self.entry(at, table, id);
                        case.entries.extend(entry);
                    }
                }
                "row" => {
                    for (at, table) in self.sections(at, key, value) {
                        let row = self.row(at, table);
                        case.rows.extend(row);
                    }
                }
                "dead" => {
                    for (at, table) in self.sections(at, key, value) {
                        dead_at.push(at);
                        let dead = self.dead(at, table);
                        case.dead.extend(dead);
                    }
                }
                _ => self.report(
                    at,
                    format!("unknown key {key:?} of a test; the keys are name, pipeline, entry, row, dead"),
                ),
            }
        }
        if case.name.trim().is_empty() {
            self.report(at, "the test has no name; write name = \"what is tested\"");
        }
        if case.entries.is_empty() {
            self.report(at, "the test has no entry; write [[test.entry]] and fields = { name = \"value\" }");
        }
        for (dead, at) in case.dead.iter().zip(dead_at) {
            if dead.entry == 0 || dead.entry > case.entries.len() {
                let (number, entries) = (dead.entry, case.entries.len());
                self.report(
                    at,
                    format!("there is no entry {number}; the test's entries are numbered from 1 to {entries}"),
                );
            }
        }
        case
    }

    /// The sections of a list.
    fn sections<'v, 'i>(
        &mut self,
        at: usize,
        key: &str,
        value: &'v Spanned<DeValue<'i>>,
    ) -> Vec<(usize, &'v DeTable<'i>)> {
        let DeValue::Array(list) = value.get_ref() else {
            self.report(at, format!("{key} is a list; write [[test.{key}]] for each"));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in list.iter() {
            match item.get_ref() {
                DeValue::Table(table) => sections.push((item.span().start, table)),
                _ => self.report(item.span().start, format!("write [[test.{key}]] and its keys below it")),
            }
        }
        sections
    }

    fn entry(&mut self, at: usize, table: &DeTable<'_>, usual: EntryId) -> Option<CaseEntry> {
        let (mut id, mut strings) = (usual, None);
        for (key, at, value) in in_order(table) {
            match (key, value.get_ref()) {
                ("id", _) => {
                    let text = self.text_of(at, key, value)?;
                    match text.parse() {
                        Ok(parsed) => id = parsed,
                        Err(bad) => self.report(at, format!("{bad}")),
                    }
                }
                ("fields", DeValue::Table(fields)) => {
                    let mut found = Vec::new();
                    for (name, at, value) in in_order(fields) {
                        found.push(name.as_bytes().to_vec());
                        found.push(self.bytes_of(at, name, value)?.unwrap_or_default());
                    }
                    strings = Some(found);
                }
                ("fields", DeValue::Array(pairs)) => strings = self.pairs(at, pairs),
                ("fields", _) => self.report(at, "fields is a section; write fields = { name = \"value\" }"),
                _ => self.report(at, format!("unknown key {key:?} of an entry; its keys are id and fields")),
            }
        }
        if strings.is_none() {
            self.report(at, "the entry has no fields; write fields = { name = \"value\" }");
        }
        Some(CaseEntry { id, strings: strings? })
    }

    /// Fields as a list of pairs, for an entry that has one twice.
    fn pairs(&mut self, at: usize, pairs: &DeArray<'_>) -> Option<Vec<Vec<u8>>> {
        let mut found = Vec::new();
        for pair in pairs.iter() {
            let two = match pair.get_ref() {
                DeValue::Array(two) if two.len() == 2 => two,
                _ => {
                    self.report(at, "a list of fields has pairs; write fields = [[\"name\", \"value\"]]");
                    return None;
                }
            };
            for part in two.iter() {
                found.push(self.bytes_of(part.span().start, "field", part)?.unwrap_or_default());
            }
        }
        Some(found)
    }

    fn row(&mut self, at: usize, table: &DeTable<'_>) -> Option<CaseRow> {
        let (mut name, mut columns) = (None, None);
        for (key, at, value) in in_order(table) {
            match (key, value.get_ref()) {
                ("table", _) => name = self.text_of(at, key, value),
                ("columns", DeValue::Table(held)) => {
                    let mut found = Vec::new();
                    for (column, at, value) in in_order(held) {
                        found.push((column.to_owned(), self.bytes_of(at, column, value)?));
                    }
                    columns = Some(found);
                }
                ("columns", _) => self.report(at, "columns is a section; write columns = { name = \"value\" }"),
                _ => self.report(at, format!("unknown key {key:?} of a row; its keys are table and columns")),
            }
        }
        if columns.is_none() {
            self.report(at, "the row has no columns; write columns = { name = \"value\" }");
        }
        Some(CaseRow { place: self.place(at), table: name, columns: columns? })
    }

    fn dead(&mut self, at: usize, table: &DeTable<'_>) -> Option<CaseDead> {
        let (mut entry, mut reason) = (None, None);
        for (key, at, value) in in_order(table) {
            match (key, value.get_ref()) {
                ("entry", DeValue::Integer(number)) => {
                    entry = usize::from_str_radix(number.as_str(), number.radix()).ok();
                    if entry.is_none() {
                        self.report(at, "entry is no number of an entry; they are numbered from 1");
                        return None;
                    }
                }
                ("entry", _) => {
                    self.report(at, "entry is the number of an entry, without quotes; they are numbered from 1")
                }
                ("reason", _) => reason = self.text_of(at, key, value),
                _ => self.report(at, format!("unknown key {key:?} of a dead entry; its keys are entry and reason")),
            }
        }
        if entry.is_none() || reason.is_none() {
            self.report(at, "a dead entry has entry = its number and reason = \"bad_field\" or another one; see `tidegate explain bad_field`");
        }
        Some(CaseDead { place: self.place(at), entry: entry?, reason: reason? })
    }

    fn text_of(&mut self, at: usize, key: &str, value: &Spanned<DeValue<'_>>) -> Option<String> {
        match value.get_ref() {
            DeValue::String(text) => Some(text.clone().into_owned()),
            _ => {
                self.report(at, format!("{key} is text; write it in quotes"));
                None
            }
        }
    }

    /// What a field or a column holds: a text, a number or a boolean as it is written, `{ hex = "…" }` for any bytes, `{ null = true }` for null.
    fn bytes_of(&mut self, at: usize, key: &str, value: &Spanned<DeValue<'_>>) -> Option<Option<Vec<u8>>> {
        let written = || self.text.get(value.span()).unwrap_or_default().trim().to_owned();
        match value.get_ref() {
            DeValue::String(text) => Some(Some(text.as_bytes().to_vec())),
            DeValue::Integer(integer) => {
                let whole = i128::from_str_radix(integer.as_str(), integer.radix());
                Some(Some(whole.map_or_else(|_| written(), |whole| whole.to_string()).into_bytes()))
            }
            DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => Some(Some(written().into_bytes())),
            DeValue::Table(table) => match &in_order(table)[..] {
                [("null", _, is_null)] if matches!(is_null.get_ref(), DeValue::Boolean(true)) => Some(None),
                [("hex", at, hex)] => {
                    let at = *at;
                    let text = self.text_of(at, "hex", hex)?;
                    let bytes = from_hex(&text);
                    if bytes.is_none() {
                        self.report(at, "hex has an even number of digits 0-9 and a-f");
                    }
                    bytes.map(Some)
                }
                _ => {
                    self.report(
                        at,
                        format!("{key} is a section; write a text, {{ hex = \"ff00\" }} or {{ null = true }}"),
                    );
                    None
                }
            },
            DeValue::Array(_) => {
                self.report(at, format!("{key} is a list; write a text, {{ hex = \"ff00\" }} or {{ null = true }}"));
                None
            }
        }
    }
}

/// The bytes that hexadecimal digits stand for.
pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(u8::try_from(digit(pair[0])? * 16 + digit(*pair.get(1)?)?).unwrap_or(0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_file_has_tests_with_entries_rows_and_dead() {
        let text = r#"
[[test]]
name = "two entries"
pipeline = "usage"
[[test.entry]]
id = "7-0"
fields = { tenant = "a", bytes = 5, at = 2026-11-27T08:00:00Z, ok = true, raw = { hex = "ff00" } }
[[test.entry]]
fields = [["x", "1"], ["x", "2"]]
[[test.row]]
table = "public.usage"
columns = { tenant = "a", bytes = 1_0, path = { null = true } }
[[test.dead]]
entry = 2
reason = "duplicate_field"
"#;
        let cases = read("f.toml", text).expect("a file");
        let [case] = &cases[..] else { panic!("{cases:?}") };
        assert_eq!(
            (case.name.as_str(), case.place.as_str(), case.pipeline.as_deref()),
            ("two entries", "f.toml:2", Some("usage"))
        );
        let strings =
            |n: usize| case.entries[n].strings.iter().map(|s| String::from_utf8_lossy(s)).collect::<Vec<_>>().join(" ");
        assert_eq!(strings(0), "tenant a bytes 5 at 2026-11-27T08:00:00Z ok true raw \u{fffd}\0");
        assert_eq!(
            (strings(1).as_str(), case.entries[1].id, case.entries[0].id),
            ("x 1 x 2", EntryId { ms: 2, seq: 0 }, EntryId { ms: 7, seq: 0 })
        );
        assert_eq!(case.rows[0].columns[2], ("path".into(), None));
        assert_eq!((case.dead[0].entry, case.dead[0].reason.as_str()), (2, "duplicate_field"));
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        for (text, told) in [
            ("", "f: has no test"),
            ("x = 1", "f:1: unknown key \"x\""),
            ("test = 1", "f:1: test is a list"),
            ("[[test]]\n", "f:1: the test has no name"),
            ("[[test]]\nname = \"n\"\n", "f:1: the test has no entry"),
            ("[[test]]\nname = 1\n[[test.entry]]\nfields = {}", "f:2: name is text"),
            ("[[test]]\nname = \"n\"\n[[test.entry]]\nid = \"x\"\nfields = {}", "f:4: \"x\" is no entry id"),
            ("[[test]]\nname = \"n\"\n[[test.entry]]\n", "f:3: the entry has no fields"),
            (
                "[[test]]\nname = \"n\"\n[[test.entry]]\nfield = {}\nfields = {}",
                "f:4: unknown key \"field\" of an entry",
            ),
            ("[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {a = [1]}", "f:4: a is a list"),
            ("[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {a = {hex = \"f\"}}", "f:4: hex has"),
            (
                "[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {}\n[[test.dead]]\nentry = 2\nreason = \"x\"",
                "f:5: there is no entry 2",
            ),
            ("[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {}\n[[test.dead]]\nentry = 1", "f:5: a dead entry has"),
            (
                "[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {}\n[[test.row]]\ntabel = \"x\"",
                "f:6: unknown key \"tabel\" of a row",
            ),
            (
                "[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {}\n[[test]]\nname = \"n\"\n[[test.entry]]\nfields = {}",
                "f:5: the name \"n\" is used twice",
            ),
            ("[[test]\n", "f:1: is not TOML"),
        ] {
            let problems = read("f", text).expect_err(text);
            assert!(problems.iter().any(|problem| problem.starts_with(told)), "{told}: {problems:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(\\[\\[test(\\.(entry|row|dead))?\\]\\]\n|[a-z]{1,6} = (1|\"x\"|\\{\\}|\\[\\]|\\[\\[1\\]\\]|true)\n){0,8}|.{0,60}") {
            let _ = read("f", &text);
        }
    }
}
