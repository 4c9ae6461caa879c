//! The urls of the two servers and the admin port's token, each from its key or from a file of its own.
//!
//! Takes the settings and what a verb needs; gives endpoints. Fails if a needed url is missing, if a secret is set twice, or if its
//! file cannot be read.

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
    /// Whether `admin.token` is read, if it is set.
    pub token: bool,
}

impl Needs {
    /// As `run` and `check` need them.
    pub const DAEMON: Needs = Needs { token: true, ..Needs::BOTH };
    /// Both servers.
    pub const BOTH: Needs = Needs { valkey: true, postgres: true, token: false };
    /// No server at all.
    pub const NONE: Needs = Needs { valkey: false, postgres: false, token: false };
    /// As `migrate` needs it.
    pub const POSTGRES: Needs = Needs { valkey: false, postgres: true, token: false };
    /// Valkey alone.
    pub const VALKEY: Needs = Needs { valkey: true, postgres: false, token: false };
}

impl ValkeySection {
    /// Where Valkey is. Fails if the url is not set.
    pub fn address(&self) -> Result<valkey::Endpoint, Problems> {
        let url = self.url.clone().ok_or_else(|| Problems(vec![missing("valkey.url")]))?;
        Ok(valkey::Endpoint::new(url, self.connect_timeout, self.command_timeout))
    }
}

impl PostgresSection {
    /// Where PostgreSQL is. Fails if the url is not set.
    pub fn address(&self) -> Result<postgres::Endpoint, Problems> {
        Ok(postgres::Endpoint {
            url: self.url.clone().ok_or_else(|| Problems(vec![missing("postgres.url")]))?,
            connect_timeout: self.connect_timeout,
            statement_timeout: self.statement_timeout,
            lock_timeout: self.lock_timeout,
            idle_in_transaction_timeout: self.idle_in_transaction_timeout,
        })
    }
}

/// Reads each needed secret from its file, if it has one. Gives a problem for one that is set twice, not valid, or missing where it
/// must be set.
pub(super) fn settle_secrets(settings: &mut Settings, needs: Needs) -> Vec<Problem> {
    let secrets = [("valkey.url", needs.valkey), ("postgres.url", needs.postgres), ("admin.token", needs.token)];
    let problems = secrets.into_iter().filter_map(|(secret, needed)| settle(settings, secret, needed));
    let mut problems: Vec<Problem> = problems.collect();
    // A console that nobody could read is a mistake.
    let is_locked =
        settings.get("admin.console").is_some_and(|console| console.setting == Some(Setting::Text("locked".into())));
    let has_none = settings.get("admin.token").is_some_and(|token| token.setting == Some(Setting::Nothing));
    if needs.token && is_locked && has_none {
        let sentence = "admin.console is locked, and there is no admin.token to open it with; set admin.token_file";
        problems.push(Problem::invalid(settings.place_of(&["admin.console"]), sentence));
    }
    problems
}

fn settle(settings: &mut Settings, secret: &'static str, needed: bool) -> Option<Problem> {
    let secret_file = format!("{secret}_file");
    // A value or a path that was refused has been reported, and is not missing.
    let (direct, file) = (settings.get(secret)?.setting.clone()?, settings.get(&secret_file)?.setting.clone()?);
    match (direct, file) {
        (Setting::Text(_), Setting::Text(_)) => {
            let (here, there) = (settings.place_of(&[secret]), settings.place_of(&[&secret_file]));
            let sentence = format!("{secret} ({here}) and {secret_file} ({there}) are both set; remove one of them");
            Some(Problem::invalid(there, sentence))
        }
        (Setting::Nothing, Setting::Text(path)) if needed => {
            let place = settings.place_of(&[&secret_file]);
            let effective = settings.get_mut(secret)?;
            let read = read_secret(effective.key, Path::new(&path));
            effective.origin = Some(format!("file {path}"));
            effective.setting = read.as_ref().ok().cloned();
            let NotRead { kind, why } = read.err()?;
            Some(Problem::new(kind, place, format!("{secret_file} is {path:?}, {why}")))
        }
        (Setting::Nothing, Setting::Nothing) if needed && secret != "admin.token" => Some(missing(secret)),
        _ => None,
    }
}

/// Reads a secret from its file. The error ends a sentence that names the file.
fn read_secret(key: &Key, path: &Path) -> Result<Setting, NotRead> {
    let what = key.name.rsplit('.').next().unwrap_or(key.name);
    let text = read_file(path).map_err(|error| NotRead {
        why: format!("which cannot be read ({}); name a readable file", error.why),
        ..error
    })?;
    let invalid = |why: String| NotRead { kind: ProblemKind::Invalid, why };
    match text.trim() {
        "" => Err(invalid(format!("which is empty; write the {what} into it"))),
        text => key.kind.read(text).map_err(|sentence| invalid(format!("whose {what} {sentence}"))),
    }
}

fn missing(url: &str) -> Problem {
    let (variable, example) = match url {
        "valkey.url" => ("VALKEY_URL", "valkey://localhost:6379"),
        _ => ("DATABASE_URL", "postgres://user:password@localhost:5432/database"),
    };
    let sentence = format!("{url} is missing; set {variable}, such as {example}, or {url}_file");
    Problem::invalid(Problem::NOWHERE, sentence)
}
