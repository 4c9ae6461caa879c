//! `tidegate probe`: sends one delta through the workers that are there, and sees it in PostgreSQL exactly once.
//!
//! For whoever has just installed or upgraded Tidegate. Takes a pipeline and a key that is kept for probes: its row counts them. Gives 0 where
//! the row went up by one and stays there, 3 where it went up by more, 75 where it did not in time.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Row};

use super::complete::{Name, by};
use super::context::one_of_counters;
use super::{Context, Exit, Failure};
use crate::client::{NotAdded, Producer};
use crate::config::{Config, Needs};
use crate::model::pipeline::Pipeline;
use crate::model::shard::shard_of;
use crate::postgres::{Database, Endpoint};
use crate::retry::advised;
use crate::target::check_tables_that_are_read;

/// How often the row is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long it must stay as it is once it went up: a second time would come with a redelivery, `reclaim.gone_after` later.
const STAYS_FOR: Duration = Duration::from_millis(2_500);

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// The pipeline; may be left out where there is only one
    #[arg(long, value_name = "NAME", add = by(Name::CounterPipeline))]
    pub pipeline: Option<String>,
    /// The key that is probed: one that nobody else adds to, and that the key's column takes
    #[arg(long, value_name = "KEY", default_value = "tidegate-probe")]
    pub key: String,
    /// How long the delta may take to land
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let text = probe(&opts, &config).await?;
    context.write(&format!("{text}\n"))?;
    Ok(Exit::Ok)
}

async fn probe(opts: &Opts, config: &Config) -> Result<String, Failure> {
    let pipeline = one_of_counters(config, opts.pipeline.as_deref())?;
    let (valkey, postgres) = (config.valkey.address()?, config.postgres.address()?);
    let table = Counter::of(postgres, pipeline, &opts.key).await?;
    let before = table.value().await?;
    let producer = Producer::connect(&valkey, pipeline).await?;
    let sent = Instant::now();
    let added = producer.add(&opts.key, 1).await;
    let added = added.map_err(|why| not_added(why, pipeline, &opts.key))?;
    let landed = loop {
        let value = table.value().await?;
        if value != before {
            break sent.elapsed();
        }
        if sent.elapsed() > opts.timeout {
            let time = humantime::format_duration(opts.timeout);
            let entry = added.entry;
            let next = "is a worker at work on this pipeline? See its log";
            return Err(Failure::new(Exit::Retry, format!("the entry {entry} has not landed within {time}: {next}")));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    let stays_until = Instant::now() + STAYS_FOR;
    loop {
        let value = table.value().await?;
        if value != before + 1 {
            let went = format!(
                "the row {:?} of {} went from {before} to {value}, and should be {}",
                opts.key,
                pipeline.table,
                before + 1
            );
            let next = "did another probe run, or does somebody else use this key? Try again with --key";
            return Err(Failure::new(Exit::Drift, format!("{went}: {next}")));
        }
        if Instant::now() >= stays_until {
            break;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let (table, ms) = (&pipeline.table, landed.as_millis());
    Ok(format!(
        "one delta was sent as {} and landed once, {ms} ms later: the row {:?} of {table} is {}",
        added.entry,
        opts.key,
        before + 1
    ))
}

/// What Valkey refused ends as it ends every verb; where nobody knows whether it was sent the next probe takes another key.
fn not_added(why: NotAdded, pipeline: &Pipeline, key: &str) -> Failure {
    let about = match why {
        NotAdded::CounterRefused(_) => pipeline.counter_of(key),
        _ => pipeline.stream_of(shard_of(key, pipeline.shards)),
    };
    let (exit, advised) = match why.fault() {
        Some(fault) => (Exit::from(fault), advised(&fault.clone().about(&about))),
        None => (Exit::Usage, format!("{why}: choose another --key")),
    };
    let sent = match why.happened_not() {
        true => "nothing was sent",
        false => "the delta may or may not have been sent, so take another --key next time",
    };
    Failure::new(exit, format!("{sent}: {advised}"))
}

/// One row of a pipeline's table.
struct Counter<'a> {
    database: Database,
    query: String,
    key: &'a str,
}

impl<'a> Counter<'a> {
    async fn of(address: Endpoint, pipeline: &Pipeline, key: &'a str) -> Result<Counter<'a>, Failure> {
        let database = Database::new(address, 1);
        let fits = database.run(async |connection| check_tables_that_are_read(connection, pipeline).await).await?;
        let fits = fits.map_err(|unfit| Failure::new(Exit::Config, unfit.to_string()))?;
        let table = pipeline.table.quoted();
        let (column, value) = (pipeline.key.quoted(), pipeline.value.quoted());
        let key_type = &fits[0].keys[0];
        // As text: the column may be numeric, and hold more digits than any type of ours.
        let query = format!("select {value}::text from {table} where {column} = $1::text::{key_type}");
        Ok(Counter { database, query, key })
    }

    /// Its value; 0 where there is no row yet.
    async fn value(&self) -> Result<i128, Failure> {
        let query = || sqlx::query(AssertSqlSafe(self.query.clone())).bind(self.key);
        let row = self.database.run(async |connection| query().fetch_optional(connection).await).await?;
        let Some(row) = row else { return Ok(0) };
        let text: Option<String> = row.try_get(0).map_err(|error| Failure::new(Exit::Error, error.to_string()))?;
        let whole = text.as_deref().unwrap_or("0").split('.').next().unwrap_or("0").parse();
        whole.map_err(|_| {
            Failure::new(
                Exit::Config,
                format!("the row {:?} holds no number that can be probed: use another --key", self.key),
            )
        })
    }
}
