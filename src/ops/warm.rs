//! `tidegate warm`: brings counters of a managed pipeline into Valkey before somebody asks for them.
//!
//! Takes ids, from a file or the rows with the highest values; gives how many are in place. It does what a read does, by lease and with the ledger's
//! judgement, so a warmed value is as exact as any. Keeps a pace; what cannot be brought now is counted and left to the next reader.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use sqlx::AssertSqlSafe;

use super::columns::Page;
use super::complete::{Name, by};
use super::context::{Report, managed};
use super::{Context, Exit, Failure};
use crate::client::{Count, CounterOptions, Counters, Why, postgres};
use crate::config::Needs;
use crate::model::pipeline::Pipeline;
use crate::postgres::Database;
use crate::retry::{Fault, advised};

/// How many are brought from one snapshot.
const AT_ONCE: usize = 200;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
#[command(group(clap::ArgGroup::new("which").required(true).args(["ids", "top"])))]
pub struct Opts {
    /// A file with an id on each line; - for standard input
    #[arg(long, value_name = "FILE")]
    pub ids: Option<PathBuf>,
    /// So many rows with the highest values
    #[arg(long, value_name = "N")]
    pub top: Option<u32>,
    /// The pipeline; may be left out where there is only one
    #[arg(long, value_name = "NAME", add = by(Name::ManagedPipeline))]
    pub pipeline: Option<String>,
    /// How many are brought in a second
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: u64,
}

/// How many are in place.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Warmed {
    /// The pipeline.
    pub pipeline: String,
    /// How many were asked for.
    pub asked: u64,
    /// How many are in place.
    pub warm: u64,
    /// Why the last one that is not could not be brought; null where all are.
    pub why_not: Option<String>,
}

impl Report for Warmed {
    fn show(&self, page: &mut Page) {
        page.line(format!("{} of {} counters are in place", self.warm, self.asked));
    }
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let pipeline = managed(&config, opts.pipeline.as_deref(), "its producers keep the counters in Valkey")?;
    let (valkey, address) = (config.valkey.address()?, config.postgres.address()?);
    let ids = match (&opts.ids, opts.top) {
        (Some(file), _) => {
            let next = "name a text file with an id on each line, or - for standard input";
            read_ids(file).map_err(|error| {
                Failure::new(Exit::NoInput, format!("cannot read {} ({error}): {next}", file.display()))
            })?
        }
        (None, top) => {
            let database = Database::new(address.clone(), 1);
            let ids = top_of(&database, pipeline, top.unwrap_or(0)).await;
            database.close().await;
            ids?
        }
    };
    let truth = postgres::Database::new(address, &config.valkey.source, pipeline, 2);
    let options = CounterOptions { ttl: config.managed.ttl, ..CounterOptions::default() };
    let counters = Counters::connect(&valkey, pipeline, truth, options).await?;
    let (mut warm, mut why_not) = (0, None);
    for ids in ids.chunks(AT_ONCE) {
        let began = Instant::now();
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        for count in counters.get_many(&names).await {
            match count {
                Count::Exact(_) => warm += 1,
                Count::Unknown(reason) => why_not = Some(reason),
                Count::Stored(_) => why_not = Some(Why::CatchingUp),
            }
        }
        // Who lacks a right lacks it for the next ones, too.
        if counters.fault().is_some_and(|fault| Exit::from(&fault) == Exit::NoPermission) {
            break;
        }
        let due = Duration::from_secs_f64(ids.len() as f64 / opts.rate as f64);
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
    }
    // A server that failed is the cause, whatever could be said of a counter without it.
    let fault = why_not.and_then(|_| counters.fault());
    let why_not = why_not.map(|why| fault.as_ref().map_or_else(|| why.to_string(), advised));
    let warmed = Warmed { pipeline: pipeline.name.clone(), asked: ids.len() as u64, warm, why_not };
    context.print(&warmed)?;
    match warmed.why_not {
        None => Ok(Exit::Ok),
        Some(why) => {
            let exit = fault.as_ref().map_or(Exit::Retry, ended_by);
            Err(Failure::new(exit, format!("some could not be brought: {why}")))
        }
    }
}

/// What was not brought may be brought later, unless somebody has to act first.
fn ended_by(fault: &Fault) -> Exit {
    match Exit::from(fault) {
        exit @ (Exit::NoPermission | Exit::Config) => exit,
        _ => Exit::Retry,
    }
}

fn read_ids(file: &PathBuf) -> std::io::Result<Vec<String>> {
    let reader: Box<dyn BufRead> = match file.to_str() {
        Some("-") => Box::new(BufReader::new(std::io::stdin())),
        _ => Box::new(BufReader::new(std::fs::File::open(file)?)),
    };
    reader.lines().filter(|line| !matches!(line, Ok(line) if line.is_empty())).collect()
}

async fn top_of(database: &Database, pipeline: &Pipeline, count: u32) -> Result<Vec<String>, Fault> {
    let (key, value) = (pipeline.key.quoted(), pipeline.value.quoted());
    let table = pipeline.table.quoted();
    let query = format!("select {key}::text from {table} order by {value} desc nulls last limit $1");
    database.run(async |c| sqlx::query_scalar(AssertSqlSafe(query)).bind(i64::from(count)).fetch_all(c).await).await
}
