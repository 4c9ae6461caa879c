//! The kinds of values: which texts each accepts, and how its values are shown.
//!
//! Takes a text from any source; gives a [`Setting`]. Fails with the end of a sentence that begins with the key's name and
//! never quotes a secret. Nothing is rounded or converted.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::accept::{self, ACCEPTABLE, Until};
use super::guess::nearest;
use super::setting::Setting;
use super::units::{is_number, parse_bytes, parse_duration, parse_whole, show_bytes, show_duration};
use super::url;
use crate::model::pipeline::{Identifier, Table};
use crate::model::target;

/// What a key accepts. A further kind is a variant here, and a [`Setting`] if no variant of that fits.
#[derive(Debug)]
pub(super) enum Kind {
    Time(RangeInclusive<Duration>),
    /// A number of these.
    Count(&'static str, RangeInclusive<u64>),
    Bytes(RangeInclusive<u64>),
    ValkeyUrl,
    PostgresUrl,
    /// A secret that is sent in a header, or nothing.
    Token,
    Path,
    Name,
    Text,
    TableName,
    Column,
    OptionalColumn,
    OptionalName,
    /// Key columns, or nothing.
    Keys,
    /// Value columns, or nothing.
    Values,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// True or false.
    Switch,
    Filter,
    /// An address to listen at, or nothing.
    Listen,
    /// Names of hosts, or nothing.
    Hosts,
    /// A url of HTTP without secrets, or nothing.
    HttpUrl,
    /// A finding of the doctor that can be accepted.
    Finding,
    /// Until when something holds.
    Until,
    /// A sentence for people.
    Sentence,
}

/// The longest name of a stream or a field.
const MAX_TEXT: usize = 512;
/// A shorter token could be guessed; a longer one is a mistake.
const TOKEN_LENGTHS: RangeInclusive<usize> = 16..=512;
/// The longest name of a pipeline or a source: it is part of other names.
const MAX_NAME: usize = 63;

impl Kind {
    /// Whether its values must not be shown.
    pub(super) fn is_secret(&self) -> bool {
        matches!(self, Kind::ValkeyUrl | Kind::PostgresUrl | Kind::Token)
    }

    /// What a value counts or is, in one or two words.
    pub(super) fn unit(&self) -> &'static str {
        match self {
            Kind::Time(_) => "time",
            Kind::Count(unit, _) => unit,
            Kind::Bytes(_) => "bytes",
            Kind::ValkeyUrl | Kind::PostgresUrl => "url, secret",
            Kind::Token => "secret",
            Kind::Path => "path",
            Kind::Name | Kind::TableName | Kind::Column | Kind::OptionalColumn => "name",
            Kind::OptionalName => "name",
            Kind::Keys | Kind::Values => "columns",
            Kind::Text => "text",
            Kind::Choice(_) => "choice",
            Kind::Switch => "switch",
            Kind::Filter => "filter",
            Kind::Listen => "address",
            Kind::Hosts => "names",
            Kind::HttpUrl => "url",
            Kind::Finding => "finding",
            Kind::Until => "time",
            Kind::Sentence => "text",
        }
    }

    /// What it accepts, in words.
    pub(super) fn limits(&self) -> String {
        match self {
            Kind::Time(range) => {
                format!("a duration from {} to {}", show_duration(*range.start()), show_duration(*range.end()))
            }
            Kind::Count(_, range) => format!("a whole number from {} to {}", range.start(), range.end()),
            Kind::Bytes(range) => {
                let (min, max) = (show_bytes(*range.start()), show_bytes(*range.end()));
                format!("a number of bytes, or text such as \"8MiB\" (KiB, MiB, GiB), from {min} to {max}")
            }
            Kind::ValkeyUrl => {
                "valkey://user:password@host:port/db, or valkeys, redis, rediss, or one of these with -sentinel or -cluster".into()
            }
            Kind::PostgresUrl => "postgres://user:password@host:port/database".into(),
            Kind::Token => format!(
                "{} to {} visible ASCII characters, such as `openssl rand -hex 32` prints, or \"\"",
                TOKEN_LENGTHS.start(),
                TOKEN_LENGTHS.end()
            ),
            Kind::Path => "the path of a file".into(),
            Kind::Name => format!("a letter or _, then letters, digits, _ or -, at most {MAX_NAME} characters"),
            Kind::Text => format!("1 to {MAX_TEXT} bytes without control characters"),
            Kind::TableName => "schema.table, two plain SQL names of at most 63 letters, digits or _".into(),
            Kind::Column => "a plain SQL name of at most 63 letters, digits or _".into(),
            Kind::OptionalColumn => "a plain SQL name of at most 63 letters, digits or _, or \"\"".into(),
            Kind::OptionalName => "the name of another pipeline, or \"\"".into(),
            Kind::Keys => "columns, such as \"tenant: uuid, day = day(at, Europe/Berlin)\", or \"\"".into(),
            Kind::Values => "columns, such as \"requests = count(), bytes = sum(bytes)\", or \"\"".into(),
            Kind::Choice(words) => words.join(" or "),
            Kind::Switch => "true or false".into(),
            Kind::Listen => "an IP address and a port, such as \"127.0.0.1:9464\" or \"[::]:9464\" (port 0: any that is free), or \"\"".into(),
            Kind::Hosts => "names of hosts without ports, separated by commas, or \"\"".into(),
            Kind::HttpUrl => "http://host:port or https://host:port without a user or a password, or \"\"".into(),
            Kind::Finding => ACCEPTABLE.join(" or "),
            Kind::Until => "a date such as 2027-01-31, which lasts to its end in UTC, or a time such as 2027-01-31T18:00:00Z".into(),
            Kind::Sentence => format!("1 to {MAX_TEXT} bytes without control characters, not only blanks"),
            Kind::Filter => "trace, debug, info, warn, error, off, or target=level, separated by commas".into(),
        }
    }

    /// What to write, as the end of a sentence.
    pub(super) fn advice(&self) -> String {
        match self {
            Kind::Time(_) => format!("write {}, such as \"30s\"", self.limits()),
            _ => format!("write {}", self.limits()),
        }
    }

    /// Reads a text strictly. The error ends a sentence that begins with the key's name.
    pub(super) fn read(&self, text: &str) -> Result<Setting, String> {
        let refused = || Err(format!("is {}; {}", self.show_given(text), self.advice()));
        let accept_if = |accepted: bool, setting: Setting| if accepted { Ok(setting) } else { refused() };
        match self {
            Kind::Time(_) if is_number(text) => {
                Err(format!("is {text} without a unit; write the unit, such as \"30s\""))
            }
            Kind::Time(range) => match parse_duration(text) {
                Some(time) => accept_if(range.contains(&time), Setting::Time(time)),
                None => refused(),
            },
            Kind::Count(_, range) => match parse_whole(text) {
                Some(count) => accept_if(range.contains(&count), Setting::Number(count)),
                None => refused(),
            },
            Kind::Bytes(range) => match parse_bytes(text) {
                Some(bytes) => accept_if(range.contains(&bytes), Setting::Number(bytes)),
                None => refused(),
            },
            Kind::ValkeyUrl | Kind::PostgresUrl | Kind::Path | Kind::OptionalColumn if text.is_empty() => {
                Ok(Setting::Nothing)
            }
            Kind::Listen | Kind::Hosts | Kind::HttpUrl | Kind::Token if text.is_empty() => Ok(Setting::Nothing),
            Kind::OptionalName | Kind::Keys | Kind::Values if text.trim().is_empty() => Ok(Setting::Nothing),
            Kind::OptionalName => accept_if(is_name(text), Setting::Text(text.into())),
            Kind::Keys => target::parse_keys(text).map(|_| Setting::Text(text.into())),
            Kind::Values => target::parse_values(text).map(|_| Setting::Text(text.into())),
            Kind::Switch => accept_if(matches!(text, "true" | "false"), Setting::Text(text.into())),
            Kind::Listen => accept_if(text.parse::<SocketAddr>().is_ok(), Setting::Text(text.into())),
            Kind::Hosts => accept_if(text.split(',').all(|name| is_host(name.trim())), Setting::Text(text.into())),
            Kind::HttpUrl => url::check_http(text).map(|()| Setting::Text(text.into())),
            Kind::ValkeyUrl => url::check_valkey(text).map(|()| Setting::Text(text.into())),
            Kind::PostgresUrl => url::check_postgres(text).map(|()| Setting::Text(text.into())),
            // What was written is not quoted: it may be almost the token.
            Kind::Token => {
                let fits = TOKEN_LENGTHS.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
                if fits { Ok(Setting::Text(text.into())) } else { Err(format!("is no such token; {}", self.advice())) }
            }
            // A url in the place of its file would be shown with its secret.
            Kind::Path if text.contains("://") => {
                Err(format!("is a url; {}, or set the key without _file", self.advice()))
            }
            Kind::Path => accept_if(!text.contains('\0'), Setting::Text(text.into())),
            Kind::Name => accept_if(is_name(text), Setting::Text(text.into())),
            Kind::Text => {
                let plain = !text.is_empty() && text.len() <= MAX_TEXT && !text.contains(char::is_control);
                accept_if(plain, Setting::Text(text.into()))
            }
            Kind::Finding => match accept::check_finding(text) {
                Ok(()) => Ok(Setting::Text(text.into())),
                Err(why) => Err(format!("is {}; {why}", self.show_given(text))),
            },
            Kind::Until => accept_if(Until::parse(text).is_some(), Setting::Text(text.into())),
            Kind::Sentence => {
                let plain = !text.trim().is_empty() && text.len() <= MAX_TEXT && !text.contains(char::is_control);
                accept_if(plain, Setting::Text(text.into()))
            }
            Kind::TableName => accept_if(Table::parse(text).is_ok(), Setting::Text(text.into())),
            Kind::Column | Kind::OptionalColumn => {
                accept_if(Identifier::parse(text).is_ok(), Setting::Text(text.into()))
            }
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
            Setting::Time(time) => show_duration(*time),
            Setting::Number(bytes) if matches!(self, Kind::Bytes(_)) => show_bytes(*bytes),
            Setting::Number(count) => count.to_string(),
            Setting::Text(_) if matches!(self, Kind::Token) => "***".into(),
            Setting::Text(text) if self.is_secret() => url::hide(text),
            Setting::Text(text) => text.clone(),
            Setting::Nothing => "none".into(),
        }
    }

    /// A refused value, for a sentence: a url keeps its secret even in the wrong place.
    fn show_given(&self, text: &str) -> String {
        match self {
            _ if text.contains("://") => url::hide(text),
            Kind::Count(..) if is_number(text) => text.into(),
            _ if text.chars().count() > MAX_NAME => {
                format!("{:?}…", text.chars().take(MAX_NAME).collect::<String>())
            }
            _ => format!("{text:?}"),
        }
    }
}

/// Whether this is the name of a host, as a request tells it.
fn is_host(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    text.len() <= 253 && text.strip_suffix('.').unwrap_or(text).split('.').all(is_label)
}

/// Whether this may name a pipeline or a source.
pub(crate) fn is_name(text: &str) -> bool {
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let goes_on_well = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    starts_well && goes_on_well && text.len() <= MAX_NAME
}

/// Refuses a filter that would not do what it seems to say: a single word that is not a level is read as a module's name.
fn check_filter(text: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "off"];
    if text.trim().is_empty() {
        return Err("no level".into());
    }
    // The filter's parser panics on some other texts.
    if !text.is_ascii() {
        return Err("not plain ASCII".into());
    }
    for part in text.split(',') {
        let known = LEVELS.iter().any(|level| level.eq_ignore_ascii_case(part));
        if !known && !part.contains(['=', '[']) {
            let hint = nearest(part, LEVELS.iter().map(|level| (*level).to_owned()));
            return Err(match hint {
                Some(level) => format!("{part:?} is not a level, did you mean {level}?"),
                None => format!("{part:?} is not a level"),
            });
        }
    }
    EnvFilter::try_new(text).map(drop).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::key::{Key, find};
    use super::super::sections::{KEYS, RELATIONS};
    use super::*;
    use crate::flow::reclaim::ALONE_AFTER;
    use proptest::prelude::*;

    fn read(path: &str, text: &str) -> Result<Setting, String> {
        find(path).unwrap_or_else(|| panic!("{path} is not a key")).kind.read(text)
    }

    #[test]
    fn every_default_is_accepted_by_its_own_key() {
        for key in KEYS {
            let read = key.default.map(|default| key.kind.read(default));
            assert!(read.as_ref().is_none_or(Result::is_ok), "{}: {read:?}", key.name);
        }
    }

    #[test]
    fn every_relation_names_two_known_keys_of_one_unit() {
        let key = |name: &str| find(name).unwrap_or_else(|| panic!("{name} is not a key"));
        for relation in RELATIONS {
            let (lesser, greater) = (key(relation.lesser), key(relation.greater));
            assert_eq!(lesser.kind.unit(), greater.kind.unit());
            let size = |key: &Key| key.kind.read(key.default.expect("a default")).expect("valid").size();
            assert!(size(lesser).is_some() && size(greater).is_some(), "{relation:?} compares what has no size");
        }
    }

    #[test]
    fn a_count_is_digits_within_its_limits_and_nothing_else() {
        let workers = |text: &str| read("run.workers", text);
        assert_eq!(workers("256"), Ok(Setting::Number(256)));
        for bad in
            ["0", "257", "-1", "+1", "1.0", "1e2", " 1", "1 ", "", "true", "ten", "1_0", "99999999999999999999999"]
        {
            let sentence = workers(bad).expect_err(bad);
            assert!(sentence.contains("a whole number from 1 to 256"), "{bad}: {sentence}");
        }
    }

    #[test]
    fn an_entry_is_tried_alone_before_its_deliveries_can_bury_it() {
        let deliveries = |count: u64| read("reclaim.max_deliveries", &count.to_string());
        assert!(deliveries(ALONE_AFTER).is_err());
        assert!(deliveries(ALONE_AFTER + 1).is_ok());
    }

    #[test]
    fn a_duration_without_a_unit_is_refused_with_an_example() {
        let timeout = |text: &str| read("reclaim.dead_after", text);
        for bad in ["30", "1.5", "0", "-3"] {
            assert!(timeout(bad).expect_err(bad).contains("write the unit, such as \"30s\""), "{bad}");
        }
        assert_eq!(timeout("1500ms"), Ok(Setting::Time(Duration::from_millis(1500))));
        for bad in ["299ms", "25h", "soon", "", "-3s", "30 parsecs", "1s 500us", &"1s".repeat(11)] {
            assert!(timeout(bad).expect_err(bad).contains("a duration from 300ms to 1d"), "{bad}");
        }
        assert_eq!(read("trim.retention", "0s"), Ok(Setting::Time(Duration::ZERO)));
        assert!(read("trim.every", "0s").is_err());
    }

    #[test]
    fn bytes_are_whole_and_in_powers_of_1024() {
        let bytes = |text: &str| read("batch.max_bytes", text);
        for (text, expected) in [("1", 1), ("64KiB", 65_536), ("8 MiB", 8 << 20), ("1GiB", 1 << 30), ("7B", 7)] {
            assert_eq!(bytes(text), Ok(Setting::Number(expected)), "{text}");
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
            assert!(bytes(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_misspelt_level_is_not_read_as_a_module() {
        let level = |text: &str| read("log.level", text);
        for good in ["info", "WARN", "off", "info,tidegate::flow=debug", "warn,sqlx=off"] {
            assert!(level(good).is_ok(), "{good}: {:?}", level(good).err());
        }
        assert!(level("inof").expect_err("refused").contains("did you mean info?"));
        for bad in ["", "info,sqlx", "tidegate=loud", "info,,", "warn, info", "ïnfo"] {
            assert!(level(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn names_of_sources_tables_and_streams_are_checked() {
        assert!(read("valkey.source", "eu-west-1").is_ok());
        assert!(read("valkey.source", "1eu").is_err());
        assert!(read("pipelines.x.table", "app.totals").is_ok());
        assert!(read("pipelines.x.table", "app.totals; drop table x").is_err());
        assert!(read("pipelines.x.stream", "flush:{x}").is_ok());
        assert!(read("pipelines.x.stream", "").is_err());
        assert!(read("pipelines.x.stream", "a\nb").is_err());
        assert!(read("pipelines.x.key_column", "").is_err());
        assert_eq!(read("pipelines.x.updated_at_column", ""), Ok(Setting::Nothing));
        assert!(read("pipelines.x.write", "inser").expect_err("refused").contains("did you mean insert?"));
        assert!(read("pipelines.x.keys", "id: uid").expect_err("refused").starts_with("\"uid\" is no type of a field"));
        assert!(read("pipelines.x.values", "v = sum(x").expect_err("refused").starts_with("lacks a )"));
    }

    #[test]
    fn a_token_is_long_enough_fits_into_a_header_and_is_never_quoted() {
        let token = |text: &str| read("admin.token", text);
        assert!(token("0123456789abcdef").is_ok());
        assert_eq!(token(""), Ok(Setting::Nothing));
        for bad in ["hunter2", "hunter2 hunter2 hunter2", "hunter2-hunter2-h\u{fc}nter2", &"hunter2".repeat(99)] {
            let sentence = token(bad).expect_err("refused");
            assert!(!sentence.contains("hunter2") && sentence.contains("openssl rand -hex 32"), "{sentence}");
        }
        let kind = &find("admin.token").expect("a key").kind;
        assert_eq!(kind.show(&Setting::Text("valkey://hunter2/hunter2".into())), "***");
    }

    #[test]
    fn a_path_is_not_a_url() {
        for url in ["valkey://u:hunter2@h", "file:///run/secrets/url"] {
            let sentence = read("valkey.url_file", url).expect_err("refused");
            assert!(sentence.starts_with("is a url; write the path of a file"), "{sentence}");
        }
    }

    #[test]
    fn a_url_in_the_wrong_place_keeps_its_secret() {
        let sentence = read("valkey.source", "valkey://u:hunter2@h").expect_err("refused");
        assert!(!sentence.contains("hunter2"), "{sentence}");
    }

    proptest! {
        #[test]
        fn no_text_makes_a_reader_panic(text in ".{0,40}") {
            for key in KEYS {
                let _ = key.kind.read(&text);
            }
        }
    }
}
