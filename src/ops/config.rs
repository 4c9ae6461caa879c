//! `tidegate config show`: the configuration as it took effect, secrets hidden, and with --origin where each value is written.

use serde::Serialize;

use super::columns::{Page, printable};
use super::complete::{Name, by};
use super::context::Report;
use super::{Context, Exit, Failure};
use crate::config::{Loaded, Needs, Row};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Action {
    /// Show every key with its value; secrets are hidden
    Show(ShowOpts),
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct ShowOpts {
    /// Where each value is written: a line of the file, a variable, a flag, or the default
    #[arg(long)]
    origin: bool,
    /// Only keys that are set somewhere
    #[arg(long)]
    changed: bool,
    /// Only keys that begin so, such as batch or pipelines.counters
    #[arg(value_name = "KEY", add = by(Name::Key))]
    keys: Vec<String>,
}

/// The configuration.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Settings {
    /// Every key, in the order of docs/configuration.md.
    pub settings: Vec<Setting>,
    #[serde(skip)]
    shows_origin: bool,
}

/// A key as it took effect.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Setting {
    /// Its full path.
    pub key: String,
    /// Its value; secrets are hidden.
    pub value: String,
    /// Where it is written: `default`, `path:line`, `env NAME`, `flag`, or `file PATH`.
    pub origin: String,
    /// What the value counts; empty where it counts nothing.
    pub unit: String,
    /// Why the key exists.
    pub reason: String,
}

/// Runs the verb.
pub fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let Action::Show(opts) = opts.action;
    let loaded = context.load(Vec::new(), Needs::NONE)?;
    let is_meant = |row: &Row| {
        let begins = |key: &String| row.key == *key || row.key.starts_with(&format!("{key}."));
        (opts.keys.is_empty() || opts.keys.iter().any(begins)) && (!opts.changed || row.origin != "default")
    };
    let settings = Settings { shows_origin: opts.origin, ..Settings::of(&loaded, is_meant) };
    if settings.settings.is_empty() && !opts.keys.is_empty() {
        return Err(Failure::usage(format!(
            "no key begins with {}: see docs/configuration.md",
            opts.keys.join(" or ")
        )));
    }
    context.print(&settings)?;
    Ok(Exit::Ok)
}

impl Settings {
    /// Those keys that are meant, secrets hidden.
    pub fn of(loaded: &Loaded, is_meant: impl Fn(&Row) -> bool) -> Settings {
        let setting = |row: &Row| Setting {
            key: row.key.clone(),
            value: row.value.clone(),
            origin: row.origin.clone(),
            unit: row.unit.to_owned(),
            reason: row.reason.to_owned(),
        };
        let settings = loaded.describe().iter().filter(|row| is_meant(row)).map(setting).collect();
        Settings { settings, shows_origin: true }
    }
}

impl Report for Settings {
    fn show(&self, page: &mut Page) {
        let row = |setting: &Setting| {
            let mut row = vec![setting.key.clone(), printable(&setting.value)];
            row.extend(self.shows_origin.then(|| printable(&setting.origin)));
            row
        };
        let rows: Vec<Vec<String>> = self.settings.iter().map(row).collect();
        page.table(if self.shows_origin { &["key", "value", "origin"] } else { &["key", "value"] }, &rows);
    }
}
