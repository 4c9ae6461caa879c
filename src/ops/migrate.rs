//! `tidegate migrate`: brings the database to the schema this program was built with.
//!
//! Takes the configuration; writes what was done, or with `--dry-run` what would be, to `out`.

use std::io::Write;

use super::Exit;
use crate::config::Config;
use crate::postgres::schema::{self, Error};
use crate::retry::Fault;

/// What can be said on the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Print the SQL that would run, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Carry the ledger of a renamed pipeline over to its new name, before the daemon starts under it
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_rename)]
    pub rename_pipeline: Option<(String, String)>,
}

fn parse_rename(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("write OLD=NEW, two names of pipelines".into()),
    }
}

/// Runs the verb.
pub async fn run(args: &Args, config: &Config, out: &mut dyn Write) -> std::io::Result<Exit> {
    let address = match config.postgres.address() {
        Ok(address) => address,
        Err(problems) => {
            writeln!(std::io::stderr(), "{problems}")?;
            return Ok(Exit::from(&problems));
        }
    };
    let result = if let Some((old, new)) = &args.rename_pipeline {
        schema::rename(&address, &config.valkey.source, old, new)
            .await
            .map(|lanes| format!("{lanes} ledgers carried over from {old} to {new}\n"))
    } else if args.dry_run {
        schema::missing(&address).await.map(|migrations| {
            let sql: String = migrations
                .iter()
                .map(|m| format!("-- {:04} {}\n{}\n", m.version, m.description, m.sql.as_str()))
                .collect();
            if sql.is_empty() { "-- nothing to do\n".into() } else { sql }
        })
    } else {
        schema::apply(&address).await.map(|applied| match applied {
            0 => "the database is up to date\n".into(),
            n => format!("{n} migrations applied\n"),
        })
    };
    match result {
        Ok(text) => {
            out.write_all(text.as_bytes())?;
            Ok(Exit::Ok)
        }
        Err(error) => {
            writeln!(std::io::stderr(), "tidegate migrate: {error}")?;
            Ok(if matches!(error, Error::Fault(Fault::PostgresLost(_))) { Exit::Unavailable } else { Exit::Error })
        }
    }
}
