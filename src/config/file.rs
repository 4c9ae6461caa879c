//! The TOML file: a strict pass that knows the line of everything it meets.
//!
//! Takes a path and a [`Reader`]; gives the reader each key with its text, and each problem with its place. A value whose
//! type is not the one that its key wants is a problem, never converted.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::guess::{did_you_mean, nearest};
use super::key::{find, section_names};
use super::kind::{Kind, is_name};
use super::layers::{Reader, bad_pipeline, unknown_key};
use super::problem::{Problem, ProblemKind};

/// The longest configuration file, and the longest file with a url in it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What else `doctor.accept` may be taken for.
const NOT_AN_ACCEPTANCE: &str =
    "doctor.accept is a list of sections; write [[doctor.accept]] and the keys finding, until and reason below it";

/// Why there is no text of a file.
pub(super) struct NotRead {
    pub(super) kind: ProblemKind,
    pub(super) why: String,
}

/// Reads a small text file whole.
pub(super) fn read_file(path: &Path) -> Result<String, NotRead> {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        let length = File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
        if length as u64 > MAX_FILE_BYTES {
            let why = format!("it is larger than {MAX_FILE_BYTES} bytes");
            return Err(io::Error::new(ErrorKind::FileTooLarge, why));
        }
        Ok(text)
    };
    read().map_err(|error| {
        let (kind, why) = match error.kind() {
            // It was read, and is no text of ours.
            ErrorKind::FileTooLarge => (ProblemKind::Invalid, error.to_string()),
            ErrorKind::InvalidData => (ProblemKind::Invalid, "it is not UTF-8 text".into()),
            _ => (ProblemKind::Unreadable, error.to_string()),
        };
        NotRead { kind, why }
    })
}

/// Reads the whole configuration file. False if it could not be read to its end.
pub(super) fn read(path: &Path, reader: &mut Reader) -> bool {
    let place = path.display().to_string();
    let text = match read_file(path) {
        Ok(text) => text,
        Err(NotRead { kind, why }) => {
            let sentence = format!("cannot be read ({why}); name a readable TOML file or none");
            reader.report(Problem::new(kind, place, sentence));
            return false;
        }
    };
    let lines = Lines { path: place, text: &text };
    let (table, mut errors) = DeTable::parse_recoverable(&text);
    errors.sort_by_key(|error| error.span().map_or(0, |span| span.start));
    if errors.is_empty() {
        let mut pass = Pass { lines, reader };
        for (section, value) in in_order(table.get_ref()) {
            pass.section(section, value);
        }
        return true;
    }
    // One mistake can cause several errors: one a line is enough.
    let mut reported = BTreeSet::new();
    for error in errors {
        let place = lines.place(error.span().map_or(0, |span| span.start));
        if reported.insert(place.clone()) {
            // Not its `Display`: that quotes the line, which may contain a secret.
            let reason = error.message().trim().replace('\n', ", ");
            let next = "correct it to see the other errors of this file";
            reader.report(Problem::invalid(place, format!("is not TOML ({reason}); {next}")));
        }
    }
    false
}

/// The pass over a file that is TOML.
struct Pass<'a> {
    lines: Lines<'a>,
    reader: &'a mut Reader,
}

impl Pass<'_> {
    fn section(&mut self, section: &Spanned<Cow<'_, str>>, value: &Spanned<DeValue<'_>>) {
        let place = self.lines.place(section.span().start);
        let name = section.get_ref().as_ref();
        let known = section_names();
        match value.get_ref() {
            DeValue::Table(table) if name == "pipelines" => {
                for (pipeline, value) in in_order(table) {
                    self.pipeline(pipeline, value);
                }
            }
            DeValue::Table(table) if name == "doctor" => {
                for (key, value) in in_order(table) {
                    self.doctor(key, value);
                }
            }
            DeValue::Table(table) if known.contains(&name) => self.keys(name, table),
            _ if known.contains(&name) => {
                self.invalid(&place, format!("{name} is a section; write [{name}] and its keys below it"));
            }
            DeValue::Table(_) => {
                let hint = nearest(name, known.iter().map(|known| (*known).to_owned()));
                let next = match hint {
                    Some(meant) => format!("did you mean [{meant}]?"),
                    None => format!("the sections are {}", known.join(", ")),
                };
                self.invalid(&place, format!("unknown section [{name}]; {next}"));
            }
            _ => self.invalid(&place, unknown_key(name, did_you_mean(name))),
        }
    }

    fn pipeline(&mut self, name: &Spanned<Cow<'_, str>>, value: &Spanned<DeValue<'_>>) {
        let place = self.lines.place(name.span().start);
        let name = name.get_ref().as_ref();
        match value.get_ref() {
            _ if !is_name(name) => self.invalid(&place, bad_pipeline(name)),
            DeValue::Table(table) => {
                self.reader.name_pipeline(name, &place);
                self.keys(&format!("pipelines.{name}"), table);
            }
            _ => {
                let next = format!("write [pipelines.{name}] and its keys below it");
                self.invalid(&place, format!("pipelines.{name} is a section; {next}"));
            }
        }
    }

    fn doctor(&mut self, key: &Spanned<Cow<'_, str>>, value: &Spanned<DeValue<'_>>) {
        let place = self.lines.place(key.span().start);
        match value.get_ref() {
            DeValue::Array(acceptances) if key.get_ref() == "accept" => {
                for (n, acceptance) in acceptances.iter().enumerate() {
                    let (number, place) = ((n + 1).to_string(), self.lines.place(acceptance.span().start));
                    let DeValue::Table(table) = acceptance.get_ref() else {
                        self.invalid(&place, NOT_AN_ACCEPTANCE.into());
                        continue;
                    };
                    self.reader.number_acceptance(&number, &place);
                    self.keys(&format!("doctor.accept.{number}"), table);
                }
            }
            _ if key.get_ref() == "accept" => self.invalid(&place, NOT_AN_ACCEPTANCE.into()),
            _ => {
                let path = format!("doctor.{}", key.get_ref());
                self.invalid(&place, unknown_key(&path, did_you_mean(&path)));
            }
        }
    }

    fn keys(&mut self, section: &str, table: &DeTable<'_>) {
        for (leaf, value) in in_order(table) {
            let place = self.lines.place(leaf.span().start);
            let path = format!("{section}.{}", leaf.get_ref());
            match find(&path) {
                Some(key) => self.reader.value(key, &path, &place, text_of(&key.kind, value.get_ref())),
                None => self.invalid(&place, unknown_key(&path, did_you_mean(&path))),
            }
        }
    }

    fn invalid(&mut self, place: &str, sentence: String) {
        self.reader.report(Problem::invalid(place, sentence));
    }
}

/// Turns byte offsets into `path:line`.
struct Lines<'a> {
    path: String,
    text: &'a str,
}

impl Lines<'_> {
    fn place(&self, offset: usize) -> String {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        format!("{}:{}", self.path, 1 + before.iter().filter(|byte| **byte == b'\n').count())
    }
}

type Entry<'a, 'i> = (&'a Spanned<Cow<'i, str>>, &'a Spanned<DeValue<'i>>);

/// The entries of a table in the order in which they were written.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Entry<'a, 'i>> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// The text of a TOML value, if it has the type that this kind wants. No type is ever converted to another.
fn text_of(kind: &Kind, value: &DeValue<'_>) -> Result<String, String> {
    let advice = kind.advice();
    match (value, kind) {
        (DeValue::String(_), Kind::Count(..) | Kind::Switch) => Err(format!("is text; {advice}, without quotes")),
        (DeValue::String(text), Kind::Bytes(_)) if text.parse::<f64>().is_ok() => {
            Err(format!("is text without a unit; {advice}"))
        }
        (DeValue::String(text), _) => Ok(text.clone().into_owned()),
        (DeValue::Integer(integer), Kind::Count(..) | Kind::Bytes(_) | Kind::Time(_)) => {
            let whole = i128::from_str_radix(integer.as_str(), integer.radix());
            Ok(whole.map_or_else(|_| integer.to_string(), |whole| whole.to_string()))
        }
        (DeValue::Float(float), Kind::Time(_)) => Ok(float.as_str().into()),
        (DeValue::Float(_), Kind::Count(..) | Kind::Bytes(_)) => Err(format!("is a fraction; {advice}")),
        (DeValue::Integer(_) | DeValue::Float(_), _) => Err(format!("is a number; {advice}, in quotes")),
        (DeValue::Boolean(switch), Kind::Switch) => Ok(switch.to_string()),
        (DeValue::Boolean(_), _) => Err(format!("is true or false; {advice}")),
        (DeValue::Datetime(moment), Kind::Until) => Ok(moment.to_string()),
        (DeValue::Datetime(_), _) => Err(format!("is a date; {advice}")),
        (DeValue::Array(_), _) => Err(format!("is a list; {advice}")),
        (DeValue::Table(_), _) => Err(format!("is a section; {advice}")),
    }
}
