//! `tidegate run`: the daemon.

use std::sync::Arc;
use std::time::Duration;

use super::console::Console;
use super::{Context, Exit, Failure};
use crate::config::{Needs, load};
use crate::postgres::schema;
use crate::service::{self, Ending, Options, Refusal};
use crate::telemetry::Telemetry;
use crate::telemetry::admin::Pages;

/// What can be said on the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Opts {
    /// Settle everything that is in the streams, then exit
    #[arg(long)]
    pub until_empty: bool,
    /// With --until-empty: give up when a server is out of reach, or nobody in the group settles anything, for so long
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// Migrate the database first
    #[arg(long)]
    pub migrate: bool,
    /// How many workers a pipeline has; default: run.workers of the configuration
    #[arg(long, value_name = "N")]
    pub workers: Option<String>,
}

impl Opts {
    /// The keys that are set on the command line.
    fn flags(&self) -> Vec<(String, String)> {
        self.workers.iter().map(|workers| ("run.workers".to_owned(), workers.clone())).collect()
    }
}

/// Starts what the daemon tells of itself, the log among it.
pub fn telemetry(opts: &Opts, context: &Context) -> Result<Telemetry, Failure> {
    let config = context.load(opts.flags(), Needs::DAEMON)?.config;
    Telemetry::start(&config).map_err(|refused| Failure::new(Exit::Config, refused.to_string()))
}

/// Runs the verb. `telemetry`: as [`telemetry`] has started it.
pub async fn run(opts: Opts, context: &Context, telemetry: Option<&Telemetry>) -> Result<Exit, Failure> {
    let Some(telemetry) = telemetry else { return Err(Failure::new(Exit::Error, "telemetry was not started")) };
    let loaded = context.load(opts.flags(), Needs::DAEMON)?;
    let again = || load(&context.sources(opts.flags()), Needs::DAEMON);
    let Opts { until_empty, timeout, migrate, .. } = opts;
    let options = Options { until_empty, timeout, migrate };
    let pages = Pages { beside: Some(Arc::new(Console::new(telemetry.registry()))), ..telemetry.pages() };
    match service::run(loaded, options, pages, again).await {
        Ok(Ending::Settled) => Ok(Exit::Ok),
        Ok(Ending::LeftPending) => Ok(Exit::Retry),
        Ok(Ending::Died) => Ok(Exit::Error),
        Ok(Ending::Lost(entries)) => Err(Failure::new(
            Exit::Drift,
            format!("Valkey lost {entries} entries before they were flushed: see the log for which"),
        )),
        Ok(Ending::Buried(entries)) => {
            Err(Failure::new(Exit::BadInput, format!("{entries} entries are dead letters: see `tidegate dead list`")))
        }
        Ok(Ending::Stuck(fault)) => Ok(fault.as_ref().map_or(Exit::Retry, Exit::from)),
        Err(refusal) => Err(refused(refusal)),
    }
}

fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Config(problems) => problems.into(),
        Refusal::Fault(fault) | Refusal::Migration(schema::Error::Fault(fault)) => fault.into(),
        Refusal::NotMigrated(_)
        | Refusal::Table(_)
        | Refusal::Unregistered(_)
        | Refusal::KeyOfManaged(..)
        | Refusal::DistributedOfManaged(_)
        | Refusal::Zone(_)
        | Refusal::SlotsOfManaged(..)
        | Refusal::OtherPostgres { .. }
        | Refusal::TooManyConnections { .. }
        | Refusal::NotAccepted(_) => Failure::new(Exit::Config, refusal.to_string()),
        Refusal::Migration(_) | Refusal::Io(_) => Failure::new(Exit::Error, refusal.to_string()),
    }
}
