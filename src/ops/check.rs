//! `tidegate check`: checks the configuration without connecting to a server; with `--live` also the tables that are there.
//!
//! Takes the sources that `run` would take; writes one line, or every problem there is. With `--live` it asks PostgreSQL alone and writes everything
//! that does not fit, each with the statement that corrects it.

use std::io::{self, Write};

use jiff::Timestamp;
use serde::Serialize;

use super::columns::{Page, Tone};
use super::context::{Format, Report, not_written};
use super::{Context, Exit, Failure};
use crate::config::{Loaded, Needs, Sources, load};
use crate::postgres::Database;
use crate::service::in_term;
use crate::target::{self, Weight};

/// The verb's arguments.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Opts {
    /// Show every key with its value and where that is written; secrets are hidden
    #[arg(long)]
    pub print: bool,
    /// Compare the pipelines' tables in PostgreSQL with the configuration, too; no url of Valkey is needed for it
    #[arg(long)]
    pub live: bool,
}

/// A configuration that is valid, and the tables that were compared with it.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Checked {
    /// Whether every table fits: `tidegate run` would start.
    pub fits: bool,
    /// The tables, in the order of the configuration; empty without --live.
    pub tables: Vec<CheckedTable>,
}

/// A table of a pipeline.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CheckedTable {
    /// The pipeline that writes it.
    pub pipeline: String,
    /// The section that names it: the pipeline's own, or that of one that goes `with` it.
    pub section: String,
    /// The table.
    pub table: String,
    /// Whether it fits.
    pub fits: bool,
    /// What was found, the worst first.
    pub findings: Vec<CheckedFinding>,
}

/// Something about a table.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CheckedFinding {
    /// What it means.
    pub severity: Severity,
    /// What was seen, and what follows.
    pub evidence: String,
    /// The statements that correct it; null where the configuration is to be changed.
    pub fix: Option<String>,
}

/// What a finding means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// `tidegate run` does not start.
    Error,
    /// Rows may be refused or changed.
    Warning,
    /// It could be faster.
    Advice,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    if !opts.live && context.format == Format::Table {
        return answer(opts, &context.sources(Vec::new()), &mut io::stdout(), &mut io::stderr()).map_err(not_written);
    }
    let loaded = context.load(Vec::new(), if opts.live { Needs::POSTGRES } else { Needs::BOTH })?;
    in_term(&loaded.config.accepted, Timestamp::now()).map_err(|why| Failure::new(Exit::Config, why.to_string()))?;
    if opts.print && context.format == Format::Table {
        print(&loaded, &mut io::stdout()).map_err(not_written)?;
    }
    let mut tables = Vec::new();
    if opts.live {
        let config = &loaded.config;
        let database = Database::new(config.postgres.address()?, 1);
        for pipeline in &config.pipelines {
            let examined = database.run(async |c| target::examine(c, pipeline).await).await?;
            tables.extend(examined.into_iter().map(|examined| {
                let section = config.section_of(&pipeline.name, &examined.table).to_owned();
                CheckedTable::of(&pipeline.name, section, examined)
            }));
        }
        database.close().await;
    }
    let checked = Checked { fits: tables.iter().all(|table| table.fits), tables };
    context.print(&checked)?;
    Ok(if checked.fits { Exit::Ok } else { Exit::Config })
}

impl CheckedTable {
    /// Of an examined table.
    pub fn of(pipeline: &str, section: String, examined: target::Examined) -> CheckedTable {
        let finding = |finding: target::Finding| CheckedFinding {
            severity: match finding.weight {
                Weight::Refusal => Severity::Error,
                Weight::Warning => Severity::Warning,
                Weight::Advice => Severity::Advice,
            },
            evidence: finding.what,
            fix: finding.fix,
        };
        CheckedTable {
            pipeline: pipeline.into(),
            section,
            table: examined.table.to_string(),
            fits: examined.fit.is_some(),
            findings: examined.findings.into_iter().map(finding).collect(),
        }
    }
}

impl Report for Checked {
    fn show(&self, page: &mut Page) {
        match self.tables.iter().filter(|table| !table.fits).count() as u64 {
            0 => page.toned(Tone::Good, "the configuration is valid, and every table fits"),
            1 => page.toned(Tone::Bad, "the configuration is valid, and one table does not fit"),
            unfit => page.toned(Tone::Bad, format!("the configuration is valid, and {unfit} tables do not fit")),
        }
        for CheckedTable { pipeline, section, table, fits, findings } in &self.tables {
            let with = if section == pipeline { String::new() } else { format!(", with {pipeline}") };
            let verdict = if *fits { "fits" } else { "does not fit" };
            page.toned(Tone::Head, format!("{table} (pipeline {section}{with}): {verdict}"));
            for finding in findings {
                let (tone, word) = match finding.severity {
                    Severity::Error => (Tone::Bad, "error"),
                    Severity::Warning => (Tone::Warn, "warning"),
                    Severity::Advice => (Tone::Good, "advice"),
                };
                page.toned(tone, format!("  {word:<8} {}", finding.evidence));
                if let Some(fix) = &finding.fix {
                    page.line(format!("           {}", fix.replace('\n', "\n           ")));
                }
            }
        }
    }
}

/// The answer goes to `out`, problems go to `err`.
fn answer(opts: Opts, sources: &Sources, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<Exit> {
    match load(sources, Needs::DAEMON) {
        Ok(loaded) => {
            if opts.print {
                print(&loaded, out)?;
            }
            if let Err(why) = in_term(&loaded.config.accepted, Timestamp::now()) {
                writeln!(err, "{why}")?;
                return Ok(Exit::Config);
            }
            writeln!(out, "configuration is valid")?;
            Ok(Exit::Ok)
        }
        Err(problems) => {
            writeln!(err, "{problems}")?;
            Ok(Exit::from(&problems))
        }
    }
}

fn print(loaded: &Loaded, out: &mut dyn Write) -> io::Result<()> {
    let width = |texts: &mut dyn Iterator<Item = &String>| texts.map(|text| text.chars().count()).max().unwrap_or(0);
    let rows = loaded.describe();
    let keys = width(&mut rows.iter().map(|row| &row.key));
    let values = width(&mut rows.iter().map(|row| &row.value));
    for row in rows {
        writeln!(out, "{:keys$}  {:values$}  {}", row.key, row.value, row.origin)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(print: bool, file: Option<&std::path::Path>, env: &[(&str, &str)]) -> (Exit, String, String) {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = answer(
            Opts { print, live: false },
            &Sources { env, file: file.map(Into::into), ..Sources::default() },
            &mut out,
            &mut err,
        )
        .expect("a vector takes everything");
        (code, String::from_utf8(out).expect("text"), String::from_utf8(err).expect("text"))
    }

    const URLS: [(&str, &str); 2] =
        [("VALKEY_URL", "valkey://u:hunter2@cache:6379/0"), ("DATABASE_URL", "postgres://u:hunter2@db/app")];

    #[test]
    fn a_valid_configuration_is_confirmed_in_one_line() {
        assert_eq!(check(false, None, &URLS), (Exit::Ok, "configuration is valid\n".into(), String::new()));
    }

    #[test]
    fn every_problem_goes_to_stderr_and_the_exit_code_is_78() {
        let (code, out, err) = check(false, None, &[("TIDEGATE__RUN__WORKERS", "0")]);
        assert_eq!((code, out.as_str()), (Exit::Config, ""));
        assert_eq!(err.lines().count(), 3, "{err}");
        for needed in
            ["run.workers", "valkey.url is missing; set VALKEY_URL", "postgres.url is missing; set DATABASE_URL"]
        {
            assert!(err.contains(needed), "{err}");
        }
    }

    #[test]
    fn what_is_accepted_no_longer_or_for_too_long_is_told_before_the_daemon_refuses_it() {
        let accepting = |until: &str| {
            let keys = [("FINDING", "D1"), ("UNTIL", until), ("REASON", "staging")];
            let env: Vec<(String, &str)> =
                keys.iter().map(|(key, value)| (format!("TIDEGATE__DOCTOR__ACCEPT__1__{key}"), *value)).collect();
            let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (key.as_str(), *value)).chain(URLS).collect();
            check(false, None, &env)
        };
        let (code, out, err) = accepting("2026-01-01");
        assert_eq!((code, out.as_str()), (Exit::Config, ""));
        assert!(err.contains("accepted until 2026-01-01 (staging), and that is over"), "{err}");
        assert!(accepting("9000-01-01").2.contains("more than 90 days ahead"));
        let tomorrow = Timestamp::now() + std::time::Duration::from_secs(86_400);
        assert_eq!(accepting(&tomorrow.to_string()), (Exit::Ok, "configuration is valid\n".into(), String::new()));
    }

    #[test]
    fn a_file_that_cannot_be_read_has_an_exit_code_of_its_own() {
        let directory = tempfile::TempDir::new().expect("a directory");
        for unreadable in [directory.path().join("missing.toml"), directory.path().to_owned()] {
            let (code, out, err) = check(false, Some(&unreadable), &[("TIDEGATE__RUN__WORKERS", "0")]);
            assert_eq!((code, out.as_str()), (Exit::NoInput, ""));
            assert!(err.starts_with(&format!("{}: cannot be read (", unreadable.display())), "{err}");
            assert!(err.contains("run.workers is 0"), "{err}");
        }
        let missing = directory.path().join("secret").display().to_string();
        let urls = [("DATABASE_URL", "postgres://db/app"), ("TIDEGATE__VALKEY__URL_FILE", &missing)];
        let (code, _, err) = check(false, None, &urls);
        assert_eq!(code, Exit::NoInput);
        assert!(err.contains(&format!("valkey.url_file is {missing:?}, which cannot be read (")), "{err}");
    }

    #[test]
    fn a_file_that_was_read_and_is_not_valid_ends_with_78() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for content in [b"[batch".as_slice(), b"\xff\xfe", &[b'#'; (1 << 20) + 1]] {
            std::fs::write(file.path(), content).expect("written");
            assert_eq!(check(false, Some(file.path()), &URLS).0, Exit::Config);
        }
    }

    #[test]
    fn print_aligns_keys_values_and_origins_and_hides_secrets() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "[batch]\nmax_entries = 5_000\n").expect("written");
        let (code, out, _) = check(true, Some(file.path()), &URLS);
        assert_eq!(code, Exit::Ok);
        let origin = format!("{}:2", file.path().display());
        let line = |key: &str| out.lines().find(|line| line.starts_with(key)).expect("every key has a line").to_owned();
        assert_eq!(
            line("batch.max_entries").split_whitespace().collect::<Vec<_>>(),
            ["batch.max_entries", "5000", &origin]
        );
        assert!(line("valkey.url ").ends_with("  env VALKEY_URL"));
        assert!(line("valkey.url ").contains("valkey://u:***@cache:6379/0"));
        assert!(line("reclaim.dead_after").contains("30s"));
        assert_eq!(line("reclaim.dead_after").find("default"), line("run.workers").find("default"));
        assert!(!out.contains("hunter2"), "{out}");
    }
}
