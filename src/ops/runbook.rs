//! `tidegate runbook`: what to do about an alert, without a browser.
//!
//! Takes the name of an alert; prints its page of docs/runbooks, which is embedded in the program. Without a name it lists them.

use super::complete::{Name, by};
use super::{Context, Exit, Failure};

/// Every runbook: its name and its text.
const RUNBOOKS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/runbooks.rs"));

/// The name of every runbook.
pub fn names() -> impl Iterator<Item = &'static str> {
    RUNBOOKS.iter().map(|(name, _)| *name)
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// The alert, such as TidegateHalted; without it, the list of all
    #[arg(value_name = "NAME", add = by(Name::Runbook))]
    pub name: Option<String>,
}

/// Runs the verb.
pub fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let names = || RUNBOOKS.iter().map(|(name, _)| format!("{name}\n")).collect::<String>();
    let Some(wanted) = opts.name else {
        context.write(&names())?;
        return Ok(Exit::Ok);
    };
    // Alerts are often typed as they are heard: TidegateHalted, halted.
    let is_meant = |name: &str| {
        name.eq_ignore_ascii_case(&wanted)
            || name.to_ascii_lowercase() == format!("tidegate{}", wanted.to_ascii_lowercase())
    };
    match RUNBOOKS.iter().find(|(name, _)| is_meant(name)) {
        Some((_, text)) => {
            context.write(text)?;
            Ok(Exit::Ok)
        }
        None => Err(Failure::usage(format!("there is no runbook {wanted:?}; there are:\n{}", names().trim_end()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_runbook_of_the_documents_is_embedded() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/runbooks");
        let files = std::fs::read_dir(folder).map(Iterator::count).unwrap_or(0);
        assert_eq!(RUNBOOKS.len(), files);
        assert!(RUNBOOKS.iter().all(|(name, text)| !name.is_empty() && text.starts_with('#')));
    }
}
