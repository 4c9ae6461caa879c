//! `tidegate dead show`: every byte of a letter, and why it is here.

use serde::Serialize;

use super::list::shown_key;
use super::select::{Filter, Letter, Piece, Search, State};
use super::{key_fields, key_of};
use crate::config::Config;
use crate::model::entry::EntryId;
use crate::ops::columns::{Page, Tone, lasting_ms, printable};
use crate::ops::context::Report;
use crate::ops::{Context, Exit, Failure, explain};
use crate::postgres::Database;

/// How many letters are shown at once.
const SHOWN: Piece = Piece { skip: 0, limit: 100 };

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(flatten)]
    pub(super) filter: Filter,
}

/// Letters with all that is kept of them.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LetterDetails {
    /// The letters, the latest first.
    pub letters: Vec<LetterDetail>,
}

/// A letter with all that is kept of it.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LetterDetail {
    /// The entry's id, a slash, and its digest: as the other commands take it.
    pub letter: String,
    /// The entry's id in its stream.
    pub entry: String,
    /// When the entry was added, in RFC 3339, by Valkey's clock; null where its id is no time.
    pub added_at: Option<String>,
    /// The entry's digest, in hexadecimal.
    pub digest: String,
    /// The pipeline that buried it.
    pub pipeline: String,
    /// The stream it came from.
    pub stream: String,
    /// The table it was meant for.
    pub table: String,
    /// The fields that its row is known by, as the configuration names them now; empty where it names none that the letter has.
    pub key: Vec<Field>,
    /// Why, in one word.
    pub reason: String,
    /// Why, in one sentence, as it was found.
    pub detail: String,
    /// PostgreSQL's code, where it was PostgreSQL that refused.
    pub code: Option<String>,
    /// What the reason, or the code, means and what to do.
    pub meaning: Option<String>,
    /// Who buried it.
    pub consumer: String,
    /// When, in RFC 3339.
    pub buried_at: String,
    /// When it was resolved; null while it is open.
    pub resolved_at: Option<String>,
    /// How; null while it is open.
    pub resolution: Option<String>,
    /// How long the whole entry was, in bytes of its canonical form; null in letters of early versions.
    pub bytes: Option<u64>,
    /// Whether only the beginning of its fields was kept.
    pub shortened: bool,
    /// Its fields, in the order they had.
    pub fields: Vec<Field>,
    #[serde(skip)]
    age_ms: u64,
}

/// A field of an entry.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Field {
    /// Its name.
    pub name: Bytes,
    /// Its value.
    pub value: Bytes,
}

/// Bytes: as text where they are UTF-8, else in hexadecimal.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Bytes {
    /// Text.
    Text(String),
    /// What is no text, in hexadecimal.
    Hex(String),
}

impl Bytes {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Bytes {
        match std::str::from_utf8(bytes) {
            Ok(text) => Bytes::Text(text.to_owned()),
            Err(_) => Bytes::Hex(bytes.iter().map(|byte| format!("{byte:02x}")).collect()),
        }
    }

    pub(super) fn shown(&self) -> String {
        match self {
            Bytes::Text(text) => printable(text),
            Bytes::Hex(hex) => format!("0x{hex}"),
        }
    }
}

pub(super) async fn run(opts: &Opts, context: &Context, config: &Config, database: &Database) -> Result<Exit, Failure> {
    if opts.filter.is_everything() {
        return Err(Failure::usage("say which letters: an id that `tidegate dead list` shows, or a filter"));
    }
    context.print(&find(config, database, &opts.filter).await?)?;
    Ok(Exit::Ok)
}

/// The letters that match, in any state, with all that is kept of them.
pub async fn find(config: &Config, database: &Database, filter: &Filter) -> Result<LetterDetails, Failure> {
    let key_fields = key_fields(config);
    let search = Search { source: &config.valkey.source, filter, state: State::All, key_fields: &key_fields };
    let letters = database.run(async |c| search.letters(c, SHOWN).await).await?;
    if letters.is_empty() {
        return Err(Failure::new(Exit::BadInput, "there is no such letter: see `tidegate dead list --state all`"));
    }
    Ok(LetterDetails { letters: letters.iter().map(|letter| LetterDetail::of(letter, config)).collect() })
}

impl LetterDetail {
    fn of(letter: &Letter, config: &Config) -> LetterDetail {
        let code = sqlstate_in(&letter.detail);
        let meaning = code.as_deref().and_then(explain::advice).or_else(|| explain::advice(&letter.reason));
        LetterDetail {
            letter: letter.name(),
            entry: letter.id.to_string(),
            added_at: added_at(letter.id),
            digest: format!("{:016x}", letter.digest),
            pipeline: letter.pipeline.clone(),
            stream: letter.stream.clone(),
            table: letter.target.clone(),
            key: key_of(config, letter),
            reason: letter.reason.clone(),
            detail: letter.detail.clone(),
            code,
            meaning,
            consumer: letter.consumer.clone(),
            buried_at: letter.buried_at.clone(),
            resolved_at: letter.resolved_at.clone(),
            resolution: letter.resolution.clone(),
            bytes: letter.bytes,
            shortened: letter.shortened,
            fields: letter
                .fields
                .chunks(2)
                .map(|pair| Field {
                    name: Bytes::of(&pair[0]),
                    value: Bytes::of(pair.get(1).map_or(&[][..], Vec::as_slice)),
                })
                .collect(),
            age_ms: letter.buried_ms_ago,
        }
    }
}

/// The code that a sentence of PostgreSQL's ends with: `… (23514)`, perhaps with more behind it.
fn sqlstate_in(detail: &str) -> Option<String> {
    let is_code = |code: &str| code.len() == 5 && code.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
    let codes = detail.split('(').skip(1).filter_map(|rest| rest.split(')').next());
    codes.filter(|code| is_code(code)).last().map(str::to_owned)
}

/// The moment that an id stands for.
pub fn added_at(id: EntryId) -> Option<String> {
    let time = std::time::SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(id.ms))?;
    // Later than the year 9999, this form ends.
    (id.ms < 253_402_300_800_000).then(|| humantime::format_rfc3339_millis(time).to_string())
}

impl Report for LetterDetails {
    fn show(&self, page: &mut Page) {
        for (n, letter) in self.letters.iter().enumerate() {
            if n > 0 {
                page.line("");
            }
            letter.show(page);
        }
    }
}

impl LetterDetail {
    fn show(&self, page: &mut Page) {
        page.toned(Tone::Head, &self.letter);
        let mut line = |name: &str, value: &str| page.line(format!("  {name:<11} {value}"));
        line("pipeline", &format!("{}, stream {}, table {}", self.pipeline, printable(&self.stream), self.table));
        line("added", self.added_at.as_deref().unwrap_or("its id is no time"));
        line(
            "buried",
            &format!("{} ({} ago) by {}", self.buried_at, lasting_ms(self.age_ms), printable(&self.consumer)),
        );
        if !self.key.is_empty() {
            line("key", &shown_key(&self.key));
        }
        line("reason", &self.reason);
        line("detail", &printable(&self.detail));
        if let Some(meaning) = &self.meaning {
            line("meaning", meaning);
        }
        match (&self.resolved_at, &self.resolution) {
            (Some(at), resolution) => {
                line("resolved", &format!("{at}: {}", printable(resolution.as_deref().unwrap_or("somehow"))));
            }
            (None, _) => line("resolved", "no"),
        }
        let kept = if self.shortened { ", of which the beginnings of its fields are kept" } else { "" };
        line("size", &self.bytes.map_or_else(|| "not known".into(), |bytes| format!("{bytes} bytes{kept}")));
        for field in &self.fields {
            page.line(format!("    {} = {}", field.name.shown(), field.value.shown()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::columns::printable_bytes;

    #[test]
    fn the_code_of_postgresql_is_found_in_its_sentence() {
        let checked = "PostgreSQL: new row violates check constraint \"positive\" (23514); of its 99 bytes the beginnings (of) are kept";
        assert_eq!(sqlstate_in(checked).as_deref(), Some("23514"));
        assert_eq!(sqlstate_in("the amount is not a whole decimal number"), None);
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_in_hexadecimal() {
        assert_eq!(Bytes::of(b"a\x1b").shown(), "a\\u{1b}");
        assert_eq!(Bytes::of(b"\xff\x00").shown(), "0xff00");
        assert_eq!(printable_bytes(b"\xff"), "\\xff");
    }
}
