//! The urls of the two servers, each from its key or from a file of its own.
//!
//! Takes the settings and what a verb needs; gives endpoints. Fails if a needed url is missing, set twice, or if its file
//! cannot be read.

use std::path::Path;

use super::file::{NotRead, read_file};
use super::key::Key;
use super::problem::{Problem, ProblemKind, Problems};
use super::sections::{PostgresSection, ValkeySection};
use super::setting::Setting;
use super::settings::Settings;
use crate::{postgres, valkey};

/// The servers that a verb talks to: it cannot start without their urls. The file of a url that is not needed is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Whether `valkey.url` must be set.
    pub valkey: bool,
    /// Whether `postgres.url` must be set.
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

impl ValkeySection {
    /// Where Valkey is. Fails if the url is not set.
    pub fn address(&self) -> Result<valkey::Endpoint, Problems> {
        let url = self.url.clone().ok_or_else(|| Problems(vec![missing("valkey")]))?;
        Ok(valkey::Endpoint::new(url, self.connect_timeout, self.command_timeout))
    }
}

impl PostgresSection {
    /// Where PostgreSQL is. Fails if the url is not set.
    pub fn address(&self) -> Result<postgres::Endpoint, Problems> {
        Ok(postgres::Endpoint {
            url: self.url.clone().ok_or_else(|| Problems(vec![missing("postgres")]))?,
            connect_timeout: self.connect_timeout,
            statement_timeout: self.statement_timeout,
            lock_timeout: self.lock_timeout,
            idle_in_transaction_timeout: self.idle_in_transaction_timeout,
        })
    }
}

/// Reads each needed url from its file, if it has one. Gives a problem for a url that is set twice, missing or not valid.
pub(super) fn settle_urls(settings: &mut Settings, needs: Needs) -> Vec<Problem> {
    let servers = [("valkey", needs.valkey), ("postgres", needs.postgres)];
    servers.into_iter().filter_map(|(section, needed)| settle_url(settings, section, needed)).collect()
}

fn settle_url(settings: &mut Settings, section: &str, needed: bool) -> Option<Problem> {
    let (url, url_file) = (format!("{section}.url"), format!("{section}.url_file"));
    // A url or a path that was refused has been reported, and is not missing.
    let (direct, file) = (settings.get(&url)?.setting.clone()?, settings.get(&url_file)?.setting.clone()?);
    match (direct, file) {
        (Setting::Text(_), Setting::Text(_)) => {
            let (here, there) = (settings.place_of(&[&url]), settings.place_of(&[&url_file]));
            let sentence = format!("{url} ({here}) and {url_file} ({there}) are both set; remove one of them");
            Some(Problem::invalid(there, sentence))
        }
        (Setting::Nothing, Setting::Text(path)) if needed => {
            let place = settings.place_of(&[&url_file]);
            let effective = settings.get_mut(&url)?;
            let read = read_url(effective.key, Path::new(&path));
            effective.origin = Some(format!("file {path}"));
            effective.setting = read.as_ref().ok().cloned();
            let NotRead { kind, why } = read.err()?;
            Some(Problem::new(kind, place, format!("{url_file} is {path:?}, {why}")))
        }
        (Setting::Nothing, Setting::Nothing) if needed => Some(missing(section)),
        _ => None,
    }
}

/// Reads a url from its file. The error ends a sentence that names the file.
fn read_url(key: &Key, path: &Path) -> Result<Setting, NotRead> {
    let text = read_file(path).map_err(|error| NotRead {
        why: format!("which cannot be read ({}); name a readable file", error.why),
        ..error
    })?;
    let invalid = |why: String| NotRead { kind: ProblemKind::Invalid, why };
    match text.trim() {
        "" => Err(invalid("which is empty; write the url into it".into())),
        text => key.kind.read(text).map_err(|sentence| invalid(format!("whose url {sentence}"))),
    }
}

fn missing(section: &str) -> Problem {
    let (variable, example) = match section {
        "valkey" => ("VALKEY_URL", "valkey://localhost:6379"),
        _ => ("DATABASE_URL", "postgres://user:password@localhost:5432/database"),
    };
    let sentence = format!("{section}.url is missing; set {variable}, such as {example}, or {section}.url_file");
    Problem::invalid(Problem::NOWHERE, sentence)
}
