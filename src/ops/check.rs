//! `tidegate check`: checks the configuration without connecting to a server.
//!
//! Takes the sources that `run` would take; writes one line, or every problem there is.

use std::io::{self, Write};

use super::{Context, Exit, Failure};
use crate::config::{Loaded, Needs, Sources, load};

/// The verb's arguments.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Opts {
    /// Show every key with its value and where that is written; secrets are hidden
    #[arg(long)]
    pub print: bool,
}

/// Runs the verb.
pub fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    Ok(answer(opts, &context.sources(Vec::new()), &mut io::stdout(), &mut io::stderr())?)
}

/// The answer goes to `out`, problems go to `err`.
fn answer(opts: Opts, sources: &Sources, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<Exit> {
    match load(sources, Needs::DAEMON) {
        Ok(loaded) => {
            if opts.print {
                print(&loaded, out)?;
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
            Opts { print },
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
