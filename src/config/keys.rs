//! The table of keys: the one place that says what may be configured, in which unit, within which limits, and why.
//!
//! Everything else is derived from it: what is read, what is refused, what `check --print` shows, what "did you mean"
//! may suggest, and, by a test, what `docs/configuration.md` says.

use std::fmt;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::address;
use crate::model::pipeline::{Identifier, Table};

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// Its path, as `section.key`; a pipeline's name is written `<name>`.
    pub(super) name: &'static str,
    /// What its text must be.
    pub(super) kind: Kind,
    /// What holds when nobody says anything.
    pub(super) preset: Preset,
    /// What it counts.
    pub(super) unit: &'static str,
    /// Why there is such a key, in one line.
    pub(super) reason: &'static str,
}

/// What holds when nobody says anything.
#[derive(Debug, Clone, Copy)]
pub(super) enum Preset {
    /// This text, read like any other.
    Text(&'static str),
    /// Nothing.
    Nothing,
    /// This text for the pipeline `counters`; every other pipeline has to say.
    Counters(&'static str),
}

/// What a key's text must be.
#[derive(Debug)]
pub(super) enum Kind {
    Duration { min: Duration, max: Duration },
    Count { min: u64, max: u64 },
    Bytes { min: u64, max: u64 },
    ValkeyUrl,
    PostgresUrl,
    Path,
    Name,
    Text,
    Table,
    Column,
    OptionalColumn,
    Choice(&'static [&'static str]),
    Filter,
}

/// A value that its kind has accepted.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Setting {
    Duration(Duration),
    Number(u64),
    Text(String),
    /// An optional text that is empty.
    Nothing,
}

/// The longest text of a duration: no sum of units overflows within it.
const MAX_DURATION_TEXT: usize = 20;
/// The longest name of a stream or a field.
const MAX_TEXT: usize = 512;
/// The longest name of a pipeline or a source: it is part of other names.
const MAX_NAME: usize = 63;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}
const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
const MINUTE: Duration = seconds(60);
const HOUR: Duration = seconds(3600);
const DAY: Duration = seconds(86_400);
const YEAR: Duration = seconds(365 * 86_400);
const GIB: u64 = 1 << 30;

const fn time(min: Duration, max: Duration) -> Kind {
    Kind::Duration { min, max }
}

const fn key(name: &'static str, kind: Kind, preset: Preset, unit: &'static str, reason: &'static str) -> Key {
    Key { name, kind, preset, unit, reason }
}

use Preset::{Counters, Nothing, Text as Is};

/// Every key, in the order in which people read them.
#[rustfmt::skip] // a table, one key a row
pub(super) const KEYS: &[Key] = &[
    key("valkey.url", Kind::ValkeyUrl, Nothing, "url, secret",
        "where the streams are; `VALKEY_URL` says the same; empty means none"),
    key("valkey.url_file", Kind::Path, Nothing, "path",
        "a file that holds `valkey.url`, for mounted secrets; empty means none"),
    key("valkey.source", Kind::Name, Is("main"), "name",
        "names this Valkey deployment in the ledger: two that flush into one database must differ, or they would share ranges of ids"),
    key("valkey.connect_timeout", time(ms(1), seconds(300)), Is("5s"), "time",
        "the limit for opening a connection"),
    key("valkey.command_timeout", time(ms(1), seconds(300)), Is("5s"), "time",
        "the limit for one command, and for a blocking one on top of what it blocks: a silent server must not hold a worker"),
    key("postgres.url", Kind::PostgresUrl, Nothing, "url, secret",
        "where the tables are; `DATABASE_URL` says the same; empty means none"),
    key("postgres.url_file", Kind::Path, Nothing, "path",
        "a file that holds `postgres.url`, for mounted secrets; empty means none"),
    key("postgres.connections", Kind::Count { min: 1, max: 1000 }, Is("8"), "connections",
        "the most that one process opens: its workers and caretakers take turns, however many streams there are"),
    key("postgres.connect_timeout", time(ms(1), seconds(300)), Is("5s"), "time",
        "the limit for opening a connection"),
    key("postgres.statement_timeout", time(ms(1), HOUR), Is("10s"), "time",
        "the server's limit for one statement: a flush must end before its worker is taken for dead"),
    key("postgres.lock_timeout", time(ms(1), HOUR), Is("5s"), "time",
        "the server's limit for one wait for a lock: a worker on a hot row gives up and tries again"),
    key("postgres.idle_in_transaction_timeout", time(ms(1), HOUR), Is("10s"), "time",
        "after this the server ends a transaction whose client is silent: a stopped worker must not block its peers"),
    key("run.workers", Kind::Count { min: 1, max: 256 }, Is("2"), "workers",
        "for each pipeline: one prepares while one flushes; more help only where they do not meet on the same rows"),
    key("batch.max_entries", Kind::Count { min: 1, max: 1_000_000 }, Is("40000"), "entries",
        "the most that one transaction flushes; more cost memory and redo, fewer cost throughput"),
    key("batch.max_bytes", Kind::Bytes { min: 1, max: GIB }, Is("8MiB"), "bytes",
        "the most that one batch holds in memory, whatever its entries' size"),
    key("batch.read_count", Kind::Count { min: 1, max: 1_000_000 }, Is("1000"), "entries",
        "asked for in one read; larger replies cost more for each entry, not less"),
    key("batch.max_entry_bytes", Kind::Bytes { min: 1, max: GIB }, Is("1MiB"), "bytes",
        "a larger entry is dead-lettered, so that no single one can fill a batch"),
    key("reclaim.dead_after", time(ms(300), DAY), Is("30s"), "time",
        "a consumer silent for this long is taken for dead and its pending entries are claimed"),
    key("reclaim.sweep_every", time(ms(10), DAY), Is("5s"), "time",
        "how often the dead are looked for"),
    key("reclaim.max_deliveries", Kind::Count { min: 4, max: 1000 }, Is("8"), "deliveries",
        "an entry that killed this many processes is buried; from 4 on, for the first few deliveries may be anybody's fault"),
    key("trim.retention", time(Duration::ZERO, YEAR), Is("1h"), "time",
        "how long settled entries stay in the stream, so that they can be replayed"),
    key("trim.every", time(ms(10), DAY), Is("10s"), "time",
        "how often settled entries are cut off"),
    key("compact.margin", time(ms(300), YEAR), Is("1h"), "time",
        "ledger rows younger than this are never merged: longer than any stopped worker may sleep"),
    key("compact.every", time(ms(10), DAY), Is("1m"), "time",
        "how often old ledger rows are merged"),
    key("stop.grace", time(ms(1), DAY), Is("25s"), "time",
        "how long a stop may settle what is held; keep it below the supervisor's kill delay (Kubernetes: 30s)"),
    key("log.format", Kind::Choice(&["text", "json"]), Is("text"), "choice",
        "`text` for people, `json` for collectors"),
    key("log.level", Kind::Filter, Is("info"), "filter",
        "a level, or levels by module, such as `info,tidegate::flow=debug`"),
    key("pipelines.<name>.stream", Kind::Text, Counters(crate::model::names::DEFAULT_STREAM), "text",
        "the stream to read"),
    key("pipelines.<name>.table", Kind::Table, Counters("public.counters"), "name",
        "the table to write, as `schema.table`; a table alone is in `public`"),
    key("pipelines.<name>.key_column", Kind::Column, Is("id"), "name",
        "the column that identifies a row; it needs a unique index of its own"),
    key("pipelines.<name>.value_column", Kind::Column, Is("value"), "name",
        "the column that a delta is merged into"),
    key("pipelines.<name>.updated_at_column", Kind::OptionalColumn, Is("updated_at"), "name",
        "the column that takes the time of the last flush; empty means none"),
    key("pipelines.<name>.key_field", Kind::Text, Is("id"), "text",
        "the entry's field that holds the row's key"),
    key("pipelines.<name>.value_field", Kind::Text, Is("amount"), "text",
        "the entry's field that holds the delta"),
    key("pipelines.<name>.merge", Kind::Choice(&["sum"]), Is("sum"), "choice",
        "how a delta meets the value that is there"),
];

/// Two keys whose values must keep an order.
#[derive(Debug)]
pub(super) struct Relation {
    pub(super) lesser: &'static str,
    pub(super) may_be_equal: bool,
    pub(super) greater: &'static str,
    pub(super) reason: &'static str,
}

const fn relation(lesser: &'static str, may_be_equal: bool, greater: &'static str, reason: &'static str) -> Relation {
    Relation { lesser, may_be_equal, greater, reason }
}

/// Every relation between keys, each with what goes wrong without it.
#[rustfmt::skip] // a table, one relation a row
pub(super) const RELATIONS: &[Relation] = &[
    relation("postgres.statement_timeout", false, "reclaim.dead_after",
        "a worker in the middle of a flush would be taken for dead"),
    relation("postgres.lock_timeout", true, "postgres.statement_timeout",
        "it could never take effect"),
    relation("postgres.idle_in_transaction_timeout", false, "reclaim.dead_after",
        "a dead worker's transaction would still block those who claim its entries"),
    relation("reclaim.sweep_every", true, "reclaim.dead_after",
        "the dead would be found long after their time"),
    relation("batch.read_count", true, "batch.max_entries",
        "one read would overfill a batch"),
    relation("batch.max_entry_bytes", true, "batch.max_bytes",
        "an accepted entry would not fit into any batch"),
    relation("postgres.statement_timeout", false, "stop.grace",
        "a stop could not wait for the last flush"),
    relation("reclaim.dead_after", true, "compact.margin",
        "rows would be merged that a reclaimed entry is still judged by"),
];

impl Key {
    /// Whether its value is never shown.
    pub(super) fn is_secret(&self) -> bool {
        matches!(self.kind, Kind::ValkeyUrl | Kind::PostgresUrl)
    }

    /// The text that holds when nobody says anything, for a key of this pipeline (or of none).
    pub(super) fn preset_text(&self, pipeline: Option<&str>) -> Option<String> {
        match self.preset {
            Preset::Text(text) => Some(text.into()),
            Preset::Nothing => Some(String::new()),
            Preset::Counters(text) => (pipeline == Some("counters")).then(|| text.into()),
        }
    }

    /// What to write, as the end of a sentence.
    pub(super) fn advice(&self) -> String {
        match (&self.kind, self.preset) {
            (Kind::Duration { .. }, Preset::Text(example)) => format!("write {}, such as \"{example}\"", self.limits()),
            _ => format!("write {}", self.limits()),
        }
    }

    /// What its kind accepts, in words.
    pub(super) fn limits(&self) -> String {
        match &self.kind {
            Kind::Duration { min, max } => {
                format!("a duration from {} to {}", show_duration(*min), show_duration(*max))
            }
            Kind::Count { min, max } => format!("a whole number from {min} to {max}"),
            Kind::Bytes { min, max } => {
                format!(
                    "whole bytes, or KiB, MiB or GiB as \"8MiB\", from {} to {}",
                    show_bytes(*min),
                    show_bytes(*max)
                )
            }
            Kind::ValkeyUrl => {
                "valkey://user:password@host:port/db, or valkeys, redis, rediss, or one of these with -sentinel".into()
            }
            Kind::PostgresUrl => "postgres://user:password@host:port/database".into(),
            Kind::Path => "the path of a file".into(),
            Kind::Name => format!("a letter or _, then letters, digits, _ or -, {MAX_NAME} at most"),
            Kind::Text => format!("1 to {MAX_TEXT} bytes without control characters"),
            Kind::Table => "schema.table, two plain SQL names of at most 63 letters, digits or _".into(),
            Kind::Column => "a plain SQL name of at most 63 letters, digits or _".into(),
            Kind::OptionalColumn => "a plain SQL name of at most 63 letters, digits or _, or \"\"".into(),
            Kind::Choice(words) => words.join(" or "),
            Kind::Filter => "trace, debug, info, warn, error, off, or target=level, separated by commas".into(),
        }
    }

    /// Reads text strictly. The error ends a sentence that begins with the key's name.
    pub(super) fn read(&self, text: &str) -> Result<Setting, String> {
        let refused = || Err(format!("is {}; {}", self.show_given(text), self.advice()));
        let within = |accepted: bool, setting: Setting| if accepted { Ok(setting) } else { refused() };
        match &self.kind {
            Kind::Duration { .. } if is_number(text) => {
                Err(format!("is {text} without a unit; say the unit, e.g. \"30s\""))
            }
            Kind::Duration { min, max } => match parse_duration(text) {
                Some(time) => within((*min..=*max).contains(&time), Setting::Duration(time)),
                None => refused(),
            },
            Kind::Count { min, max } => match parse_whole(text) {
                Some(count) => within((*min..=*max).contains(&count), Setting::Number(count)),
                None => refused(),
            },
            Kind::Bytes { min, max } => match parse_bytes(text) {
                Some(bytes) => within((*min..=*max).contains(&bytes), Setting::Number(bytes)),
                None => refused(),
            },
            Kind::ValkeyUrl | Kind::PostgresUrl | Kind::Path | Kind::OptionalColumn if text.is_empty() => {
                Ok(Setting::Nothing)
            }
            Kind::ValkeyUrl => address::check_valkey(text).map(|()| Setting::Text(text.into())),
            Kind::PostgresUrl => address::check_postgres(text).map(|()| Setting::Text(text.into())),
            Kind::Path => within(!text.contains('\0'), Setting::Text(text.into())),
            Kind::Name => within(is_name(text), Setting::Text(text.into())),
            Kind::Text => {
                let plain = !text.is_empty() && text.len() <= MAX_TEXT && !text.contains(char::is_control);
                within(plain, Setting::Text(text.into()))
            }
            Kind::Table => within(Table::parse(text).is_ok(), Setting::Text(text.into())),
            Kind::Column | Kind::OptionalColumn => within(Identifier::parse(text).is_ok(), Setting::Text(text.into())),
            Kind::Choice(words) if !words.contains(&text) => {
                let hint = nearest(text, words.iter().map(|w| (*w).to_owned()));
                let hint = hint.map(|word| format!("did you mean {word}? ")).unwrap_or_default();
                Err(format!("is {}; {hint}{}", self.show_given(text), self.advice()))
            }
            Kind::Choice(_) => Ok(Setting::Text(text.into())),
            Kind::Filter => match check_filter(text) {
                Ok(()) => Ok(Setting::Text(text.into())),
                Err(why) => Err(format!("is {}: {why}; {}", self.show_given(text), self.advice())),
            },
        }
    }

    /// A value as `check --print` shows it.
    pub(super) fn show(&self, setting: &Setting) -> String {
        match setting {
            Setting::Duration(time) => show_duration(*time),
            Setting::Number(bytes) if matches!(self.kind, Kind::Bytes { .. }) => show_bytes(*bytes),
            Setting::Number(count) => count.to_string(),
            Setting::Text(text) if self.is_secret() => address::hide(text),
            // Somebody may have put the url itself where its file belongs.
            Setting::Text(text) if matches!(self.kind, Kind::Path) && text.contains("://") => address::hide(text),
            Setting::Text(text) => text.clone(),
            Setting::Nothing => "none".into(),
        }
    }

    /// A refused value, for a sentence: a url keeps its secret even where it does not belong.
    fn show_given(&self, text: &str) -> String {
        match self.kind {
            _ if text.contains("://") => address::hide(text),
            Kind::Count { .. } if is_number(text) => text.into(),
            _ if text.chars().count() > MAX_NAME => {
                format!("{:?}…", text.chars().take(MAX_NAME).collect::<String>())
            }
            _ => format!("{text:?}"),
        }
    }
}

impl fmt::Debug for Setting {
    /// A text may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Setting::Duration(time) => f.write_str(&show_duration(*time)),
            Setting::Number(number) => write!(f, "{number}"),
            Setting::Text(_) => f.write_str("text"),
            Setting::Nothing => f.write_str("none"),
        }
    }
}

impl Setting {
    /// Its size, to compare it with another of the same unit.
    pub(super) fn size(&self) -> Option<u128> {
        match self {
            Setting::Duration(time) => Some(time.as_millis()),
            Setting::Number(number) => Some(u128::from(*number)),
            Setting::Text(_) | Setting::Nothing => None,
        }
    }
}

/// The key of a full path, such as `batch.max_entries` or `pipelines.counters.stream`.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    let general = match path.strip_prefix("pipelines.").and_then(|rest| rest.split_once('.')) {
        Some((_, leaf)) => format!("pipelines.<name>.{leaf}"),
        None => path.to_owned(),
    };
    // `pipelines.<name>` itself is no path anybody may write.
    KEYS.iter().find(|key| key.name == general && !path.contains('<'))
}

/// The known path that somebody who wrote `path` most likely meant.
pub(super) fn did_you_mean(path: &str) -> Option<String> {
    let pipeline = path.strip_prefix("pipelines.").and_then(|rest| rest.split('.').next()).unwrap_or("counters");
    let known = || KEYS.iter().map(|key| key.name.replace("<name>", pipeline));
    nearest(path, known()).or_else(|| {
        let leaf = path.rsplit('.').next()?;
        known().find(|candidate| candidate.rsplit('.').next() == Some(leaf))
    })
}

/// The sections, in order.
pub(super) fn sections() -> Vec<&'static str> {
    let mut sections: Vec<_> = KEYS.iter().filter_map(|key| key.name.split('.').next()).collect();
    sections.dedup();
    sections
}

/// The candidate that is fewest slips of a finger away, if few enough.
pub(super) fn nearest(given: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    let limit = (given.len() / 4).clamp(2, 6);
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(&given.to_lowercase(), &candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Whether this may name a pipeline or a source.
pub(super) fn is_name(text: &str) -> bool {
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let goes_on_well = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    starts_well && goes_on_well && text.len() <= MAX_NAME
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.parse::<f64>().is_ok()
}

/// Digits and nothing else: no sign, no blank, no fraction.
fn parse_whole(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Whole milliseconds: what is sent to a server in milliseconds must not become another number on the way.
fn parse_duration(text: &str) -> Option<Duration> {
    let time = (text.len() <= MAX_DURATION_TEXT).then(|| humantime::parse_duration(text).ok())??;
    (time.subsec_nanos() % 1_000_000 == 0).then_some(time)
}

fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim_start() {
        "" if unit.is_empty() => 1,
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    parse_whole(number)?.checked_mul(scale)
}

/// A filter that says what it seems to say: a lone word that is no level would be taken for a module's name.
fn check_filter(text: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "off"];
    if text.trim().is_empty() {
        return Err("no level".into());
    }
    // The filter's parser panics at some others.
    if !text.is_ascii() {
        return Err("not plain ASCII".into());
    }
    for part in text.split(',') {
        let known = LEVELS.iter().any(|level| level.eq_ignore_ascii_case(part));
        if !known && !part.contains(['=', '[']) {
            let hint = nearest(part, LEVELS.iter().map(|level| (*level).to_owned()));
            return Err(match hint {
                Some(level) => format!("{part:?} is no level, did you mean {level}?"),
                None => format!("{part:?} is no level"),
            });
        }
    }
    EnvFilter::try_new(text).map(drop).map_err(|error| error.to_string())
}

/// A duration as people write it, exact: `1h 30m`, `300ms`.
fn show_duration(time: Duration) -> String {
    let mut rest = time.as_millis();
    let mut parts = Vec::new();
    for (unit, size) in [("d", DAY), ("h", HOUR), ("m", MINUTE), ("s", seconds(1)), ("ms", ms(1))] {
        let count = rest / size.as_millis();
        rest %= size.as_millis();
        if count > 0 {
            parts.push(format!("{count}{unit}"));
        }
    }
    if parts.is_empty() { "0s".into() } else { parts.join(" ") }
}

/// Bytes in the largest unit that is exact.
fn show_bytes(bytes: u64) -> String {
    [("GiB", 30), ("MiB", 20), ("KiB", 10)]
        .into_iter()
        .find(|(_, shift)| bytes > 0 && bytes.is_multiple_of(1 << shift))
        .map_or_else(|| format!("{bytes}B"), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DOCUMENT: &str = include_str!("../../docs/configuration.md");

    fn row(key: &Key) -> String {
        let preset = match key.preset {
            Preset::Text(text) => format!("`{text}`"),
            Preset::Nothing => "none".into(),
            Preset::Counters(text) => format!("`{text}` for `counters`, otherwise required"),
        };
        format!("| `{}` | {preset} | {}: {} | {} |", key.name, key.unit, key.limits(), key.reason)
    }

    fn relation_row(relation: &Relation) -> String {
        let sign = if relation.may_be_equal { "≤" } else { "<" };
        format!("| `{}` | {sign} | `{}` | {} |", relation.lesser, relation.greater, relation.reason)
    }

    #[test]
    fn the_document_has_every_key_with_its_default_limits_and_reason() {
        let missing: Vec<_> = KEYS.iter().map(row).filter(|row| !DOCUMENT.lines().any(|line| line == row)).collect();
        assert!(missing.is_empty(), "docs/configuration.md lacks these rows:\n{}", missing.join("\n"));
    }

    #[test]
    fn the_document_has_every_relation() {
        let missing: Vec<_> =
            RELATIONS.iter().map(relation_row).filter(|row| !DOCUMENT.lines().any(|line| line == row)).collect();
        assert!(missing.is_empty(), "docs/configuration.md lacks these rows:\n{}", missing.join("\n"));
    }

    #[test]
    fn the_document_has_no_row_that_is_not_in_the_tables() {
        let known: Vec<String> = KEYS.iter().map(row).chain(RELATIONS.iter().map(relation_row)).collect();
        let sections = sections();
        for line in DOCUMENT.lines() {
            let Some(rest) = line.strip_prefix("| `") else { continue };
            if sections.iter().any(|section| rest.starts_with(&format!("{section}."))) {
                assert!(known.iter().any(|row| row == line), "nothing in the tables says: {line}");
            }
        }
    }

    #[test]
    fn every_preset_is_accepted_by_its_own_key() {
        for key in KEYS {
            let text = key.preset_text(Some("counters")).expect("counters has every default");
            assert!(key.read(&text).is_ok(), "{}: {:?}", key.name, key.read(&text).err());
        }
    }

    #[test]
    fn every_relation_names_two_known_keys_of_one_unit() {
        for relation in RELATIONS {
            let size = |name: &str| {
                let key = find(name).unwrap_or_else(|| panic!("{name} is no key"));
                key.read(&key.preset_text(None).expect("has a default")).expect("valid").size().is_some()
            };
            assert!(size(relation.lesser) && size(relation.greater));
            assert_eq!(find(relation.lesser).expect("known").unit, find(relation.greater).expect("known").unit);
        }
    }

    #[test]
    fn a_count_is_digits_within_its_limits_and_nothing_else() {
        let workers = find("run.workers").expect("known");
        assert_eq!(workers.read("256"), Ok(Setting::Number(256)));
        for bad in
            ["0", "257", "-1", "+1", "1.0", "1e2", " 1", "1 ", "", "true", "ten", "1_0", "99999999999999999999999"]
        {
            let fault = workers.read(bad).expect_err(bad);
            assert!(fault.contains("a whole number from 1 to 256"), "{bad}: {fault}");
        }
    }

    #[test]
    fn a_duration_without_a_unit_is_asked_for_one() {
        let timeout = find("reclaim.dead_after").expect("known");
        for bad in ["30", "1.5", "0", "-3"] {
            assert!(timeout.read(bad).expect_err(bad).contains("say the unit, e.g. \"30s\""), "{bad}");
        }
        assert_eq!(timeout.read("1500ms"), Ok(Setting::Duration(ms(1500))));
        for bad in ["299ms", "25h", "soon", "", "-3s", "30 parsecs", "1s 500us", &"1s".repeat(11)] {
            assert!(timeout.read(bad).expect_err(bad).contains("a duration from 300ms to 1d"), "{bad}");
        }
        assert_eq!(find("trim.retention").expect("known").read("0s"), Ok(Setting::Duration(Duration::ZERO)));
        assert!(find("trim.every").expect("known").read("0s").is_err());
    }

    #[test]
    fn bytes_are_whole_and_in_powers_of_1024() {
        let bytes = find("batch.max_bytes").expect("known");
        for (text, expected) in [("1", 1), ("64KiB", 65_536), ("8 MiB", 8 << 20), ("1GiB", 1 << 30), ("7B", 7)] {
            assert_eq!(bytes.read(text), Ok(Setting::Number(expected)), "{text}");
        }
        for bad in [
            "",
            "0",
            "2GiB",
            "8MB",
            "8m",
            "1.5MiB",
            "MiB",
            "-1",
            "8 ",
            "99999999999999999999GiB",
            "18014398509481984KiB",
        ] {
            assert!(bytes.read(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_misspelt_level_is_not_taken_for_a_module() {
        let level = find("log.level").expect("known");
        for good in ["info", "WARN", "off", "info,tidegate::flow=debug", "warn,sqlx=off"] {
            assert!(level.read(good).is_ok(), "{good}: {:?}", level.read(good).err());
        }
        assert!(level.read("inof").expect_err("refused").contains("did you mean info?"));
        for bad in ["", "info,sqlx", "tidegate=loud", "info,,", "warn, info", "ïnfo"] {
            assert!(level.read(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn names_of_sources_tables_and_streams_are_checked() {
        let read = |key: &str, text: &str| find(key).expect("known").read(text);
        assert!(read("valkey.source", "eu-west-1").is_ok());
        assert!(read("valkey.source", "1eu").is_err());
        assert!(read("pipelines.x.table", "app.totals").is_ok());
        assert!(read("pipelines.x.table", "app.totals; drop table x").is_err());
        assert!(read("pipelines.x.stream", "flush:{x}").is_ok());
        assert!(read("pipelines.x.stream", "").is_err());
        assert!(read("pipelines.x.stream", "a\nb").is_err());
        assert!(read("pipelines.x.key_column", "").is_err());
        assert_eq!(read("pipelines.x.updated_at_column", ""), Ok(Setting::Nothing));
        assert!(read("pipelines.x.merge", "summ").expect_err("refused").contains("did you mean sum?"));
    }

    #[test]
    fn a_url_in_the_wrong_place_keeps_its_secret() {
        let fault = find("valkey.source").expect("known").read("valkey://u:hunter2@h").expect_err("refused");
        assert!(!fault.contains("hunter2"), "{fault}");
    }

    #[test]
    fn a_slip_or_a_wrong_section_is_guessed_and_nonsense_is_not() {
        assert_eq!(did_you_mean("batch.max_entrys").as_deref(), Some("batch.max_entries"));
        assert_eq!(did_you_mean("bacth.max_bytes").as_deref(), Some("batch.max_bytes"));
        assert_eq!(did_you_mean("valkey.lock_timeout").as_deref(), Some("postgres.lock_timeout"));
        assert_eq!(did_you_mean("pipelines.orders.steam").as_deref(), Some("pipelines.orders.stream"));
        assert_eq!(did_you_mean("colour.of_the_sky"), None);
    }

    proptest! {
        #[test]
        fn what_is_shown_of_a_duration_reads_back_as_the_same(count in 0u64..u64::from(u32::MAX)) {
            prop_assert_eq!(humantime::parse_duration(&show_duration(ms(count))).ok(), Some(ms(count)));
        }

        #[test]
        fn what_is_shown_of_bytes_reads_back_as_the_same(bytes in 1u64..u64::MAX >> 10, shift in 0u32..10) {
            prop_assert_eq!(parse_bytes(&show_bytes(bytes << shift)), Some(bytes << shift));
        }

        #[test]
        fn no_text_makes_a_reader_panic(text in ".{0,40}") {
            for key in KEYS {
                let _ = key.read(&text);
            }
        }
    }
}
