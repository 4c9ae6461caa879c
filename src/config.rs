//! The configuration: one struct for each component, every limit checked, every fault reported at once.
//!
//! Takes [`Sources`] (a TOML file, the environment, flags); gives a [`Loaded`] configuration in which each value is
//! within its limits and fits the others, and that knows where each value came from. Fails with all [`Faults`] there are,
//! each one sentence with its place and the next step; nothing is rounded, converted or ignored on the way.
//!
//! Layers, weakest first: defaults, the file, `VALKEY_URL` and `DATABASE_URL`, `TIDEGATE__SECTION__KEY` variables,
//! flags. Every text is checked where it was written, also one that a stronger layer outranks.

mod address;
mod keys;
mod layers;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use config::{ConfigError, Source, Value, ValueKind};
use secrecy::SecretString;

pub use self::address::hide;
use self::keys::{KEYS, Key, RELATIONS, Setting};
use self::layers::Given;
pub use self::layers::Sources;
use crate::client::{OP_FIELD, TRACEPARENT_FIELD};
use crate::merge::Merge;
use crate::model::pipeline::{Identifier, Pipeline, Table};
use crate::{postgres, valkey};

/// The whole configuration. Its `Debug` shows no secret.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the streams are.
    pub valkey: Valkey,
    /// Where the tables are.
    pub postgres: Postgres,
    /// The process.
    pub run: Run,
    /// What one transaction flushes.
    pub batch: Batch,
    /// What becomes of the entries of the dead.
    pub reclaim: Reclaim,
    /// When settled entries leave the stream.
    pub trim: Trim,
    /// When ledger rows are merged.
    pub compact: Compact,
    /// How long a stop may take.
    pub stop: Stop,
    /// What is logged, and how.
    pub log: Log,
    /// Which stream feeds which table, by name; no two with the same stream and table.
    pub pipelines: Vec<Pipeline>,
}

/// `[valkey]`
#[derive(Debug, Clone)]
pub struct Valkey {
    /// Where the streams are, if anybody said; [`Needs`] makes sure of it.
    pub url: Option<SecretString>,
    /// Names the deployment in the ledger.
    pub source: String,
    /// The limit for opening a connection.
    pub connect_timeout: Duration,
    /// The limit for one command; for a blocking one, on top of what it blocks.
    pub command_timeout: Duration,
}

/// `[postgres]`
#[derive(Debug, Clone)]
pub struct Postgres {
    /// Where the tables are, if anybody said; [`Needs`] makes sure of it.
    pub url: Option<SecretString>,
    /// How many connections a process opens at the most.
    pub connections: usize,
    /// The limit for opening a connection.
    pub connect_timeout: Duration,
    /// The server's limit for one statement.
    pub statement_timeout: Duration,
    /// The server's limit for one wait for a lock.
    pub lock_timeout: Duration,
    /// After this the server ends a transaction whose client is silent.
    pub idle_in_transaction_timeout: Duration,
}

/// `[run]`
#[derive(Debug, Clone)]
pub struct Run {
    /// How many workers each pipeline has.
    pub workers: usize,
}

/// `[batch]`
#[derive(Debug, Clone)]
pub struct Batch {
    /// The most entries that one transaction flushes.
    pub max_entries: usize,
    /// The most bytes that one batch holds.
    pub max_bytes: usize,
    /// Entries asked for in one read, at most `max_entries`.
    pub read_count: usize,
    /// A larger entry is dead-lettered. At most `max_bytes`.
    pub max_entry_bytes: usize,
}

/// `[reclaim]`
#[derive(Debug, Clone)]
pub struct Reclaim {
    /// A consumer silent for this long is taken for dead. Longer than any flush may take.
    pub dead_after: Duration,
    /// How often the dead are looked for, at most `dead_after`.
    pub sweep_every: Duration,
    /// An entry that killed this many processes is buried.
    pub max_deliveries: u64,
}

/// `[trim]`
#[derive(Debug, Clone)]
pub struct Trim {
    /// How long settled entries stay in the stream; zero means not at all.
    pub retention: Duration,
    /// How often settled entries are cut off.
    pub every: Duration,
}

/// `[compact]`
#[derive(Debug, Clone)]
pub struct Compact {
    /// Younger ledger rows are never merged. At least `reclaim.dead_after`.
    pub margin: Duration,
    /// How often old ledger rows are merged.
    pub every: Duration,
}

/// `[stop]`
#[derive(Debug, Clone)]
pub struct Stop {
    /// How long a stop may settle what is held. Longer than a statement may take.
    pub grace: Duration,
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct Log {
    /// For whom the lines are.
    pub format: LogFormat,
    /// A filter that `tracing_subscriber::EnvFilter` has accepted.
    pub level: String,
}

/// For whom log lines are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

impl Valkey {
    /// Where Valkey is; the fault, if nobody said.
    pub fn address(&self) -> Result<valkey::Endpoint, Faults> {
        let url = self.url.clone().ok_or_else(|| Faults(vec![missing_url("valkey")]))?;
        Ok(valkey::Endpoint { url, connect_timeout: self.connect_timeout, command_timeout: self.command_timeout })
    }
}

impl Postgres {
    /// Where PostgreSQL is; the fault, if nobody said.
    pub fn address(&self) -> Result<postgres::Endpoint, Faults> {
        Ok(postgres::Endpoint {
            url: self.url.clone().ok_or_else(|| Faults(vec![missing_url("postgres")]))?,
            connect_timeout: self.connect_timeout,
            statement_timeout: self.statement_timeout,
            lock_timeout: self.lock_timeout,
            idle_in_transaction_timeout: self.idle_in_transaction_timeout,
        })
    }
}

/// Which servers a verb talks to: without their urls it cannot start. The file of a url that is not needed is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Whether `valkey.url` must be there.
    pub valkey: bool,
    /// Whether `postgres.url` must be there.
    pub postgres: bool,
}

impl Needs {
    /// As `run` and `check` need them.
    pub const BOTH: Needs = Needs { valkey: true, postgres: true };
    /// No server at all.
    pub const NONE: Needs = Needs { valkey: false, postgres: false };
    /// As `migrate` needs it.
    pub const POSTGRES: Needs = Needs { valkey: false, postgres: true };
    /// Valkey alone.
    pub const VALKEY: Needs = Needs { valkey: true, postgres: false };
}

/// A valid configuration that knows where its values came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    rows: Vec<Row>,
}

impl Loaded {
    /// Every key, in the order of the documentation, pipelines last. Secrets are hidden.
    pub fn describe(&self) -> &[Row] {
        &self.rows
    }
}

/// One key as it took effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its full path.
    pub key: String,
    /// Its value, secrets hidden.
    pub value: String,
    /// Where it was written: `default`, `path:line`, `env NAME`, `flag`, or `file PATH` for a url in a file of its own.
    pub origin: String,
    /// What the value counts.
    pub unit: &'static str,
    /// Why there is such a key.
    pub reason: &'static str,
}

/// Everything that is wrong with a configuration, one sentence each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

/// One thing that is wrong, where, and what to do. It never quotes a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    place: String,
    sentence: String,
}

impl Faults {
    /// The faults, in the order of the layers.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }
}

impl Fault {
    /// Where to look: `path:line`, `env NAME`, `flag`, or `configuration` for what nobody wrote.
    pub fn place(&self) -> &str {
        &self.place
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.sentence)
    }
}

impl std::error::Error for Faults {}

/// Reads, merges and checks. Either everything holds or every fault is told.
pub fn load(sources: &Sources, needs: Needs) -> Result<Loaded, Faults> {
    let Given { layers, pipelines: mut names, mut faults, complete } = Given::read(sources);
    if names.is_empty() {
        names.insert("counters".into(), "default".into());
    }
    let mut builder = config::Config::builder().add_source(layers::defaults(&names));
    for layer in layers {
        builder = builder.add_source(layer);
    }
    let mut settings = match builder.build().and_then(|merged| Settings::from_merged(&merged, &names)) {
        Ok(settings) => settings,
        Err(error) => {
            faults.push(Fault { place: "configuration".into(), sentence: format!("cannot be merged ({error})") });
            return Err(Faults(faults));
        }
    };
    // With a file half read, anything might seem to be missing or not to fit.
    if complete {
        for (section, needed) in [("valkey", needs.valkey), ("postgres", needs.postgres)] {
            faults.extend(settings.settle_url(section, needed));
        }
        faults.extend(settings.broken_relations());
        faults.extend(settings.pipeline_faults(&names));
    }
    match settings.config(&names) {
        Some(config) if faults.is_empty() => Ok(Loaded { config, rows: settings.rows() }),
        _ => {
            assert!(!faults.is_empty(), "a configuration without a fault can be built");
            Err(Faults(faults))
        }
    }
}

/// The pipelines, each with the place that first named it.
type Names = BTreeMap<String, String>;

/// The winners: each key with its value and where that was written.
struct Settings(Vec<Effective>);

struct Effective {
    path: String,
    key: &'static Key,
    /// None if it was refused, which has been reported, or is missing.
    setting: Option<Setting>,
    /// None if nobody said anything and there is no default.
    origin: Option<String>,
}

impl Effective {
    fn shown(&self, setting: &Setting) -> String {
        let origin = self.origin.as_deref().unwrap_or("default");
        format!("{} ({}, {origin})", self.path, self.key.show(setting))
    }
}

impl Settings {
    fn from_merged(merged: &config::Config, names: &Names) -> Result<Settings, ConfigError> {
        let root = Value::new(None, ValueKind::Table(merged.collect()?));
        let effective = |path: String, key: &'static Key| {
            let value = find(&root, &path);
            let text = value.and_then(|value| match &value.kind {
                ValueKind::String(text) => Some(text),
                _ => None,
            });
            Effective {
                setting: text.and_then(|text| key.read(text).ok()),
                origin: value.and_then(|value| value.origin().map(str::to_owned)),
                path,
                key,
            }
        };
        let (of_pipelines, single): (Vec<&'static Key>, Vec<_>) =
            KEYS.iter().partition(|key| key.name.contains("<name>"));
        let mut all: Vec<_> = single.into_iter().map(|key| effective(key.name.into(), key)).collect();
        for name in names.keys() {
            all.extend(of_pipelines.iter().map(|key| effective(key.name.replace("<name>", name), key)));
        }
        Ok(Settings(all))
    }

    fn effective(&self, path: &str) -> Option<&Effective> {
        self.0.iter().find(|effective| effective.path == path)
    }

    fn setting(&self, path: &str) -> Option<&Setting> {
        self.effective(path)?.setting.as_ref()
    }

    fn duration(&self, path: &str) -> Option<Duration> {
        match self.setting(path)? {
            Setting::Duration(time) => Some(*time),
            _ => None,
        }
    }

    fn number<T: TryFrom<u64>>(&self, path: &str) -> Option<T> {
        match self.setting(path)? {
            Setting::Number(number) => T::try_from(*number).ok(),
            _ => None,
        }
    }

    fn text(&self, path: &str) -> Option<&str> {
        match self.setting(path)? {
            Setting::Text(text) => Some(text),
            _ => None,
        }
    }

    fn secret(&self, path: &str) -> Option<SecretString> {
        self.text(path).map(SecretString::from)
    }

    /// Where somebody wrote one of these; the stronger evidence first.
    fn place_of(&self, paths: &[&str]) -> String {
        let mut origins = paths.iter().filter_map(|path| self.effective(path)?.origin.clone());
        origins.find(|origin| origin != "default").unwrap_or_else(|| "configuration".into())
    }

    /// Takes a url from its file, if it has one, and sees to it that a needed one is there.
    fn settle_url(&mut self, section: &str, needed: bool) -> Option<Fault> {
        let (url, url_file) = (format!("{section}.url"), format!("{section}.url_file"));
        let origin = |settings: &Settings, path: &str| settings.effective(path).and_then(|e| e.origin.clone());
        // A refused url or path has been reported, and is not missing.
        let (direct, file) = (self.setting(&url)?.clone(), self.setting(&url_file)?.clone());
        match (direct, file) {
            (Setting::Text(_), Setting::Text(_)) => {
                let (here, there) = (origin(self, &url)?, origin(self, &url_file)?);
                let sentence = format!("{url} ({here}) and {url_file} ({there}) are both set; remove one of them");
                Some(Fault { place: self.place_of(&[&url_file]), sentence })
            }
            (Setting::Nothing, Setting::Text(path)) if needed => {
                let (place, key) = (self.place_of(&[&url_file]), self.effective(&url)?.key);
                let read = read_url(key, Path::new(&path));
                let effective = self.0.iter_mut().find(|effective| effective.path == url)?;
                effective.origin = Some(format!("file {}", shown_path(&path)));
                effective.setting = read.as_ref().ok().cloned();
                let sentence = read.err()?;
                Some(Fault { place, sentence: format!("{url_file} {sentence}") })
            }
            (Setting::Nothing, Setting::Nothing) if needed => Some(missing_url(section)),
            _ => None,
        }
    }

    fn broken_relations(&self) -> Vec<Fault> {
        let broken = RELATIONS.iter().filter_map(|relation| {
            let (lesser, greater) = (self.effective(relation.lesser)?, self.effective(relation.greater)?);
            let (small, large) = (lesser.setting.as_ref()?, greater.setting.as_ref()?);
            let (small_size, large_size) = (small.size()?, large.size()?);
            let holds = small_size < large_size || relation.may_be_equal && small_size == large_size;
            let must = if relation.may_be_equal { "at most" } else { "less than" };
            (!holds).then(|| Fault {
                place: self.place_of(&[relation.lesser, relation.greater]),
                sentence: format!(
                    "{} must be {must} {}: {}; lower the first or raise the second",
                    lesser.shown(small),
                    greater.shown(large),
                    relation.reason,
                ),
            })
        });
        broken.collect()
    }

    fn pipeline_faults(&self, names: &Names) -> Vec<Fault> {
        let fault =
            |name: &str, sentence: String| Fault { place: names.get(name).cloned().unwrap_or_default(), sentence };
        let mut faults = Vec::new();
        for missing in self.0.iter().filter(|effective| effective.origin.is_none()) {
            // Only `stream` and `table` can be missing, and only from a pipeline that somebody named.
            let name = missing.path.split('.').nth(1).unwrap_or_default();
            let others = names.keys().map(String::as_str).chain(["counters"]).filter(|other| *other != name);
            let hint = keys::nearest(name, others.map(str::to_owned));
            let hint = hint.map(|meant| format!("; or did you mean the pipeline {meant}?")).unwrap_or_default();
            faults.push(fault(name, format!("{} is missing; {}{hint}", missing.path, missing.key.advice())));
        }
        let pipelines: Vec<Pipeline> = names.keys().filter_map(|name| self.pipeline(name)).collect();
        for (index, pipeline) in pipelines.iter().enumerate() {
            let Pipeline { name, stream, table, key, value, updated_at, .. } = pipeline;
            if let Some(twin) = pipelines[..index].iter().find(|p| (&p.stream, &p.table) == (stream, table)) {
                let both = format!("pipelines {} and {name} both feed {table} from {stream}", twin.name);
                let next = "every delta would count twice; remove one or change its stream or table";
                faults.push(fault(name, format!("{both}: {next}")));
            }
            let fields = [&pipeline.key_field, &pipeline.value_field];
            let taken = fields.iter().find(|field| [OP_FIELD, TRACEPARENT_FIELD].contains(&field.as_str()));
            if let Some(field) = taken {
                let next = "name other fields as key_field and value_field";
                faults
                    .push(fault(name, format!("pipeline {name} uses the field {field}, which producers fill; {next}")));
            } else if fields[0] == fields[1] {
                let next = "name two different ones as key_field and value_field";
                faults.push(fault(name, format!("pipeline {name} uses one field twice; {next}")));
            }
            if key == value || updated_at.as_ref().is_some_and(|column| column == key || column == value) {
                let next = "name three different ones as key_column, value_column and updated_at_column";
                faults.push(fault(name, format!("pipeline {name} uses one column twice; {next}")));
            }
        }
        faults
    }

    fn pipeline(&self, name: &str) -> Option<Pipeline> {
        let path = |leaf: &str| format!("pipelines.{name}.{leaf}");
        let text = |leaf: &str| self.text(&path(leaf));
        let column = |leaf: &str| Identifier::parse(text(leaf)?).ok();
        Some(Pipeline {
            name: name.into(),
            stream: text("stream")?.into(),
            table: Table::parse(text("table")?).ok()?,
            key: column("key_column")?,
            value: column("value_column")?,
            updated_at: match self.setting(&path("updated_at_column"))? {
                Setting::Nothing => None,
                _ => Some(column("updated_at_column")?),
            },
            key_field: text("key_field")?.into(),
            value_field: text("value_field")?.into(),
            merge: match text("merge")? {
                "sum" => Merge::Sum,
                _ => return None,
            },
        })
    }

    /// The configuration, unless a value it needs was refused.
    fn config(&self, names: &Names) -> Option<Config> {
        Some(Config {
            valkey: Valkey {
                url: self.secret("valkey.url"),
                source: self.text("valkey.source")?.into(),
                connect_timeout: self.duration("valkey.connect_timeout")?,
                command_timeout: self.duration("valkey.command_timeout")?,
            },
            postgres: Postgres {
                url: self.secret("postgres.url"),
                connections: self.number("postgres.connections")?,
                connect_timeout: self.duration("postgres.connect_timeout")?,
                statement_timeout: self.duration("postgres.statement_timeout")?,
                lock_timeout: self.duration("postgres.lock_timeout")?,
                idle_in_transaction_timeout: self.duration("postgres.idle_in_transaction_timeout")?,
            },
            run: Run { workers: self.number("run.workers")? },
            batch: Batch {
                max_entries: self.number("batch.max_entries")?,
                max_bytes: self.number("batch.max_bytes")?,
                read_count: self.number("batch.read_count")?,
                max_entry_bytes: self.number("batch.max_entry_bytes")?,
            },
            reclaim: Reclaim {
                dead_after: self.duration("reclaim.dead_after")?,
                sweep_every: self.duration("reclaim.sweep_every")?,
                max_deliveries: self.number("reclaim.max_deliveries")?,
            },
            trim: Trim { retention: self.duration("trim.retention")?, every: self.duration("trim.every")? },
            compact: Compact { margin: self.duration("compact.margin")?, every: self.duration("compact.every")? },
            stop: Stop { grace: self.duration("stop.grace")? },
            log: Log {
                format: match self.text("log.format")? {
                    "json" => LogFormat::Json,
                    _ => LogFormat::Text,
                },
                level: self.text("log.level")?.into(),
            },
            pipelines: names.keys().map(|name| self.pipeline(name)).collect::<Option<_>>()?,
        })
    }

    fn rows(&self) -> Vec<Row> {
        let row = |effective: &Effective| {
            Some(Row {
                key: effective.path.clone(),
                value: effective.key.show(effective.setting.as_ref()?),
                origin: effective.origin.clone()?,
                unit: effective.key.unit,
                reason: effective.key.reason,
            })
        };
        self.0.iter().filter_map(row).collect()
    }
}

fn find<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(root, |value, part| match &value.kind {
        ValueKind::Table(table) => table.get(part),
        _ => None,
    })
}

/// Reads a url from its file. The error ends a sentence that begins with the key of the path.
fn read_url(key: &Key, path: &Path) -> Result<Setting, String> {
    let shown = shown_path(&path.to_string_lossy());
    let text = layers::read_file(path)
        .map_err(|e| format!("names {shown}, which cannot be read ({e}); name a readable file"))?;
    match text.trim() {
        "" => Err(format!("names {shown}, which is empty; write the url into it")),
        text => key.read(text).map_err(|sentence| format!("names {shown}, whose url {sentence}")),
    }
}

/// A path as it may be shown: somebody may have put the url itself there.
fn shown_path(path: &str) -> String {
    if path.contains("://") { hide(path) } else { path.into() }
}

fn missing_url(section: &str) -> Fault {
    let (variable, example) = match section {
        "valkey" => ("VALKEY_URL", "valkey://localhost:6379"),
        _ => ("DATABASE_URL", "postgres://user:password@localhost:5432/database"),
    };
    Fault {
        place: "configuration".into(),
        sentence: format!("{section}.url is missing; set {variable}, such as {example}, or {section}.url_file"),
    }
}

#[cfg(test)]
mod tests;
