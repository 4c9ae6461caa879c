//! `tidegate check`: says whether the configuration is valid, without touching a server.
//!
//! Takes the sources that `run` would take; writes one line or every fault there is. Fails only when it cannot write.

use std::io::{self, Write};
use std::path::PathBuf;

use crate::config::{Loaded, Needs, Sources, load};

/// The exit code of an invalid configuration: `EX_CONFIG` of sysexits.h.
pub const INVALID: u8 = 78;

/// Says whether the configuration is valid, or everything that is wrong with it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// The configuration file; without it the one that TIDEGATE_CONFIG names.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Show every key with its value and where that was written; secrets are hidden.
    #[arg(long)]
    pub print: bool,
}

/// Checks; gives the exit code: 0 or [`INVALID`]. The answer goes to `out`, faults go to `err`.
pub fn run(args: &Args, sources: &Sources, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    let mut sources = sources.clone();
    sources.file = args.config.clone().or(sources.file);
    match load(&sources, Needs::BOTH) {
        Ok(loaded) => {
            if args.print {
                print(&loaded, out)?;
            }
            writeln!(out, "configuration is valid")?;
            Ok(0)
        }
        Err(faults) => {
            writeln!(err, "{faults}")?;
            Ok(INVALID)
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

    fn check(args: &Args, env: &[(&str, &str)]) -> (u8, String, String) {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code =
            run(args, &Sources { env, ..Sources::default() }, &mut out, &mut err).expect("a vector takes everything");
        (code, String::from_utf8(out).expect("text"), String::from_utf8(err).expect("text"))
    }

    const URLS: [(&str, &str); 2] =
        [("VALKEY_URL", "valkey://u:hunter2@cache:6379/0"), ("DATABASE_URL", "postgres://u:hunter2@db/app")];

    #[test]
    fn a_valid_configuration_is_said_to_be_valid_in_one_line() {
        assert_eq!(check(&Args::default(), &URLS), (0, "configuration is valid\n".into(), String::new()));
    }

    #[test]
    fn every_fault_goes_to_stderr_and_the_exit_code_is_78() {
        let (code, out, err) = check(&Args::default(), &[("TIDEGATE__RUN__WORKERS", "0")]);
        assert_eq!((code, out.as_str()), (78, ""));
        assert_eq!(err.lines().count(), 3, "{err}");
        for needed in
            ["run.workers", "valkey.url is missing; set VALKEY_URL", "postgres.url is missing; set DATABASE_URL"]
        {
            assert!(err.contains(needed), "{err}");
        }
    }

    #[test]
    fn print_aligns_keys_values_and_origins_and_hides_secrets() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "[batch]\nmax_entries = 5_000\n").expect("written");
        let args = Args { config: Some(file.path().into()), print: true };
        let (code, out, _) = check(&args, &URLS);
        assert_eq!(code, 0);
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
