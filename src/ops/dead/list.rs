//! `tidegate dead list`: how many letters there are, by reason, and the latest of them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::select::{Filter, Letter, Piece, Search, State};
use super::show::Field;
use super::{key_fields, key_of};
use crate::config::Config;
use crate::ops::columns::{Page, Tone, count, cut, lasting_ms, plural, printable, printable_bytes};
use crate::ops::context::Report;
use crate::ops::{Context, Exit, Failure};
use crate::postgres::Database;

/// How many characters of a sentence or of fields a line shows.
const SHOWN: usize = 60;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(flatten)]
    pub(super) filter: Filter,
    /// Letters in which state
    #[arg(long, value_enum, default_value_t = State::Open)]
    state: State,
    /// Show so many at the most; all are counted
    #[arg(long, default_value_t = 50, value_name = "N")]
    limit: u32,
}

/// Dead letters, counted and listed.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DeadLetters {
    /// How many match.
    pub total: u64,
    /// How many of them have each reason.
    pub by_reason: BTreeMap<String, u64>,
    /// The latest of them.
    pub letters: Vec<LetterLine>,
}

/// A letter, in short.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LetterLine {
    /// The entry's id, a slash, and its digest: as the other commands take it.
    pub letter: String,
    /// The pipeline that buried it.
    pub pipeline: String,
    /// The stream it came from.
    pub stream: String,
    /// The fields that its row is known by, as the configuration names them now; empty where it names none that the letter has.
    pub key: Vec<Field>,
    /// Why, in one word.
    pub reason: String,
    /// Why, in one sentence.
    pub detail: String,
    /// When it was buried, in RFC 3339.
    pub buried_at: String,
    /// When it was resolved; null while it is open.
    pub resolved_at: Option<String>,
    /// How it was resolved; null while it is open.
    pub resolution: Option<String>,
    #[serde(skip)]
    age_ms: u64,
    #[serde(skip)]
    fields: String,
}

impl LetterLine {
    fn of(letter: &Letter, config: &Config) -> LetterLine {
        let fields = letter.fields.chunks(2).map(|pair| {
            let value = pair.get(1).map(|value| printable_bytes(value)).unwrap_or_default();
            format!("{}={value}", printable_bytes(&pair[0]))
        });
        LetterLine {
            letter: letter.name(),
            pipeline: letter.pipeline.clone(),
            stream: letter.stream.clone(),
            key: key_of(config, letter),
            reason: letter.reason.clone(),
            detail: letter.detail.clone(),
            buried_at: letter.buried_at.clone(),
            resolved_at: letter.resolved_at.clone(),
            resolution: letter.resolution.clone(),
            age_ms: letter.buried_ms_ago,
            fields: fields.collect::<Vec<_>>().join(" "),
        }
    }
}

pub(super) async fn run(opts: &Opts, context: &Context, config: &Config, database: &Database) -> Result<Exit, Failure> {
    let piece = Piece { skip: 0, limit: opts.limit };
    context.print(&find(config, database, &opts.filter, opts.state, piece).await?)?;
    Ok(Exit::Ok)
}

/// Counts the letters that match, and lists a piece of them.
pub async fn find(
    config: &Config,
    database: &Database,
    filter: &Filter,
    state: State,
    piece: Piece,
) -> Result<DeadLetters, Failure> {
    let key_fields = key_fields(config);
    let search = Search { source: &config.valkey.source, filter, state, key_fields: &key_fields };
    let counts = database.run(async |c| search.counts(c).await).await?;
    let letters = database.run(async |c| search.letters(c, piece).await).await?;
    let mut by_reason = BTreeMap::new();
    for (_, reason, count) in &counts {
        *by_reason.entry(reason.clone()).or_default() += count;
    }
    let total = by_reason.values().sum();
    let letters = letters.iter().map(|letter| LetterLine::of(letter, config)).collect();
    Ok(DeadLetters { total, by_reason, letters })
}

/// A key as one line: `tenant=a at=2026-11-27`.
pub(super) fn shown_key(key: &[Field]) -> String {
    key.iter().map(|field| format!("{}={}", field.name.shown(), field.value.shown())).collect::<Vec<_>>().join(" ")
}

/// Counts in one line: `3 dead letters: 2 bad_amount, 1 refused_by_table`.
pub(super) fn summary(total: u64, by_reason: &BTreeMap<String, u64>) -> String {
    let reasons: Vec<String> =
        by_reason.iter().map(|(reason, number)| format!("{} {reason}", count(*number))).collect();
    let colon = if reasons.is_empty() { "" } else { ": " };
    format!("{}{colon}{}", plural(total, "dead letter", "dead letters"), reasons.join(", "))
}

impl Report for DeadLetters {
    fn show(&self, page: &mut Page) {
        page.toned(if self.total == 0 { Tone::Good } else { Tone::Warn }, summary(self.total, &self.by_reason));
        if self.letters.is_empty() {
            return;
        }
        let rows: Vec<Vec<String>> = self
            .letters
            .iter()
            .map(|letter| {
                let why = letter.resolution.as_ref().unwrap_or(&letter.detail);
                vec![
                    letter.letter.clone(),
                    letter.pipeline.clone(),
                    letter.reason.clone(),
                    lasting_ms(letter.age_ms),
                    cut(&shown_key(&letter.key), SHOWN),
                    cut(&letter.fields, SHOWN),
                    cut(&printable(why), SHOWN),
                ]
            })
            .collect();
        page.table(&["letter", "pipeline", "reason", ">age", "key", "fields", "why"], &rows);
        let hidden = self.total.saturating_sub(self.letters.len() as u64);
        if hidden > 0 {
            page.line(format!("and {} more: narrow the search, or raise --limit", count(hidden)));
        }
    }
}
