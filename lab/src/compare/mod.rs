//! Side by side: Tidegate, hand-written workers, and what the two servers can do at all; see `make bench-compare`.
//!
//! One private Valkey with one stream, one private PostgreSQL, and every contestant in turn, in another order each round.
//! Each reads the whole stream with a group of its own into the same empty table, and what it left there is checked.

mod contestants;
mod limits;
mod report;
mod workload;

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use contestants::{ALL, Contestant, Took};
use sqlx::{Connection as _, PgConnection};
use tidegate::config::{Needs, Sources, load};
use tidegate::model::pipeline::Pipeline;
use tidegate::ops::sandbox::{Postgres, Valkey};
use tidegate::postgres::schema;
use tidegate::valkey::{Connection, Endpoint, info};
use workload::Workload;

/// Where the hand-written workers are.
const PEERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers");
/// PostgreSQL as people run it: every commit reaches the disk.
const SETTINGS: [&str; 5] =
    ["fsync=on", "full_page_writes=on", "synchronous_commit=on", "shared_buffers=256MB", "max_wal_size=4GB"];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Entries in the stream
    #[arg(long, default_value_t = 1_000_000)]
    entries: usize,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Which workloads: hot, 100k, 10m, hot-no-aof, 100k-no-aof
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<String>,
    /// Only contestants whose names have one of these in them
    #[arg(long, value_delimiter = ',')]
    contestants: Vec<String>,
    /// A folder for tables and plots
    #[arg(long)]
    out: Option<PathBuf>,
    /// Be one of the limits
    #[arg(long, hide = true)]
    limit: Option<String>,
}

/// Where a round takes place.
struct Stage {
    valkey: Valkey,
    postgres: Postgres,
    workload: Workload,
    entries: usize,
    stream: String,
    group: String,
    tidegate: PathBuf,
    without_ledger: PathBuf,
    node: PathBuf,
    python: PathBuf,
}

/// What one contestant did in one workload.
struct Score {
    name: &'static str,
    promise: &'static str,
    contestant: Contestant,
    took: Vec<Took>,
    exact: bool,
}

impl Stage {
    fn database(&self) -> String {
        self.postgres.url("postgres")
    }

    /// Seconds of processor time that Valkey has used.
    async fn valkey_cpu(&self) -> Result<f64, Box<dyn Error>> {
        let second = Duration::from_secs(1);
        let address = Endpoint::new(self.valkey.url().into(), second, second);
        let connection = Connection::open_unnamed(&address).await?;
        info::cpu_seconds(&connection).await?.ok_or_else(|| "Valkey does not tell its processor time".into())
    }

    /// An empty table, an empty ledger, no group.
    async fn clear(&self) -> Result<(), Box<dyn Error>> {
        let mut database = PgConnection::connect(&self.database()).await?;
        for statement in [
            "create table if not exists processed (stream_id text primary key)",
            "truncate counters, processed, tidegate.ledger, tidegate.dead_letters",
            "vacuum analyze counters",
            "checkpoint",
        ] {
            sqlx::query(statement).execute(&mut database).await?;
        }
        workload::command(self.valkey.port(), &["XGROUP", "DESTROY", &self.stream, &self.group])?;
        Ok(())
    }

    /// Whether the table holds what it must after so many entries.
    async fn is_exact(&self, entries: usize) -> Result<bool, Box<dyn Error>> {
        let mut database = PgConnection::connect(&self.database()).await?;
        let found: (i64, i64) = sqlx::query_as("select coalesce(sum(value), 0)::int8, count(*) from counters")
            .fetch_one(&mut database)
            .await?;
        Ok(found == self.workload.expected(entries))
    }
}

pub async fn run(args: Args) -> bool {
    match compare(args).await {
        Ok(()) => true,
        Err(error) => {
            eprintln!("{error}");
            false
        }
    }
}

async fn compare(args: Args) -> Result<(), Box<dyn Error>> {
    let chosen = |name: &str| args.workloads.is_empty() || args.workloads.iter().any(|w| w == name);
    let workloads: Vec<Workload> = workload::ALL.into_iter().filter(|workload| chosen(workload.name)).collect();
    if let Some(limit) = &args.limit {
        return be_a_limit(limit, workloads[0], args.entries).await;
    }
    let from_environment = |name: &str| PathBuf::from(std::env::var(name).unwrap_or_default());
    let pipeline = Pipeline::counters();
    let mut stage = Stage {
        valkey: Valkey::start(&["--appendfsync", "everysec"]).await?,
        postgres: Postgres::start(&SETTINGS).await?,
        workload: workload::ALL[0],
        entries: args.entries,
        group: pipeline.group(),
        stream: pipeline.stream,
        tidegate: from_environment("TIDEGATE"),
        without_ledger: from_environment("TIDEGATE_CONTROLS"),
        node: from_environment("NODE_PEER"),
        python: from_environment("PYTHON"),
    };
    let env = [("DATABASE_URL".to_owned(), stage.database())].into();
    let config = load(&Sources { env, ..Sources::default() }, Needs::POSTGRES)?.config;
    schema::apply(&config.postgres.address()?).await?;

    let mut report = report::Report::begin(&stage, args.runs).await?;
    for workload in workloads {
        stage.workload = workload;
        let scores = compete(&stage, &args).await?;
        report.add(workload, &scores);
    }
    if let Some(folder) = &args.out {
        report.write(folder)?;
    }
    Ok(())
}

/// All contestants in one workload.
async fn compete(stage: &Stage, args: &Args) -> Result<Vec<Score>, Box<dyn Error>> {
    let asked =
        |name: &str| args.contestants.is_empty() || args.contestants.iter().any(|part| name.contains(part.as_str()));
    let mut scores = Vec::new();
    for (name, promise, contestant) in ALL.into_iter().filter(|(name, ..)| asked(name)) {
        match contestant.missing(stage) {
            Some(what) => eprintln!("left out: {name}, for want of {what}"),
            None => scores.push(Score { name, promise, contestant, took: Vec::new(), exact: true }),
        }
    }
    workload::command(stage.valkey.port(), &["FLUSHALL"])?;
    let appendonly = if stage.workload.aof { "yes" } else { "no" };
    workload::command(stage.valkey.port(), &["CONFIG", "SET", "appendonly", appendonly])?;
    stage.workload.load(stage.valkey.port(), &stage.stream, stage.entries)?;
    for round in 0..args.runs {
        let count = scores.len();
        for place in 0..count {
            let score = &mut scores[(place + round) % count];
            stage.clear().await?;
            let took = score.contestant.run(stage).await?;
            if !matches!(score.contestant, Contestant::LimitValkey(_)) {
                score.exact &= stage.is_exact(took.entries).await?;
            }
            eprintln!(
                "{} round {}: {}: {:.0} entries/s",
                stage.workload.name,
                round + 1,
                score.name,
                took.entries as f64 / took.seconds
            );
            score.took.push(took);
        }
    }
    Ok(scores)
}

/// This program as a contestant.
async fn be_a_limit(limit: &str, workload: Workload, entries: usize) -> Result<(), Box<dyn Error>> {
    let told = |name: &str| std::env::var(name);
    let seconds = match limit {
        "valkey" => limits::valkey(told("VALKEY_PORT")?.parse()?, &told("STREAM")?, &told("GROUP")?)?,
        "valkey-xread" => limits::valkey_alone(told("VALKEY_PORT")?.parse()?, &told("STREAM")?)?,
        "postgres" => limits::postgres(&told("DATABASE_URL")?, workload, entries, 1).await?,
        _ => limits::postgres(&told("DATABASE_URL")?, workload, entries, 2).await?,
    };
    println!("{{\"seconds\": {seconds}}}");
    Ok(())
}
