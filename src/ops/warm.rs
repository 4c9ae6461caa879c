//! `tidegate warm`: brings counters of a managed pipeline into Valkey before somebody asks for them.
//!
//! Takes ids, from a file or the rows with the highest values; gives how many are in place. It does what a read does, by lease and with the ledger's
//! judgement, so a warmed value is as exact as any. Keeps a pace; what cannot be brought now is counted and left to the next reader.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sqlx::AssertSqlSafe;

use super::context::one_of_counters;
use super::{Context, Exit, Failure, refused};
use crate::client::{Count, CounterOptions, Counters, postgres};
use crate::config::{Config, Needs};
use crate::model::pipeline::Pipeline;
use crate::postgres::Database;
use crate::retry::{Fault, advised};

const VERB: &str = "warm";
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
    #[arg(long, value_name = "NAME")]
    pub pipeline: Option<String>,
    /// How many are brought in a second
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: u64,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    Ok(answer(&opts, &config, &mut std::io::stdout()).await?)
}

async fn answer(opts: &Opts, config: &Config, out: &mut dyn Write) -> std::io::Result<Exit> {
    let pipeline = match one_of_counters(config, opts.pipeline.as_deref()) {
        Ok(pipeline) => pipeline,
        Err(failure) => return refused(VERB, failure.exit(), &failure.to_string()),
    };
    if !pipeline.is_managed() {
        let words = format!("pipeline {} is plain: its producers keep the counters in Valkey", pipeline.name);
        return refused(VERB, Exit::Config, &words);
    }
    let (valkey, address) = match (config.valkey.address(), config.postgres.address()) {
        (Ok(valkey), Ok(postgres)) => (valkey, postgres),
        (Err(problems), _) | (_, Err(problems)) => return refused(VERB, Exit::Config, &problems.to_string()),
    };
    let ids = match (&opts.ids, opts.top) {
        (Some(file), _) => match read_ids(file) {
            Ok(ids) => ids,
            Err(error) => return refused(VERB, Exit::NoInput, &format!("{}: {error}", file.display())),
        },
        (None, top) => {
            let database = Database::new(address.clone(), 1);
            let ids = top_of(&database, pipeline, top.unwrap_or(0)).await;
            database.close().await;
            match ids {
                Ok(ids) => ids,
                Err(fault) => return refused(VERB, Exit::from(&fault), &advised(&fault)),
            }
        }
    };
    let truth = postgres::Database::new(address, &config.valkey.source, pipeline, 2);
    let options = CounterOptions { ttl: config.managed.ttl, ..CounterOptions::default() };
    let counters = match Counters::connect(&valkey, pipeline, truth, options).await {
        Ok(counters) => counters,
        Err(fault) => return refused(VERB, Exit::from(&fault), &advised(&fault)),
    };
    let (mut warm, mut why) = (0, None);
    for ids in ids.chunks(AT_ONCE) {
        let began = Instant::now();
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        for count in counters.get_many(&names).await {
            match count {
                Count::Exact(_) => warm += 1,
                Count::Unknown(reason) => why = Some(reason.to_string()),
                Count::Stored(_) => why = Some("the flush has to catch up first".into()),
            }
        }
        let due = Duration::from_secs_f64(ids.len() as f64 / opts.rate as f64);
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
    }
    writeln!(out, "{warm} of {} counters are in place", ids.len())?;
    match why {
        None => Ok(Exit::Ok),
        Some(why) => refused(VERB, Exit::Retry, &format!("some could not be brought: {why}")),
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
