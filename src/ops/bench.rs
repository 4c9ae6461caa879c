//! `tidegate bench`: how fast, how soon and at what cost deltas land on given servers, and whether exactly.
//!
//! A load generator and a meter around worker processes of this very program, on a stream and a table of their own. What is
//! measured is measured from outside: the backlog in Valkey, rows that have become visible in PostgreSQL, the processes'
//! CPU time and memory as the operating system tells them.

pub mod load;
mod recovery;
mod report;
mod watch;
mod workers;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use sqlx::AssertSqlSafe;
use tokio::time::MissedTickBehavior;

use self::load::{LONGEST_ID, Load};
use self::recovery::Recovery;
use self::watch::Watch;
use self::workers::Workers;
use super::complete::{Name, by};
use super::context::Format;
use super::stage::{Servers, Stage, Trouble};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::flow::read;
use crate::model::entry::EntryId;
use crate::model::pipeline::{Delivery, Pipeline};
use crate::model::shard::shard_of;
use crate::pauses;
use crate::postgres::schema;
use crate::shutdown::Signals;
use crate::valkey::{Command, Connection, Link, info};

/// Entries that one script adds.
const CHUNK: usize = 1_000;
/// A chunk that is spread over shards is as many times larger, up to this.
const CHUNK_SHARDS: usize = 64;
/// Scripts under way at once.
const CHUNKS_UNDER_WAY: usize = 8;
/// How often the backlog is looked at while it drains.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How often it is looked what has become visible: a part of every latency.
const POLL_EVERY: Duration = Duration::from_millis(1);
/// How often entries are sent at a steady rate.
const SEND_EVERY: Duration = Duration::from_millis(1);
/// The limit for the last entries of a steady load to land.
const LANDED_WITHIN: Duration = Duration::from_secs(60);

/// How long before they begin together workers know when that is: they look once a second.
const BEGIN_TOGETHER_IN: Duration = Duration::from_secs(4);

/// Adds a chunk of entries: KEYS stream; ARGV id, amount, id, amount …
const ADD: &str = "for i = 1, #ARGV, 2 do redis.call('XADD', KEYS[1], '*', 'id', ARGV[i], 'amount', ARGV[i + 1]) end";

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Phase {
    /// How fast a backlog drains
    Drain,
    /// How soon entries land at a steady rate
    Steady,
    /// Drain, then steady
    Both,
    /// How soon the entries of a killed worker process are settled by its peers
    Recovery,
}

/// How keys are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// All alike
    Uniform,
    /// A few hot ones
    Zipf,
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Use private throw-away servers, whose commits wait for the disk, instead of the configured ones
    #[arg(long)]
    pub sandbox: bool,
    /// The private Valkey writes no append-only file
    #[arg(long, requires = "sandbox")]
    pub no_aof: bool,
    /// How the stream is read: group or exclusive
    #[arg(long, default_value = "group", value_parser = delivery, add = by(Name::Delivery))]
    pub delivery: Delivery,
    /// Streams that the entries are spread over, while a backlog drains
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub shards: u16,
    /// What is measured
    #[arg(long, value_enum, default_value_t = Phase::Both)]
    pub phase: Phase,
    /// Entries in the backlog that is drained
    #[arg(long, default_value = "1000000", value_parser = number)]
    pub entries: u64,
    /// How often it is drained, each time anew
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub runs: u8,
    /// Entries a second at the steady rate
    #[arg(long, default_value = "5000", value_parser = number)]
    pub rate: u64,
    /// For how long, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// How often a worker process is killed while recovery is measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// Different keys
    #[arg(long, default_value = "1000", value_parser = number)]
    pub keys: u64,
    /// How keys are drawn
    #[arg(long, value_enum, default_value_t = Shape::Zipf)]
    pub distribution: Shape,
    /// Zipf's exponent
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub skew: f64,
    /// Amounts, from and to
    #[arg(long, default_value = "1-9", value_parser = amounts)]
    pub amounts: RangeInclusive<i64>,
    /// Lengths of ids in bytes, from and to
    #[arg(long, default_value = "6-40", value_parser = id_bytes)]
    pub id_bytes: RangeInclusive<usize>,
    /// Worker processes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub processes: u8,
    /// Workers in each; default: run.workers of the configuration
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..))]
    pub workers: Option<u8>,
    /// With --phase drain: the clock begins when all worker processes are at work, and not when they are started
    #[arg(long)]
    pub without_start: bool,
    /// Entries in a batch; default: batch.max_entries of the configuration
    #[arg(long, value_parser = number)]
    pub batch: Option<u64>,
    /// Where the load begins; default: anywhere
    #[arg(long)]
    pub seed: Option<u64>,
    /// One JSON object instead of a table; the same as --output json
    #[arg(long)]
    pub json: bool,
}

impl Opts {
    /// How many worker processes run: a killed one needs a peer.
    fn processes(&self) -> u8 {
        if self.phase == Phase::Recovery { self.processes.max(2) } else { self.processes }
    }
}

/// A whole number above zero, perhaps with underscores, perhaps with k or M behind.
fn number(text: &str) -> Result<u64, String> {
    let (digits, times) = match text.as_bytes().last() {
        Some(b'k') => (&text[..text.len() - 1], 1_000),
        Some(b'M') => (&text[..text.len() - 1], 1_000_000),
        _ => (text, 1),
    };
    let number = digits.replace('_', "").parse::<u64>().ok().and_then(|number| number.checked_mul(times));
    number
        .filter(|number| (1..=1_000_000_000).contains(number))
        .ok_or("say a number from 1 to 1000M, such as 100k".into())
}

fn delivery(text: &str) -> Result<Delivery, String> {
    let all = [Delivery::Group, Delivery::Exclusive];
    all.into_iter().find(|delivery| delivery.word() == text).ok_or("say group or exclusive".into())
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|skew| (0.1..=10.0).contains(skew)).ok_or("say a number from 0.1 to 10".into())
}

fn range<T: std::str::FromStr + PartialOrd>(text: &str) -> Option<RangeInclusive<T>> {
    let (from, to) = text.split_once('-')?;
    Some(from.parse().ok()?..=to.parse().ok()?).filter(|range| range.start() <= range.end())
}

fn amounts(text: &str) -> Result<RangeInclusive<i64>, String> {
    range(text).ok_or("say two whole numbers, such as 1-9".into())
}

fn id_bytes(text: &str) -> Result<RangeInclusive<usize>, String> {
    let fits = |range: &RangeInclusive<usize>| *range.start() >= 6 && *range.end() <= LONGEST_ID;
    range(text).filter(fits).ok_or(format!("say two lengths from 6 to {LONGEST_ID}, such as 6-40"))
}

/// Runs the verb.
pub async fn run(mut opts: Opts, context: &Context) -> Result<Exit, Failure> {
    if opts.shards > 1 && opts.phase != Phase::Drain {
        return Err(Failure::usage("--shards is about --phase drain"));
    }
    opts.json |= context.format == Format::Json;
    let config = match opts.sandbox {
        true => None,
        false => Some(context.configured(Vec::new(), Needs::BOTH)?),
    };
    let mut signals = Signals::listen()?;
    let servers = servers(&opts, config.as_ref()).await?;
    let stage = set(&opts, &servers, config.as_ref()).await?;
    let measured = tokio::select! {
        measured = measure(&opts, &stage) => measured.map_err(Failure::from),
        // Dropping the measurement ends its processes.
        signal = signals.next() => {
            context.say(&format!("{signal}: cleaning up"));
            Ok(Exit::Interrupted)
        }
    };
    if servers.are_borrowed()
        && let Err(trouble) = stage.clear([]).await
    {
        let (stream, table) = (&stage.pipeline.stream, stage.table());
        let left =
            format!("could not take away stream {stream}, table {table} and its rows in schema tidegate: {trouble}");
        let Err(first) = measured else { return Err(Failure::new(Exit::Error, left)) };
        context.say(&left);
        return Err(first);
    }
    measured
}

/// The servers that are measured: the configured ones, or private ones.
async fn servers(opts: &Opts, config: Option<&Config>) -> Result<Servers, Failure> {
    match config {
        Some(config) => {
            let missing = schema::missing(&config.postgres.address()?).await?.len();
            if missing > 0 {
                let words =
                    format!("the database lacks {missing} migrations: run `tidegate migrate`, or bench with --sandbox");
                return Err(Failure::new(Exit::Config, words));
            }
            Ok(Servers::borrowed(config.valkey.address()?.url().clone(), config.postgres.address()?.url))
        }
        None => {
            let durable = ["--appendonly", "yes", "--appendfsync", "everysec"];
            let arguments = if opts.no_aof { &[][..] } else { &durable[..] };
            let private = Servers::private(arguments, &["fsync=on", "full_page_writes=on", "max_wal_size=4GB"]).await;
            private.map_err(Failure::from)
        }
    }
}

/// A stage for the load, on these servers.
async fn set(opts: &Opts, servers: &Servers, config: Option<&Config>) -> Result<Stage, Trouble> {
    let workers = opts.workers.map(|n| n.to_string()).or(config.map(|config| config.run.workers.to_string()));
    let batch = opts.batch.map(|n| n.to_string()).or(config.map(|config| config.batch.max_entries.to_string()));
    let shards = opts.shards.to_string();
    let mut settings: Vec<(&str, &str)> = vec![("TIDEGATE__TRIM__RETENTION", "24h")];
    settings.extend(workers.as_deref().map(|workers| ("TIDEGATE__RUN__WORKERS", workers)));
    settings.extend(batch.as_deref().map(|batch| ("TIDEGATE__BATCH__MAX_ENTRIES", batch)));
    let small = batch.as_deref().filter(|batch| batch.parse().is_ok_and(|batch: u64| batch < 1_000));
    settings.extend(small.map(|batch| ("TIDEGATE__BATCH__READ_COUNT", batch)));
    Stage::set("bench", servers, (opts.delivery, &shards), &settings).await
}

async fn measure(opts: &Opts, stage: &Stage) -> Result<Exit, Trouble> {
    let load = Load {
        keys: opts.keys,
        skew: (opts.distribution == Shape::Zipf).then_some(opts.skew),
        amounts: opts.amounts.clone(),
        id_bytes: opts.id_bytes.clone(),
        seed: opts.seed.unwrap_or_else(|| rand::random::<u64>() >> 12),
    };
    let (mut drains, mut steady, mut recovery) = (Vec::new(), None, None);
    if matches!(opts.phase, Phase::Drain | Phase::Both) {
        for _ in 0..opts.runs {
            drains.push(drain(opts, stage, &load).await?);
        }
    }
    if matches!(opts.phase, Phase::Steady | Phase::Both) {
        steady = Some(hold(opts, stage, &load).await?);
    }
    if opts.phase == Phase::Recovery {
        recovery = Some(recovery::recover(opts, stage, &load).await?);
    }
    let exact = drains.iter().all(|drain| drain.exact)
        && steady.as_ref().is_none_or(|steady| steady.exact)
        && recovery.as_ref().is_none_or(|recovery| recovery.exact);
    let measured = Measured { drains, steady, recovery, exact };
    report::tell(opts, stage, &load, &measured).await?;
    Ok(if exact { Exit::Ok } else { Exit::Drift })
}

/// What was measured.
#[derive(Debug)]
struct Measured {
    drains: Vec<Drain>,
    steady: Option<Steady>,
    recovery: Option<Recovery>,
    exact: bool,
}

/// One backlog drained.
#[derive(Debug)]
struct Drain {
    seconds: f64,
    rows: u64,
    cpu_seconds: Option<f64>,
    peak_memory_bytes: Option<u64>,
    bytes_per_entry: f64,
    /// By the server's own account, whoever else asks it included.
    valkey_seconds: Option<f64>,
    table: Upkeep,
    exact: bool,
}

/// What flushes leave PostgreSQL to look after.
#[derive(Debug, Clone, Copy)]
struct Upkeep {
    /// Updates of rows until now.
    updates: i64,
    /// Those of them that touched no index (HOT), whose remains the next one of the page takes away.
    hot: i64,
    /// What the table takes, its index included.
    bytes: i64,
}

impl Upkeep {
    async fn of(stage: &Stage) -> Result<Upkeep, Trouble> {
        let table = stage.table();
        let query = format!(
            "select coalesce(n_tup_upd, 0), coalesce(n_tup_hot_upd, 0), pg_total_relation_size(relid) from pg_stat_user_tables where relid = '{table}'::regclass"
        );
        let fetch = async |c: &mut _| sqlx::query_as(AssertSqlSafe(query)).fetch_one(c).await;
        let (updates, hot, bytes) = stage.database.run(fetch).await?;
        Ok(Upkeep { updates, hot, bytes })
    }

    /// Since this was so.
    fn since(self, before: Upkeep) -> Upkeep {
        Upkeep { updates: self.updates - before.updates, hot: self.hot - before.hot, ..self }
    }
}

async fn drain(opts: &Opts, stage: &Stage, load: &Load) -> Result<Drain, Trouble> {
    start_anew(stage).await?;
    let table_before = Upkeep::of(stage).await?;
    let link = Link::open(&stage.valkey, "tidegate:bench").await?;
    let pipeline = &stage.pipeline;
    add_all(link.commands(), pipeline, load, opts.entries).await?;
    let streams = stage.streams();
    let mut memory = 0;
    for stream in &streams {
        let used = Command::new("MEMORY").arg("USAGE").arg(stream).arg("SAMPLES").arg(0);
        memory += link.commands().call(used).await?.as_int().unwrap_or(0);
    }
    let bytes_per_entry = memory as f64 / opts.entries as f64;

    let workers = if opts.without_start {
        start_together(opts.processes, stage).await?
    } else {
        (Workers::start(opts.processes, stage)?, Instant::now(), None)
    };
    let (mut workers, started, cpu_before) = workers;
    let valkey_before = info::cpu_seconds(link.commands()).await?;
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        workers.all_live()?;
        if read::are_empty(&link, &streams, &pipeline.group()).await? {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let valkey_seconds =
        info::cpu_seconds(link.commands()).await?.zip(valkey_before).map(|(after, before)| after - before);
    let (cpu_seconds, peak_memory_bytes) = workers.cost();
    let cpu_seconds = cpu_seconds.map(|seconds| seconds - cpu_before.unwrap_or(0.0));
    let rows = workers.stop().await?;
    // Sessions that have ended have told all of their statistics.
    let table = Upkeep::of(stage).await?.since(table_before);
    let exact = is_exact(stage, load, opts.entries).await?;
    Ok(Drain { seconds, rows, cpu_seconds, peak_memory_bytes, bytes_per_entry, valkey_seconds, table, exact })
}

/// Starts worker processes that begin to read at the same moment, when all of them are at work: the pipeline is paused until then, and each knows when that
/// ends. Gives that moment, which has come, and what they have cost until then.
async fn start_together(processes: u8, stage: &Stage) -> Result<(Workers, Instant, Option<f64>), Trouble> {
    let (source, name) = (&stage.config.valkey.source, &stage.pipeline.name);
    let pause =
        async |duration| stage.database.run(async |c| pauses::pause(c, source, name, duration, None, None).await).await;
    pause(None).await?;
    let mut workers = Workers::start(processes, stage)?;
    let (mut look, deadline) = (tokio::time::interval(LOOK_EVERY), Instant::now() + LANDED_WITHIN);
    while !workers.are_running() {
        look.tick().await;
        workers.all_live()?;
        if Instant::now() > deadline {
            return Err("not all worker processes have begun to run".into());
        }
    }
    // They look for pauses once a second.
    let begins = Instant::now() + BEGIN_TOGETHER_IN;
    pause(Some(BEGIN_TOGETHER_IN)).await?;
    tokio::time::sleep_until(begins.into()).await;
    let cpu = workers.cost().0;
    Ok((workers, begins, cpu))
}

/// A steady rate held.
#[derive(Debug)]
struct Steady {
    latency: Histogram<u64>,
    cpu_share: Option<f64>,
    exact: bool,
}

/// Sends entries at a steady rate and looks when each of them becomes visible.
async fn hold(opts: &Opts, stage: &Stage, load: &Load) -> Result<Steady, Trouble> {
    start_anew(stage).await?;
    let (connection, stream) = (Connection::open(&stage.valkey, "tidegate:bench").await?, &stage.pipeline.stream);
    let mut workers = Workers::start(opts.processes, stage)?;
    let (mut watch, total) = (Watch::begin(stage).await?, opts.rate * opts.seconds);
    let (mut deltas, mut sent, mut under_way) = (load.deltas(), 0, FuturesUnordered::new());
    // The first entry finds a worker that is still connecting.
    let warmed = add_one(&connection, stream, deltas.next().ok_or("no load")?).await?;
    watch.expect(warmed);
    while watch.is_waiting() {
        watch.look(stage).await?;
        workers.all_live()?;
    }
    watch.latency.reset();

    let (started, cpu_before) = (Instant::now(), workers.cost().0);
    let (mut send, mut poll) = (tokio::time::interval(SEND_EVERY), tokio::time::interval(POLL_EVERY));
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut deadline = None;
    while sent < total || !under_way.is_empty() || watch.is_waiting() {
        tokio::select! {
            _ = send.tick(), if sent < total => {
                let due = (started.elapsed().as_secs_f64() * opts.rate as f64) as u64;
                while sent < due.min(total) {
                    under_way.push(add_one(&connection, stream, deltas.next().ok_or("no load")?));
                    sent += 1;
                }
            }
            Some(added) = under_way.next() => watch.expect(added?),
            _ = poll.tick() => watch.look(stage).await?,
        }
        if sent == total && *deadline.get_or_insert_with(|| Instant::now() + LANDED_WITHIN) < Instant::now() {
            return Err("the last entries did not land: is the rate too high, or a worker in trouble?".into());
        }
        workers.all_live()?;
    }
    let took = started.elapsed().as_secs_f64();
    let cpu_share = workers.cost().0.zip(cpu_before).map(|(after, before)| (after - before) / took);
    workers.stop().await?;
    let exact = is_exact(stage, load, total + 1).await?;
    Ok(Steady { latency: watch.latency, cpu_share, exact })
}

/// Adds one entry; gives its id, and when it was sent.
async fn add_one(
    connection: &Connection,
    stream: &str,
    (id, amount): (String, i64),
) -> Result<(EntryId, Instant), Trouble> {
    let command = Command::new("XADD").arg(stream).arg("*").arg("id").arg(id).arg("amount").arg(amount);
    let sent = Instant::now();
    let reply = connection.call(command).await?;
    let id = reply.as_text().and_then(|id| id.parse().ok()).ok_or("XADD gave no id")?;
    Ok((id, sent))
}

/// Adds many entries, as fast as it goes, each to its shard's stream.
async fn add_all(connection: &Connection, pipeline: &Pipeline, load: &Load, entries: u64) -> Result<(), Trouble> {
    let (mut deltas, mut left, shards) = (load.deltas(), entries as usize, pipeline.shards);
    let chunks = std::iter::from_fn(|| {
        let size = left.min(CHUNK * usize::from(shards).min(CHUNK_SHARDS));
        left -= size;
        let mut of_shards: BTreeMap<u16, Vec<(String, i64)>> = BTreeMap::new();
        for delta in deltas.by_ref().take(size) {
            of_shards.entry(if shards > 1 { shard_of(&delta.0, shards) } else { 0 }).or_default().push(delta);
        }
        (size > 0).then_some(of_shards)
    });
    let mut adding = futures_util::stream::iter(chunks.flatten().map(|(shard, chunk)| {
        let mut command = Command::new("EVAL").arg(ADD).arg(1).arg(pipeline.stream_of(shard));
        for (id, amount) in chunk {
            command = command.arg(id).arg(amount);
        }
        connection.call(command)
    }))
    .buffered(CHUNKS_UNDER_WAY);
    while let Some(added) = adding.next().await {
        added?;
    }
    Ok(())
}

/// An empty stream without a group, an empty table, an empty ledger.
async fn start_anew(stage: &Stage) -> Result<(), Trouble> {
    let connection = Connection::open(&stage.valkey, "tidegate:bench").await?;
    connection.call(Command::new("UNLINK").args(stage.streams())).await?;
    // Without its lane a new stream is a new beginning; the name is one of our own making.
    let name = &stage.pipeline.name;
    stage
        .execute(format!(
            "truncate {}; delete from tidegate.ledger where lane in (select lane from tidegate.lanes where pipeline = '{name}');
             delete from tidegate.lanes where pipeline = '{name}'",
            stage.table()
        ))
        .await?;
    stage.execute(format!("vacuum analyze {}", stage.table())).await
}

/// Whether every row is what the load asks for, and there is no other.
async fn is_exact(stage: &Stage, load: &Load, entries: u64) -> Result<bool, Trouble> {
    let mut expected: HashMap<String, i64> = HashMap::new();
    load.deltas().take(entries as usize).for_each(|(id, amount)| *expected.entry(id).or_insert(0) += amount);
    let query = format!("select id, value from {}", stage.table());
    let rows: HashSet<(String, i64)> = stage
        .database
        .run(async |c| sqlx::query_as(AssertSqlSafe(query)).fetch_all(c).await)
        .await?
        .into_iter()
        .collect();
    Ok(rows.len() == expected.len() && expected.into_iter().all(|row| rows.contains(&row)))
}
