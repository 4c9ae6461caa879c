//! The daemon: configuration, connections, tasks, wait, drain. The only place that spawns.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::config::{Config, Problems};
use crate::failpoint;
use crate::flow::caretaker::{self, Caretaker};
use crate::flow::flush::{self, Target, Unfit};
use crate::flow::read::{self, Limits};
use crate::flow::{ledger, worker};
use crate::keys;
use crate::metrics::{Metrics, Snapshot};
use crate::pipeline::Pipeline;
use crate::postgres::Database;
use crate::retry::{Fault, Trouble, Verdict, backoff};
use crate::schema;
use crate::shutdown::{Hangups, Signals, Stop};
use crate::valkey::{self, Link};

/// How often a line tells what was done, if anything was.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked whether the stream is empty.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// A worker that dies this often in a row is not started again.
const DEATHS_IN_A_ROW: u32 = 10;
/// A worker that lived this long did not die "in a row".
const LIVED_WELL: Duration = Duration::from_secs(60);
/// How long a daemon that was forced to stop waits for its tasks to notice.
const FORCED_GRACE: Duration = Duration::from_millis(200);

/// What is asked of this run of the daemon.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Stop when everything is settled.
    pub until_empty: bool,
    /// Migrate the database first.
    pub migrate: bool,
    /// Start although Valkey may evict the stream.
    pub accept_eviction: bool,
}

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The schema is not there, or is older.
    #[error("the database lacks {0} migrations: run `tidegate migrate`, or start with `tidegate run --migrate`")]
    NotMigrated(usize),
    /// The migration failed.
    #[error("{0}")]
    Migration(#[from] schema::Error),
    /// A pipeline's table does not fit.
    #[error("{0}")]
    Table(#[from] Unfit),
    /// A pipeline seems to have a new name.
    #[error("{0}")]
    Renamed(String),
    /// Valkey would throw the stream away to make room.
    #[error(
        "this Valkey evicts any key when its memory is full (maxmemory-policy {0}), undelivered entries included: set \
         noeviction or a volatile-* policy, or start with --accept-eviction"
    )]
    Evicting(String),
    /// A server's place is not configured.
    #[error("{0}")]
    Config(#[from] Problems),
    /// A server refuses.
    #[error("{0}: {1}")]
    Fault(Fault, &'static str),
    /// The operating system refuses.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// How the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Everything that was held is settled.
    Settled,
    /// Told twice, or out of time: what was held is pending.
    LeftPending,
    /// No worker was alive any more.
    NoWorkers,
}

/// Runs the daemon until a signal, or until the stream is empty. At SIGHUP it goes on with what `reload` gives.
pub async fn run(
    config: Config,
    options: Options,
    reload: impl Fn() -> Result<Config, Problems>,
) -> Result<Ending, Refusal> {
    raise_file_limit();
    let (mut signals, mut hangups) = (Signals::listen()?, Hangups::listen()?);
    let places = Places::named_in(&config)?;
    let lanes = {
        let preparing = prepare(&config, &places, options);
        tokio::select! {
            lanes = preparing => lanes?,
            signal = signals.next() => {
                info!(signal, "stopped before the start");
                return Ok(Ending::Settled);
            }
        }
    };
    let mut running = Running::start(config, places, lanes);
    loop {
        let reason = match running.watch(options, &mut signals, &mut hangups).await {
            Watched::Stop(reason) => reason,
            Watched::NoWorkers => {
                error!("no worker is alive");
                return Ok(Ending::NoWorkers);
            }
            Watched::Hangup => {
                let Some(next) = running.next(&reload, options).await else { continue };
                info!("the configuration was read again: settling what is held, then going on with it");
                failpoint::reached("reload.read");
                match running.stop(&mut signals).await {
                    Ending::Settled => running = next.start(),
                    ending => return Ok(ending),
                }
                failpoint::reached("reload.started");
                continue;
            }
        };
        info!(reason, "stopping: reading no more, settling what is held");
        failpoint::reached("stop.asked");
        let ending = running.stop(&mut signals).await;
        match ending {
            Ending::Settled => info!(phase = "settled", "stopped"),
            _ => warn!(
                phase = "left pending",
                "stopped; what was held is delivered again, and recognised where it was flushed"
            ),
        }
        return Ok(ending);
    }
}

/// What a configuration asks for, made sure of and not yet started.
struct Prepared {
    config: Config,
    places: Places,
    lanes: Vec<Lane>,
}

impl Prepared {
    fn start(self) -> Running {
        Running::start(self.config, self.places, self.lanes)
    }
}

/// The daemon at work with one configuration.
struct Running {
    config: Config,
    places: Places,
    lanes: Vec<Lane>,
    told: Vec<Snapshot>,
    stop: Stop,
    workers: JoinSet<()>,
    caretakers: JoinSet<()>,
}

/// Why the watch over a running daemon ended.
enum Watched {
    Stop(&'static str),
    NoWorkers,
    Hangup,
}

impl Running {
    fn start(config: Config, places: Places, lanes: Vec<Lane>) -> Running {
        let (stop, mut workers, mut caretakers) = (Stop::default(), JoinSet::new(), JoinSet::new());
        for (stream, lanes) in by_stream(&lanes) {
            let regrouped = Arc::new(Notify::new());
            let parts = caretaker_parts(&config, &places, stream, &lanes, regrouped.clone());
            caretakers.spawn(Caretaker::new(parts).run(stop.clone()));
            for lane in lanes {
                for slot in 0..config.run.workers {
                    let parts = worker_parts(&config, &places, lane, regrouped.clone());
                    workers.spawn(supervise(slot, parts, stop.clone()));
                }
            }
        }
        info!(workers = config.run.workers, pipelines = lanes.len(), version = env!("CARGO_PKG_VERSION"), "running");
        let told = lanes.iter().map(|lane| lane.metrics.snapshot()).collect();
        Running { config, places, lanes, told, stop, workers, caretakers }
    }

    /// Watches until there is something to be done.
    async fn watch(&mut self, options: Options, signals: &mut Signals, hangups: &mut Hangups) -> Watched {
        let mut report = tokio::time::interval(REPORT_EVERY);
        let empty = until_empty(&self.places.valkey, &self.lanes, options.until_empty);
        let mut empty = std::pin::pin!(empty);
        loop {
            tokio::select! {
                signal = signals.next() => return Watched::Stop(signal),
                () = hangups.next() => return Watched::Hangup,
                () = &mut empty => return Watched::Stop("everything is settled"),
                _ = report.tick() => tell(&self.lanes, &mut self.told),
                ended = self.workers.join_next() => if ended.is_none() {
                    return Watched::NoWorkers;
                },
            }
        }
    }

    /// What to go on with; nothing if that is not fit to be gone on with.
    async fn next(&self, reload: impl Fn() -> Result<Config, Problems>, options: Options) -> Option<Prepared> {
        let prepared = async {
            let config = reload()?;
            let places = Places::named_in(&config)?;
            let lanes = try_prepare(&config, &places.database, Options { migrate: false, ..options }).await?;
            Ok(Prepared { config, places, lanes })
        };
        match prepared.await {
            Ok(mut prepared) => {
                for lane in &mut prepared.lanes {
                    let before = self.lanes.iter().find(|before| before.target.lane() == lane.target.lane());
                    lane.metrics = before.map_or_else(Arc::default, |before| before.metrics.clone());
                }
                Some(prepared)
            }
            Err::<_, Refusal>(refusal) => {
                error!(%refusal, "the configuration cannot be used: going on with the one before");
                None
            }
        }
    }

    /// Stops in two phases.
    async fn stop(&mut self, signals: &mut Signals) -> Ending {
        self.stop.ask();
        let grace = self.config.stop.grace;
        let ending = drain(grace, signals, &self.stop, &mut self.workers, &mut self.caretakers).await;
        self.places.database.close().await;
        tell(&self.lanes, &mut self.told);
        ending
    }
}

/// A worker has two sockets, a caretaker one: with many pipelines that is more than the 1,024 files many systems begin with.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // If it is refused, the workers that find no socket say so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Where the two servers are.
struct Places {
    valkey: valkey::Address,
    database: Database,
}

impl Places {
    fn named_in(config: &Config) -> Result<Places, Problems> {
        let database = Database::new(config.postgres.address()?, config.postgres.connections);
        Ok(Places { valkey: config.valkey.address()?, database })
    }
}

/// One pipeline, ready to flow.
struct Lane {
    target: Target,
    metrics: Arc<Metrics>,
}

/// Makes sure that the database is what the daemon needs; waits for one that is out of reach.
async fn prepare(config: &Config, places: &Places, options: Options) -> Result<Vec<Lane>, Refusal> {
    // Out of reach, or not allowed to say: the workers will meet it, and tell.
    if let Ok(link) = Link::open(&places.valkey, "tidegate:start").await
        && let Ok(Some(policy)) = read::evicts_anything(&link).await
        && !options.accept_eviction
    {
        return Err(Refusal::Evicting(policy));
    }
    let mut trouble = Trouble::default();
    loop {
        let fault = match try_prepare(config, &places.database, options).await {
            Err(Refusal::Fault(fault, _) | Refusal::Migration(schema::Error::Fault(fault))) => fault,
            done => return done,
        };
        let response = trouble.met(&fault, Instant::now());
        if response.judgement.verdict != Verdict::Retry {
            return Err(Refusal::Fault(fault, response.judgement.advice));
        }
        if response.tell {
            warn!(%fault, advice = response.judgement.advice, "cannot start yet");
        }
        tokio::time::sleep(response.wait).await;
    }
}

async fn try_prepare(config: &Config, database: &Database, options: Options) -> Result<Vec<Lane>, Refusal> {
    let postgres = database.address();
    if options.migrate {
        let applied = schema::apply(postgres).await?;
        info!(applied, "the database is migrated");
    }
    let missing = schema::missing(postgres).await?.len();
    if missing > 0 {
        return Err(Refusal::NotMigrated(missing));
    }
    let refused = |fault| Refusal::Fault(fault, "");
    let mut lanes = Vec::new();
    for pipeline in &config.pipelines {
        let source = &config.valkey.source;
        database.run(async |c| flush::check_table(c, pipeline).await).await.map_err(refused)??;
        let namesake = database.run(async |c| ledger::namesake(c, source, pipeline).await).await.map_err(refused)?;
        if let Some(before) = namesake.filter(|name| !config.pipelines.iter().any(|p| p.name == *name)) {
            return Err(Refusal::Renamed(schema::renamed(pipeline, &before)));
        }
        let lane = database.run(async |c| ledger::lane(c, source, pipeline).await).await.map_err(refused)?;
        lanes.push(Lane { target: Target::new(pipeline.clone(), lane), metrics: Arc::default() });
    }
    Ok(lanes)
}

/// Keeps one worker alive: starts it again, under a new name, when one of its parts panics.
async fn supervise(slot: usize, parts: worker::Parts, stop: Stop) {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let (mut deaths, mut waits) = (0, backoff());
    while !stop.is_asked() {
        let started = Instant::now();
        let consumer = keys::consumer(&host, std::process::id(), slot, rand::random::<u64>() >> 16);
        let (taker, settler, acker) = worker::crew(parts.clone(), consumer.as_str().into());
        let mut tasks = JoinSet::new();
        tasks.spawn(taker.run(stop.clone()));
        tasks.spawn(settler.run(stop.clone()));
        tasks.spawn(acker.run(stop.clone()));
        let mut died = None;
        while let Some(ended) = tasks.join_next().await {
            died = died.or(ended.err());
        }
        if stop.is_asked() {
            return;
        }
        if started.elapsed() > LIVED_WELL {
            (deaths, waits) = (0, backoff());
        }
        deaths += 1;
        let cause = died.map_or_else(|| "a task ended".into(), |died| died.to_string());
        error!(%consumer, %cause, deaths, "a worker died; what it held stays pending and is reclaimed");
        if deaths >= DEATHS_IN_A_ROW {
            return;
        }
        tokio::time::sleep(waits.next().unwrap_or_default()).await;
    }
}

/// Waits for the tasks in two phases, and says which one ended it.
async fn drain(
    grace: Duration,
    signals: &mut Signals,
    stop: &Stop,
    workers: &mut JoinSet<()>,
    caretakers: &mut JoinSet<()>,
) -> Ending {
    let settled = async {
        while workers.join_next().await.is_some() {}
        while caretakers.join_next().await.is_some() {}
    };
    let mut settled = std::pin::pin!(settled);
    tokio::select! {
        () = &mut settled => return Ending::Settled,
        signal = signals.next() => warn!(signal, "told again: leaving what is held pending"),
        () = tokio::time::sleep(grace) => warn!(grace_ms = grace.as_millis() as u64, "stop.grace is over: leaving what is held pending"),
    }
    stop.force();
    let _ = tokio::time::timeout(FORCED_GRACE, settled).await;
    Ending::LeftPending
}

/// Resolves when every pipeline's group has settled everything in its stream; never, unless that is asked for.
async fn until_empty(valkey: &valkey::Address, lanes: &[Lane], asked: bool) {
    if !asked {
        std::future::pending::<()>().await;
    }
    let mut waits = backoff();
    loop {
        match Link::open(valkey, "tidegate:until-empty").await {
            Ok(link) => {
                waits = backoff();
                if watch_until_empty(&link, lanes).await.is_ok() {
                    return;
                }
            }
            // The workers meet it too, and tell.
            Err(_) => tokio::time::sleep(waits.next().unwrap_or_default()).await,
        }
    }
}

async fn watch_until_empty(link: &Link, lanes: &[Lane]) -> Result<(), Fault> {
    loop {
        let mut empty = true;
        for lane in lanes {
            let pipeline = lane.target.pipeline();
            empty &= read::backlog(link, &pipeline.stream, &pipeline.group()).await?.is_empty;
        }
        if empty {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Pipelines that read the same stream share a caretaker.
fn by_stream(lanes: &[Lane]) -> BTreeMap<&str, Vec<&Lane>> {
    let mut streams: BTreeMap<&str, Vec<&Lane>> = BTreeMap::new();
    for lane in lanes {
        streams.entry(&lane.target.pipeline().stream).or_default().push(lane);
    }
    streams
}

fn worker_parts(config: &Config, places: &Places, lane: &Lane, regrouped: Arc<Notify>) -> worker::Parts {
    worker::Parts {
        valkey: places.valkey.clone(),
        database: places.database.clone(),
        target: lane.target.clone(),
        limits: Limits {
            max_entries: config.batch.max_entries,
            max_bytes: config.batch.max_bytes,
            read_count: config.batch.read_count,
            max_entry_bytes: config.batch.max_entry_bytes,
        },
        dead_after: config.reclaim.dead_after,
        sweep_every: config.reclaim.sweep_every,
        max_deliveries: config.reclaim.max_deliveries,
        metrics: lane.metrics.clone(),
        regrouped,
    }
}

fn caretaker_parts(
    config: &Config,
    places: &Places,
    stream: &str,
    lanes: &[&Lane],
    regrouped: Arc<Notify>,
) -> caretaker::Parts {
    caretaker::Parts {
        valkey: places.valkey.clone(),
        database: places.database.clone(),
        source: config.valkey.source.clone(),
        stream: stream.to_owned(),
        targets: lanes.iter().map(|lane| (lane.target.clone(), lane.metrics.clone())).collect(),
        retention: config.trim.retention,
        trim_every: config.trim.every,
        compact_margin: config.compact.margin,
        compact_every: config.compact.every,
        regrouped,
    }
}

/// Tells what was done since the last time, if anything was.
fn tell(lanes: &[Lane], told: &mut [Snapshot]) {
    for (lane, told) in lanes.iter().zip(told) {
        let now = lane.metrics.snapshot();
        if now == *told {
            continue;
        }
        *told = now;
        let pipeline: &Pipeline = lane.target.pipeline();
        info!(
            pipeline = %pipeline.name, applied = now.applied, recognised = now.recognised, buried = now.buried,
            collided = now.collided, rows = now.rows, flushes = now.flushes, reclaimed = now.reclaimed, dropped = now.dropped,
            lost_upstream = now.lost_upstream, trimmed = now.trimmed, acks_dropped = now.acks_dropped, "so far"
        );
    }
}
