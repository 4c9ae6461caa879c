//! `tidegate run`: the daemon.

use std::io::Write;
use std::time::Duration;

use super::Exit;
use crate::config::{Loaded, Problems};
use crate::postgres::schema;
use crate::service::{self, Ending, Options, Refusal};
use crate::telemetry::admin::Pages;

/// What can be said on the command line.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Args {
    /// Settle everything that is in the streams, then exit
    #[arg(long)]
    pub until_empty: bool,
    /// With --until-empty: give up when a server is out of reach, or nothing is settled, for so long
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// Migrate the database first
    #[arg(long)]
    pub migrate: bool,
    /// Start although Valkey may evict the stream when its memory is full
    #[arg(long)]
    pub accept_eviction: bool,
}

/// Runs the verb.
pub async fn run(
    args: Args,
    loaded: Loaded,
    pages: Pages,
    reload: impl Fn() -> Result<Loaded, Problems>,
) -> std::io::Result<Exit> {
    let Args { until_empty, timeout, migrate, accept_eviction } = args;
    let options = Options { until_empty, timeout, migrate, accept_eviction };
    match service::run(loaded, options, pages, reload).await {
        Ok(Ending::Settled) => Ok(Exit::Ok),
        Ok(Ending::LeftPending) => Ok(Exit::Retry),
        Ok(Ending::NoWorkers) => Ok(Exit::Error),
        Ok(Ending::Lost(entries)) => {
            writeln!(
                std::io::stderr(),
                "tidegate run: Valkey lost {entries} entries before they were flushed: see the log for which"
            )?;
            Ok(Exit::Drift)
        }
        Ok(Ending::Buried(entries)) => {
            writeln!(std::io::stderr(), "tidegate run: {entries} entries are dead letters: see tidegate.dead_letters")?;
            Ok(Exit::BadInput)
        }
        Ok(Ending::Stuck(fault)) => Ok(fault.as_ref().map_or(Exit::Retry, Exit::from)),
        Err(refusal) => {
            writeln!(std::io::stderr(), "tidegate run: {refusal}")?;
            Ok(match &refusal {
                Refusal::NotMigrated(_)
                | Refusal::Table(_)
                | Refusal::Unregistered(_)
                | Refusal::KeyOfManaged(..)
                | Refusal::Evicting(_) => Exit::Config,
                Refusal::Config(problems) => problems.into(),
                Refusal::Fault(fault) | Refusal::Migration(schema::Error::Fault(fault)) => fault.into(),
                Refusal::Migration(_) | Refusal::Io(_) => Exit::Error,
            })
        }
    }
}
