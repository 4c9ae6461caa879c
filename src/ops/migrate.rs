//! `tidegate migrate`: brings the database to the schema this program was built with.
//!
//! The migrations are embedded in the binary and recorded in `tidegate.migrations`. They run under an advisory lock, so two
//! that start at once wait for each other; they only add, so the workers of the version before go on meanwhile.

use std::collections::HashSet;
use std::io::Write;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migration, Migrator};
use sqlx::{Connection, Row};

use super::Exit;
use crate::config::Config;
use crate::pipeline::Pipeline;
use crate::postgres::{self, Address};
use crate::retry::Fault;

/// A migration may wait for another one, or rewrite a table: far longer than a flush may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);

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
    let (address, source) = match config.postgres.address() {
        Ok(address) => (address, &config.valkey.source),
        Err(faults) => {
            writeln!(std::io::stderr(), "{faults}")?;
            return Ok(Exit::Config);
        }
    };
    let address = &address;
    let result = if let Some((old, new)) = &args.rename_pipeline {
        rename(address, source, old, new)
            .await
            .map(|lanes| format!("{lanes} ledgers carried over from {old} to {new}\n"))
    } else if args.dry_run {
        missing(address).await.map(|migrations| {
            let sql: String = migrations
                .iter()
                .map(|m| format!("-- {:04} {}\n{}\n", m.version, m.description, m.sql.as_str()))
                .collect();
            if sql.is_empty() { "-- nothing to do\n".into() } else { sql }
        })
    } else {
        apply(address).await.map(|applied| match applied {
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

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// PostgreSQL is out of reach or refuses.
    #[error("{0}")]
    Fault(#[from] Fault),
    /// A migration failed, or was changed after it had been applied.
    #[error("{0}; nothing of the failed migration was applied")]
    Migration(#[from] MigrateError),
}

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    // A newer version's migrations only add: this one goes on beside them.
    migrator.set_ignore_missing(true);
    migrator
}

/// The migrations that the database lacks, in order.
pub async fn missing(address: &Address) -> Result<Vec<Migration>, Error> {
    let mut connection = address.connect().await?;
    let known: bool = sqlx::query_scalar("select to_regclass('tidegate.migrations') is not null")
        .fetch_one(&mut connection)
        .await
        .map_err(postgres::fault)?;
    let mut applied = HashSet::new();
    if known {
        let rows = sqlx::query("select version from tidegate.migrations where success")
            .fetch_all(&mut connection)
            .await
            .map_err(postgres::fault)?;
        for row in rows {
            applied.insert(row.try_get::<i64, _>(0).map_err(postgres::fault)?);
        }
    }
    // Only a courtesy to the server.
    let _ = connection.close().await;
    Ok(migrator().iter().filter(|m| !applied.contains(&m.version)).cloned().collect())
}

/// Applies what is missing; gives how many.
pub async fn apply(address: &Address) -> Result<usize, Error> {
    let address = Address { statement_timeout: STATEMENT_TIMEOUT, lock_timeout: STATEMENT_TIMEOUT, ..address.clone() };
    let count = missing(&address).await?.len();
    if count > 0 {
        let mut connection = address.connect().await?;
        migrator().run_direct(None, &mut connection, false).await?;
        let _ = connection.close().await;
    }
    Ok(count)
}

/// Gives a pipeline's ledgers its new name.
async fn rename(address: &Address, source: &str, old: &str, new: &str) -> Result<u64, Error> {
    let mut connection = address.connect().await?;
    let done = sqlx::query("update tidegate.lanes set pipeline = $3 where source = $1 and pipeline = $2")
        .bind(source)
        .bind(old)
        .bind(new)
        .execute(&mut connection)
        .await
        .map_err(postgres::fault)?;
    Ok(done.rows_affected())
}

/// What the operator is told of a pipeline that looks like a renamed one.
pub fn renamed(pipeline: &Pipeline, before: &str) -> String {
    format!(
        "pipeline {new} would read {stream} into {table}, as {before} did: under a new name the ledger is empty and everything \
         retained would be applied again. If it is a new name for the same pipeline, stop all daemons and run `tidegate \
         migrate --rename-pipeline {before}={new}`",
        new = pipeline.name,
        stream = pipeline.stream,
        table = pipeline.table,
    )
}
