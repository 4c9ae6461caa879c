//! The configuration: one struct a section, every limit checked, every problem reported at once.
//!
//! Takes [`Sources`] (a TOML file, the environment, flags); gives a [`Loaded`] configuration in which each value is
//! within its limits and fits the others, and that knows where each value came from. Fails with all [`Problems`] there are,
//! each one sentence with its place and the next step. No value is rounded, converted or ignored.
//!
//! Layers, weakest first: defaults, the file, `VALKEY_URL` and `DATABASE_URL`, `TIDEGATE__SECTION__KEY` variables,
//! flags. Every value is checked where it is written, also one that a stronger layer overrides.
//!
//! `sections` declares every key; `kind` says what a key accepts; `layers` and `file` read the sources; `settings` is what
//! took effect; `servers`, `accept` and `pipelines` have the rules that are about more than one key.

mod accept;
mod file;
mod guess;
mod key;
mod kind;
mod layers;
mod pipelines;
mod problem;
mod sections;
mod servers;
mod setting;
mod settings;
mod units;
mod url;

#[cfg(test)]
mod chart;
#[cfg(test)]
mod docs;
#[cfg(test)]
mod tests;

use std::fmt;

use secrecy::ExposeSecret;

pub use self::accept::{ACCEPTABLE, LONGEST_ACCEPTED, NEVER_ACCEPTED, TOLD_BEFORE, Term, Until};
pub(crate) use self::kind::is_name as is_pipeline_name;
pub use self::layers::Sources;
use self::layers::{Given, defaults};
use self::pipelines::Named;
pub use self::pipelines::Rider;
use self::problem::Problem;
pub use self::problem::{ProblemKind, Problems};
pub use self::sections::*;
pub use self::servers::Needs;
use self::settings::Settings;
pub(crate) use self::url::hide;
use crate::model::pipeline::{Pipeline, Table};

/// The whole configuration. Its `Debug` shows no secret.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[valkey]`
    pub valkey: ValkeySection,
    /// `[postgres]`
    pub postgres: PostgresSection,
    /// `[run]`
    pub run: RunSection,
    /// `[batch]`
    pub batch: BatchSection,
    /// `[reclaim]`
    pub reclaim: ReclaimSection,
    /// `[exclusive]`
    pub exclusive: ExclusiveSection,
    /// `[trim]`
    pub trim: TrimSection,
    /// `[compact]`
    pub compact: CompactSection,
    /// `[dead_letters]`
    pub dead_letters: DeadLettersSection,
    /// `[stop]`
    pub stop: StopSection,
    /// `[log]`
    pub log: LogSection,
    /// `[admin]`
    pub admin: AdminSection,
    /// `[telemetry]`
    pub telemetry: TelemetrySection,
    /// `[managed]`
    pub managed: ManagedSection,
    /// `[cache]`
    pub cache: CacheSection,
    /// `[[doctor.accept]]`; no two of the same finding.
    pub accepted: Vec<Acceptance>,
    /// `[pipelines.<name>]`, by name; no two with the same stream and table.
    pub pipelines: Vec<Pipeline>,
    /// The sections among them that go with another one, by name.
    pub riders: Vec<Rider>,
}

impl Config {
    /// None if a value was refused or is missing.
    fn of(settings: &Settings, pipelines: &Named, acceptances: &Named) -> Option<Config> {
        Some(Config {
            valkey: settings.section()?,
            postgres: settings.section()?,
            run: settings.section()?,
            batch: settings.section()?,
            reclaim: settings.section()?,
            exclusive: settings.section()?,
            trim: settings.section()?,
            compact: settings.section()?,
            dead_letters: settings.section()?,
            stop: settings.section()?,
            log: settings.section()?,
            admin: settings.section()?,
            telemetry: settings.section()?,
            managed: settings.section()?,
            cache: settings.section()?,
            accepted: accept::build_all(settings, acceptances)?,
            pipelines: pipelines::build_all(settings, pipelines)?,
            riders: pipelines::riders(settings, pipelines)?,
        })
    }

    /// The section that names a table of a pipeline: its own, or that of one that goes with it.
    pub fn section_of<'a>(&'a self, pipeline: &'a str, table: &Table) -> &'a str {
        let rider = self.riders.iter().find(|rider| rider.lead == pipeline && rider.table == *table);
        rider.map_or(pipeline, |rider| &rider.name)
    }
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

impl Loaded {
    /// What is different in another configuration, secrets hidden.
    pub fn changes(&self, after: &Loaded) -> Vec<Change> {
        let find = |rows: &[Row], key: &str| rows.iter().find(|row| row.key == key).map(|row| row.value.clone());
        let keys = self.rows.iter().chain(after.rows.iter().filter(|row| find(&self.rows, &row.key).is_none()));
        let secrets = |config: &Config, key: &str| match key {
            "valkey.url" => config.valkey.url.as_ref().map(|url| url.expose_secret().to_owned()),
            "admin.token" => config.admin.token.as_ref().map(|token| token.expose_secret().to_owned()),
            "postgres.url" => config.postgres.url.as_ref().map(|url| url.expose_secret().to_owned()),
            _ => None,
        };
        keys.filter_map(|Row { key, .. }| {
            let (before, now) = (find(&self.rows, key), find(&after.rows, key));
            let is_secret_changed = secrets(&self.config, key) != secrets(&after.config, key);
            let key = key.clone();
            (before != now || is_secret_changed).then_some(Change { key, before, after: now })
        })
        .collect()
    }
}

/// A key whose value is another one now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its full path.
    pub key: String,
    /// Its value before, a secret hidden; none if there was no such key.
    pub before: Option<String>,
    /// Its value now, a secret hidden; none if there is no such key.
    pub after: Option<String>,
}

impl Change {
    /// Whether it takes effect only when the process is started again.
    pub fn needs_restart(&self) -> bool {
        self.key == "log.format" || self.key.starts_with("telemetry.")
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { key, before, after } = self;
        match (before, after) {
            (Some(before), Some(after)) if before == after => write!(f, "{key}: another secret in {after}"),
            (Some(before), Some(after)) => write!(f, "{key}: {before} -> {after}"),
            (None, Some(after)) => write!(f, "{key}: {after}, new"),
            (Some(before), None) => write!(f, "{key}: removed, was {before}"),
            (None, None) => f.write_str(key),
        }
    }
}

/// One key as it took effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its full path.
    pub key: String,
    /// Its value, secrets hidden.
    pub value: String,
    /// Where it is written: `default`, `path:line`, `env NAME`, `flag`, or `file PATH` for a url in a file of its own.
    pub origin: String,
    /// What the value counts.
    pub unit: &'static str,
    /// Why the key exists.
    pub reason: &'static str,
}

/// Reads, merges and checks. Fails with every problem that can be found.
pub fn load(sources: &Sources, needs: Needs) -> Result<Loaded, Problems> {
    let Given { layers, mut pipelines, acceptances, mut problems, complete } = Given::read(sources);
    if pipelines.is_empty() {
        pipelines.insert("counters".into(), "default".into());
    }
    let mut builder = config::Config::builder().add_source(defaults(&pipelines));
    for layer in layers {
        builder = builder.add_source(layer);
    }
    let mut settings = match builder.build().and_then(|merged| Settings::of(&merged, &pipelines, &acceptances)) {
        Ok(settings) => settings,
        Err(error) => {
            problems.push(Problem::invalid(Problem::NOWHERE, format!("cannot be merged ({error})")));
            return Err(Problems(problems));
        }
    };
    pipelines::settle(&mut settings, &pipelines);
    // If a file was not read to its end, a key may seem to be missing, or not to fit, only because it was not seen.
    if complete {
        problems.extend(servers::settle_secrets(&mut settings, needs));
        problems.extend(settings.check_relations());
        problems.extend(pipelines::check(&settings, &pipelines));
        problems.extend(accept::check(&settings, &acceptances));
    }
    match Config::of(&settings, &pipelines, &acceptances) {
        Some(config) if problems.is_empty() => Ok(Loaded { config, rows: settings.rows() }),
        _ => {
            assert!(!problems.is_empty(), "a configuration without a problem can be built");
            Err(Problems(problems))
        }
    }
}
