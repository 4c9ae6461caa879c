//! `tidegate run`: the daemon.

use std::io::Write;

use super::Exit;
use crate::config::{Config, Faults};
use crate::retry::{Verdict, judge};
use crate::service::{self, Ending, Options, Refusal};

/// What can be said on the command line.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Args {
    /// Settle everything that is in the streams, then exit
    #[arg(long)]
    pub until_empty: bool,
    /// Migrate the database first
    #[arg(long)]
    pub migrate: bool,
    /// Start although Valkey may evict the stream when its memory is full
    #[arg(long)]
    pub accept_eviction: bool,
}

/// Runs the verb.
pub async fn run(args: Args, config: Config, reload: impl Fn() -> Result<Config, Faults>) -> std::io::Result<Exit> {
    let options =
        Options { until_empty: args.until_empty, migrate: args.migrate, accept_eviction: args.accept_eviction };
    match service::run(config, options, reload).await {
        Ok(Ending::Settled) => Ok(Exit::Ok),
        Ok(Ending::LeftPending) => Ok(Exit::Retry),
        Ok(Ending::NoWorkers) => Ok(Exit::Error),
        Err(refusal) => {
            writeln!(std::io::stderr(), "tidegate run: {refusal}")?;
            Ok(match refusal {
                Refusal::NotMigrated(_)
                | Refusal::Table(_)
                | Refusal::Unregistered(_)
                | Refusal::Config(_)
                | Refusal::Evicting(_) => Exit::Config,
                Refusal::Fault(fault, _) if judge(&fault, 1).verdict == Verdict::Halt => Exit::NoPermission,
                Refusal::Fault(..) => Exit::Unavailable,
                Refusal::Migration(_) | Refusal::Io(_) => Exit::Error,
            })
        }
    }
}
