//! `tidegate demo`: the main job in front of one's eyes.
//!
//! Producers at work, several worker processes, one of them killed again and again; and at the end the proof, counter by
//! counter. On private servers of its own, or on given ones, where it takes away what it made.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use rand::RngExt;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::AssertSqlSafe;
use tokio::process::Child;
use tokio::task::JoinSet;

use super::stage::{Servers, Stage, Trouble, say};
use super::{Context, Exit, Failure};
use crate::client::{NotAdded, Producer};
use crate::flow::read;
use crate::model::pipeline::Delivery;
use crate::shutdown::Signals;
use crate::valkey::{self, Link};

/// Increments in one go.
const CHUNK: usize = 100;
/// How many counters there are; low ones are hot.
const COUNTERS: u32 = 1_000;
/// How many producers add to them.
const PRODUCERS: usize = 2;
/// How long a worker process must be silent before its peers take what it held: short, for there is an audience.
const SETTINGS: [(&str, &str); 7] = [
    ("TIDEGATE__RUN__WORKERS", "1"),
    ("TIDEGATE__RECLAIM__DEAD_AFTER", "1s"),
    ("TIDEGATE__RECLAIM__GONE_AFTER", "500ms"),
    ("TIDEGATE__RECLAIM__SWEEP_EVERY", "200ms"),
    ("TIDEGATE__POSTGRES__STATEMENT_TIMEOUT", "900ms"),
    ("TIDEGATE__POSTGRES__LOCK_TIMEOUT", "500ms"),
    ("TIDEGATE__POSTGRES__IDLE_IN_TRANSACTION_TIMEOUT", "500ms"),
];
/// The limit for the backlog to drain when the producers have stopped.
const DRAINED_WITHIN: Duration = Duration::from_secs(60);
/// How often the picture changes on a terminal, and a line is written elsewhere.
const FRAMES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// For how long producers are at work, in seconds
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// How many worker processes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub processes: u8,
    /// A worker process is killed this often, in milliseconds; 0 for never
    #[arg(long, default_value_t = 700, value_name = "MS")]
    pub kill_every: u64,
    /// How many increments a second, all producers together
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// Use this Valkey instead of a private one; needs --database-url too
    #[arg(long, requires = "database_url", env = "TIDEGATE_DEMO_VALKEY_URL", hide_env_values = true)]
    pub valkey_url: Option<String>,
    /// Use this PostgreSQL instead of a private one
    #[arg(long, requires = "valkey_url", env = "TIDEGATE_DEMO_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// Runs the verb.
pub async fn run(opts: Opts, _: &Context) -> Result<Exit, Failure> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        shown = show(&opts) => shown.map_err(Failure::from),
        // Dropping the show ends its processes and servers.
        signal = signals.next() => {
            say(&format!("{signal}: cleaning up"));
            Ok(Exit::Interrupted)
        }
    }
}

async fn show(opts: &Opts) -> Result<Exit, Trouble> {
    let servers = match (&opts.valkey_url, &opts.database_url) {
        (Some(valkey), Some(database)) => Servers::borrowed(valkey.clone().into(), database.clone().into()),
        _ => {
            say("starting a private Valkey and a private PostgreSQL");
            let servers = Servers::private(&[], &[]).await?;
            say(&format!("  {}", servers.how_to_look()));
            servers
        }
    };
    let stage = Stage::set("demo", &servers, (Delivery::Group, "1"), &SETTINGS).await?;
    say(&format!(
        "{PRODUCERS} producers add to {COUNTERS} counters for {} s; {} worker processes flush; one of them is killed (SIGKILL) every {} ms",
        opts.seconds, opts.processes, opts.kill_every
    ));
    let result = play(opts, &stage).await;
    if servers.are_borrowed() {
        let counters = (0..COUNTERS).map(|n| stage.pipeline.counter_of(&demo_id(n)));
        stage.clear(counters).await?;
    }
    result
}

async fn play(opts: &Opts, stage: &Stage) -> Result<Exit, Trouble> {
    let seen = Arc::new(Seen::default());
    let mut cast: Vec<Child> = (0..opts.processes).map(|_| worker(stage, &seen)).collect::<Result<_, _>>()?;
    let mut producers = JoinSet::new();
    let producing = Arc::new(AtomicBool::new(true));
    for _ in 0..PRODUCERS {
        let producer = Producer::connect(&stage.valkey, &stage.pipeline).await?;
        producers.spawn(produce(producer, opts.rate / PRODUCERS as u32, producing.clone(), seen.clone()));
    }

    let (started, mut picture) = (Instant::now(), Picture::new());
    let link = Link::open(&stage.valkey, "tidegate:demo").await?;
    let mut frame = tokio::time::interval(picture.every());
    let kill_every = Duration::from_millis(if opts.kill_every == 0 { u64::MAX >> 20 } else { opts.kill_every });
    let mut kill = tokio::time::interval_at(tokio::time::Instant::now() + kill_every, kill_every);
    let run_time = Duration::from_secs(opts.seconds);
    let drained = loop {
        tokio::select! {
            _ = kill.tick(), if started.elapsed() < run_time => {
                let victim = rand::rng().random_range(0..cast.len());
                cast[victim].kill().await?;
                cast[victim] = worker(stage, &seen)?;
                seen.kills.fetch_add(1, Ordering::Relaxed);
            }
            _ = frame.tick() => {
                if started.elapsed() >= run_time {
                    producing.store(false, Ordering::Relaxed);
                }
                let backlog = read::backlog(&link, &stage.pipeline.stream, &stage.pipeline.group()).await?;
                let landed = landed(stage).await?;
                picture.draw(&seen, &backlog, landed, started.elapsed());
                let over = producers.is_empty() || !producing.load(Ordering::Relaxed);
                if over && backlog.is_empty {
                    break true;
                }
                if started.elapsed() > run_time + DRAINED_WITHIN {
                    break false;
                }
            }
            Some(ended) = producers.join_next() => ended??,
        }
    };
    while let Some(ended) = producers.join_next().await {
        ended??;
    }
    // A producer may have added after the last look.
    while drained && !read::backlog(&link, &stage.pipeline.stream, &stage.pipeline.group()).await?.is_empty {
        frame.tick().await;
    }
    for worker in &mut cast {
        if let Some(pid) = worker.id().and_then(|pid| Pid::from_raw(pid as i32)) {
            kill_process(pid, Signal::TERM)?;
        }
        worker.wait().await?;
    }
    picture.end();
    prove(stage, &seen, drained).await
}

/// A worker process. Its log is read for the redeliveries it recognises.
fn worker(stage: &Stage, seen: &Arc<Seen>) -> std::io::Result<Child> {
    let seen = seen.clone();
    stage.worker(move |event| {
        if event["event"] == "recognised" {
            seen.recognised.fetch_add(event["entries"].as_u64().unwrap_or(0), Ordering::Relaxed);
        }
    })
}

/// Adds one to three to counters of which low ones are hot, at a steady rate, until told to stop.
async fn produce(producer: Producer, rate: u32, producing: Arc<AtomicBool>, seen: Arc<Seen>) -> Result<(), NotAdded> {
    let mut tick = tokio::time::interval(Duration::from_secs_f64(CHUNK as f64 / f64::from(rate.max(1))));
    while producing.load(Ordering::Relaxed) {
        tick.tick().await;
        let chunk: Vec<(String, i64)> = (0..CHUNK)
            .map(|_| {
                let heat: f64 = rand::rng().random();
                let counter = (f64::from(COUNTERS) * heat * heat * heat) as u32;
                (demo_id(counter), rand::rng().random_range(1..=3))
            })
            .collect();
        for outcome in producer.add_many(&chunk).await {
            outcome?;
            seen.produced.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn demo_id(counter: u32) -> String {
    format!("tidegate-demo:{counter}")
}

/// Compares every counter in Valkey with its row in PostgreSQL.
async fn prove(stage: &Stage, seen: &Seen, drained: bool) -> Result<Exit, Trouble> {
    let table = stage.table();
    let sql = format!("select id, value from {table}");
    let rows: Vec<(String, i64)> =
        stage.database.run(async |c| sqlx::query_as(AssertSqlSafe(sql)).fetch_all(c).await).await?;
    let rows: BTreeMap<String, i64> = rows.into_iter().collect();
    let connection = valkey::Connection::open(&stage.valkey, "tidegate:demo").await?;
    let (mut in_valkey, mut in_postgres, mut counters, mut unequal) = (0i64, 0i64, 0, Vec::new());
    for id in (0..COUNTERS).map(demo_id) {
        let reply = connection.call(valkey::Command::new("GET").arg(stage.pipeline.counter_of(&id))).await?;
        let live: i64 = reply.as_text().and_then(|text| text.parse().ok()).unwrap_or(0);
        let stored = rows.get(&id).copied().unwrap_or(0);
        (in_valkey, in_postgres) = (in_valkey + live, in_postgres + stored);
        counters += u32::from(live != 0);
        if live != stored {
            unequal.push(format!("{id}: {live} in Valkey, {stored} in PostgreSQL"));
        }
    }
    let count = |n: u64| HumanCount(n).to_string();
    say(&format!(
        "{} increments of {} counters; {} worker processes killed; {} redelivered entries recognised",
        count(seen.produced.load(Ordering::Relaxed)),
        counters,
        count(seen.kills.load(Ordering::Relaxed)),
        count(seen.recognised.load(Ordering::Relaxed)),
    ));
    say(&format!("sum in Valkey      {:>14}", count(in_valkey.unsigned_abs())));
    say(&format!("sum in PostgreSQL  {:>14}", count(in_postgres.unsigned_abs())));
    unequal.iter().take(10).for_each(|line| say(line));
    if unequal.is_empty() && drained {
        say("every counter is equal: nothing lost, nothing doubled");
        Ok(Exit::Ok)
    } else {
        say(&format!("{} counters differ{}", unequal.len(), if drained { "" } else { "; the backlog did not drain" }));
        Ok(Exit::Drift)
    }
}

/// How many entries have landed.
async fn landed(stage: &Stage) -> Result<u64, Trouble> {
    let stream = &stage.pipeline.stream;
    let landed: i64 = stage
        .database
        .run(async |c| {
            sqlx::query_scalar(
                "select coalesce(sum(entries), 0)::bigint from tidegate.ledger join tidegate.lanes using (lane) where stream = $1",
            )
            .bind(stream)
            .fetch_one(c)
            .await
        })
        .await?;
    Ok(landed.unsigned_abs())
}

/// What has happened so far.
#[derive(Debug, Default)]
struct Seen {
    produced: AtomicU64,
    kills: AtomicU64,
    recognised: AtomicU64,
}

/// The live picture: a line that changes on a terminal, lines elsewhere.
struct Picture {
    bar: Option<ProgressBar>,
    last: (Duration, u64),
}

impl Picture {
    fn new() -> Picture {
        let bar = std::io::stdout().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Picture { bar, last: (Duration::ZERO, 0) }
    }

    fn every(&self) -> Duration {
        if self.bar.is_some() { FRAMES.0 } else { FRAMES.1 }
    }

    fn draw(&mut self, seen: &Seen, backlog: &read::Backlog, landed: u64, at: Duration) {
        let count = |n: u64| HumanCount(n).to_string();
        let passed = (at - self.last.0).as_secs_f64().max(0.001);
        let per_second = (landed.saturating_sub(self.last.1)) as f64 / passed;
        self.last = (at, landed);
        let flow = format!(
            "{:>3} s  produced {:>9}  landed {:>9} ({:>7}/s)",
            at.as_secs(),
            count(seen.produced.load(Ordering::Relaxed)),
            count(landed),
            count(per_second as u64),
        );
        let rest = format!(
            "backlog {:>6} undelivered {:>6} pending  killed {:>3}  recognised {:>6}",
            backlog.undelivered.map_or_else(|| "?".into(), count),
            count(backlog.pending),
            seen.kills.load(Ordering::Relaxed),
            count(seen.recognised.load(Ordering::Relaxed)),
        );
        match &self.bar {
            Some(bar) => {
                // Two lines, so that it fits the narrowest terminal.
                bar.set_message(format!("{flow}\n         {rest}"));
                bar.tick();
            }
            None => say(&format!("{flow}  {rest}")),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
