//! `tidegate bench`: how fast, how soon and at what cost deltas land on given servers, and whether exactly.
//!
//! A load generator and a meter around worker processes of this very program, on a stream and a table of their own. What is
//! measured is measured from outside: the backlog in Valkey, rows that have become visible in PostgreSQL, the processes'
//! CPU time and memory as the operating system tells them.

pub mod load;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Row};
use tokio::process::Child;
use tokio::time::MissedTickBehavior;

use self::load::{LONGEST_ID, Load};
use super::Exit;
use super::stage::{Servers, Stage, Trouble, say};
use crate::config::Config;
use crate::entry::EntryId;
use crate::flow::read;
use crate::schema;
use crate::shutdown::Signals;
use crate::valkey::{Command, Connection, Link};

/// Entries that one script adds.
const CHUNK: usize = 1_000;
/// Scripts under way at once.
const CHUNKS_UNDER_WAY: usize = 8;
/// How often the backlog is looked at while it drains.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How often it is looked what has become visible: a part of every latency.
const POLL_EVERY: Duration = Duration::from_millis(1);
/// How often entries are sent at a steady rate.
const SEND_EVERY: Duration = Duration::from_millis(1);
/// The longest latency that is told apart, in microseconds.
const LONGEST_LATENCY: u64 = 3_600_000_000;
/// The limit for the last entries of a steady load to land.
const LANDED_WITHIN: Duration = Duration::from_secs(60);

/// Adds a chunk of entries: KEYS stream; ARGV id, amount, id, amount …
const ADD: &str = "for i = 1, #ARGV, 2 do redis.call('XADD', KEYS[1], '*', 'id', ARGV[i], 'amount', ARGV[i + 1]) end";

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Phase {
    /// How fast a backlog drains
    Drain,
    /// How soon entries land at a steady rate
    Steady,
    /// One, then the other
    Both,
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
pub struct Args {
    /// Use private throw-away servers, whose commits wait for the disk, instead of the configured ones
    #[arg(long)]
    pub sandbox: bool,
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
    /// Entries in a batch; default: batch.max_entries of the configuration
    #[arg(long, value_parser = number)]
    pub batch: Option<u64>,
    /// Where the load begins; default: anywhere
    #[arg(long)]
    pub seed: Option<u64>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
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

/// Runs the verb. `config` is needed unless it is about private servers.
pub async fn run(args: &Args, config: Option<&Config>) -> std::io::Result<Exit> {
    let mut signals = Signals::listen()?;
    let (servers, stage) = match set(args, config).await {
        Ok(Ok(set)) => set,
        Ok(Err(exit)) => return Ok(exit),
        Err(trouble) => return Ok(failed(&trouble)),
    };
    let exit = tokio::select! {
        measured = measure(args, &stage) => measured.unwrap_or_else(|trouble| failed(&trouble)),
        // Dropping the measurement ends its processes.
        signal = signals.next() => {
            eprintln!("{signal}: cleaning up");
            Exit::Interrupted
        }
    };
    if servers.are_borrowed()
        && let Err(trouble) = stage.clear([]).await
    {
        let (stream, table) = (&stage.pipeline.stream, stage.table());
        eprintln!(
            "tidegate bench: could not take away stream {stream}, table {table} and its rows in schema tidegate: {trouble}"
        );
        return Ok(Exit::Error);
    }
    Ok(exit)
}

fn failed(trouble: &Trouble) -> Exit {
    eprintln!("tidegate bench: {trouble}");
    Exit::Error
}

async fn set(args: &Args, config: Option<&Config>) -> Result<Result<(Servers, Stage), Exit>, Trouble> {
    let servers = match config {
        Some(config) => {
            let missing = schema::missing(&config.postgres.address()?).await?.len();
            if missing > 0 {
                eprintln!(
                    "tidegate bench: the database lacks {missing} migrations: run `tidegate migrate`, or bench with --sandbox"
                );
                return Ok(Err(Exit::Config));
            }
            Servers::borrowed(config.valkey.address()?.url, config.postgres.address()?.url)
        }
        None => Servers::private(&["fsync=on", "full_page_writes=on", "max_wal_size=4GB"]).await?,
    };
    let workers = args.workers.map(|n| n.to_string()).or(config.map(|config| config.run.workers.to_string()));
    let batch = args.batch.map(|n| n.to_string()).or(config.map(|config| config.batch.max_entries.to_string()));
    let mut settings: Vec<(&str, &str)> = vec![("TIDEGATE__TRIM__RETENTION", "24h")];
    settings.extend(workers.as_deref().map(|workers| ("TIDEGATE__RUN__WORKERS", workers)));
    settings.extend(batch.as_deref().map(|batch| ("TIDEGATE__BATCH__MAX_ENTRIES", batch)));
    let small = batch.as_deref().filter(|batch| batch.parse().is_ok_and(|batch: u64| batch < 1_000));
    settings.extend(small.map(|batch| ("TIDEGATE__BATCH__READ_COUNT", batch)));
    let stage = Stage::set("bench", &servers, &settings).await?;
    Ok(Ok((servers, stage)))
}

async fn measure(args: &Args, stage: &Stage) -> Result<Exit, Trouble> {
    let load = Load {
        keys: args.keys,
        skew: (args.distribution == Shape::Zipf).then_some(args.skew),
        amounts: args.amounts.clone(),
        id_bytes: args.id_bytes.clone(),
        seed: args.seed.unwrap_or_else(|| rand::random::<u64>() >> 12),
    };
    let (mut drains, mut steady) = (Vec::new(), None);
    if args.phase != Phase::Steady {
        for _ in 0..args.runs {
            drains.push(drain(args, stage, &load).await?);
        }
    }
    if args.phase != Phase::Drain {
        steady = Some(hold(args, stage, &load).await?);
    }
    let exact = drains.iter().all(|drain| drain.exact) && steady.as_ref().is_none_or(|steady| steady.exact);
    tell(args, stage, &load, &drains, steady.as_ref(), exact).await?;
    Ok(if exact { Exit::Ok } else { Exit::Drift })
}

/// One backlog drained.
#[derive(Debug)]
struct Drain {
    seconds: f64,
    rows: u64,
    cpu_seconds: Option<f64>,
    peak_memory_bytes: Option<u64>,
    bytes_per_entry: f64,
    exact: bool,
}

async fn drain(args: &Args, stage: &Stage, load: &Load) -> Result<Drain, Trouble> {
    start_anew(stage).await?;
    let link = Link::open(&stage.valkey, "tidegate:bench").await?;
    let stream = &stage.pipeline.stream;
    add_all(link.commands(), stream, load, args.entries).await?;
    let memory = link.commands().call(Command::new("MEMORY").arg("USAGE").arg(stream).arg("SAMPLES").arg(0)).await?;
    let bytes_per_entry = memory.as_int().unwrap_or(0) as f64 / args.entries as f64;

    let started = Instant::now();
    let mut workers = Workers::start(args.processes, stage)?;
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        workers.all_live()?;
        if read::backlog(&link, stream, &stage.pipeline.group()).await?.is_empty {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let (cpu_seconds, peak_memory_bytes) = workers.cost();
    let rows = workers.stop().await?;
    let exact = is_exact(stage, load, args.entries).await?;
    Ok(Drain { seconds, rows, cpu_seconds, peak_memory_bytes, bytes_per_entry, exact })
}

/// A steady rate held.
#[derive(Debug)]
struct Steady {
    latency: Histogram<u64>,
    cpu_share: Option<f64>,
    exact: bool,
}

/// Sends entries at a steady rate and looks when each of them becomes visible.
async fn hold(args: &Args, stage: &Stage, load: &Load) -> Result<Steady, Trouble> {
    start_anew(stage).await?;
    let (connection, stream) = (Connection::open(&stage.valkey, "tidegate:bench").await?, &stage.pipeline.stream);
    let mut workers = Workers::start(args.processes, stage)?;
    let (mut watch, total) = (Watch::begin(stage).await?, args.rate * args.seconds);
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
                let due = (started.elapsed().as_secs_f64() * args.rate as f64) as u64;
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

/// Adds many entries, as fast as it goes.
async fn add_all(connection: &Connection, stream: &str, load: &Load, entries: u64) -> Result<(), Trouble> {
    let (mut deltas, mut left) = (load.deltas(), entries as usize);
    let chunks = std::iter::from_fn(|| {
        let chunk: Vec<(String, i64)> = deltas.by_ref().take(left.min(CHUNK)).collect();
        left -= chunk.len();
        (!chunk.is_empty()).then_some(chunk)
    });
    let mut adding = futures_util::stream::iter(chunks.map(|chunk| {
        let mut command = Command::new("EVAL").arg(ADD).arg(1).arg(stream);
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

/// Entries on their way, and what has become visible of the ledger.
struct Watch {
    lane: i32,
    waiting: BTreeMap<EntryId, Instant>,
    /// Rows seen: first id, last id, and when. An entry's id may be told later than its row.
    seen: BTreeMap<EntryId, (EntryId, Instant)>,
    latency: Histogram<u64>,
}

impl Watch {
    /// Waits until the workers have registered their lane.
    async fn begin(stage: &Stage) -> Result<Watch, Trouble> {
        let (name, mut poll) = (&stage.pipeline.name, tokio::time::interval(LOOK_EVERY));
        let deadline = Instant::now() + LANDED_WITHIN;
        loop {
            poll.tick().await;
            let query = "select lane from tidegate.lanes where pipeline = $1";
            let lane =
                stage.database.run(async |c| sqlx::query_scalar(query).bind(name).fetch_optional(c).await).await?;
            if let Some(lane) = lane {
                let latency = Histogram::new_with_bounds(1, LONGEST_LATENCY, 3)?;
                return Ok(Watch { lane, waiting: BTreeMap::new(), seen: BTreeMap::new(), latency });
            }
            if Instant::now() > deadline {
                return Err("no worker has begun".into());
            }
        }
    }

    fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn expect(&mut self, (id, sent): (EntryId, Instant)) {
        match self.seen.range(..=id).next_back() {
            Some((_, (last, visible))) if *last >= id => self.record(sent, *visible),
            _ => drop(self.waiting.insert(id, sent)),
        }
    }

    /// Looks once for new rows, from the oldest entry that is waited for.
    async fn look(&mut self, stage: &Stage) -> Result<(), Trouble> {
        let Some((oldest, _)) = self.waiting.first_key_value() else { return Ok(()) };
        let (lane, oldest) = (self.lane, oldest.number().to_string());
        let rows = stage
            .database
            .run(async |c| {
                sqlx::query(
                    "select lower(ids)::text, upper(ids)::text from tidegate.ledger
                     where lane = $1 and ids && numrange($2::numeric, null)",
                )
                .bind(lane)
                .bind(oldest)
                .fetch_all(c)
                .await
            })
            .await?;
        let visible = Instant::now();
        for row in rows {
            let id = |column| Ok::<_, Trouble>(EntryId::from_number(row.try_get::<String, _>(column)?.parse()?));
            let (first, last) = (id(0)?, id(1)?);
            if self.seen.get(&first).is_some_and(|seen| seen.0 == last) {
                continue;
            }
            self.seen.insert(first, (last, visible));
            let landed: Vec<EntryId> = self.waiting.range(first..=last).map(|(id, _)| *id).collect();
            for id in landed {
                if let Some(sent) = self.waiting.remove(&id) {
                    self.record(sent, visible);
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, sent: Instant, visible: Instant) {
        self.latency.saturating_record(visible.saturating_duration_since(sent).as_micros().max(1) as u64);
    }
}

/// Worker processes.
struct Workers {
    children: Vec<Child>,
    rows: Vec<Arc<AtomicU64>>,
}

impl Workers {
    fn start(processes: u8, stage: &Stage) -> Result<Workers, Trouble> {
        let rows: Vec<Arc<AtomicU64>> = (0..processes).map(|_| Arc::default()).collect();
        let start = |rows: &Arc<AtomicU64>| {
            let rows = rows.clone();
            stage.worker(move |event| {
                if event["level"] == "ERROR" {
                    eprintln!("{event}");
                }
                if let Some(count) = event["rows"].as_u64() {
                    rows.store(count, Ordering::Relaxed);
                }
            })
        };
        let children = rows.iter().map(start).collect::<Result<_, _>>()?;
        Ok(Workers { children, rows })
    }

    fn all_live(&mut self) -> Result<(), Trouble> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                return Err(format!("a worker process ended: {status}").into());
            }
        }
        Ok(())
    }

    /// CPU seconds of all together, and the most memory that one of them held; none where the system does not tell.
    fn cost(&self) -> (Option<f64>, Option<u64>) {
        let pids = || self.children.iter().filter_map(Child::id);
        (pids().map(cpu_seconds).sum(), pids().map(peak_memory).max().flatten())
    }

    /// Stops them in order; gives the rows they wrote.
    async fn stop(mut self) -> Result<u64, Trouble> {
        for child in &mut self.children {
            if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid as i32)) {
                kill_process(pid, Signal::TERM)?;
            }
            child.wait().await?;
        }
        // Their last words may still be on their way through the pipe.
        while self.rows.iter().any(|rows| Arc::strong_count(rows) > 1) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(self.rows.iter().map(|rows| rows.load(Ordering::Relaxed)).sum())
    }
}

/// User and system time of a process, as Linux tells it in hundredths of a second.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything: the 12th and 13th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) as f64 / 100.0)
}

/// The most memory a process has held, in bytes.
fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    peak.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

/// An empty stream without a group, an empty table, an empty ledger.
async fn start_anew(stage: &Stage) -> Result<(), Trouble> {
    let connection = Connection::open(&stage.valkey, "tidegate:bench").await?;
    connection.call(Command::new("UNLINK").arg(&*stage.pipeline.stream)).await?;
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

async fn tell(
    args: &Args,
    stage: &Stage,
    load: &Load,
    drains: &[Drain],
    steady: Option<&Steady>,
    exact: bool,
) -> Result<(), Trouble> {
    let report = report(args, stage, load, drains, steady, exact).await?;
    if args.json {
        say(&report.to_string());
        return Ok(());
    }
    let (seed, versions) = (&report["load"]["seed"], &report["versions"]);
    say(&format!(
        "{} keys, {}; {} process(es) with {} worker(s), batches of {}; seed {seed}",
        args.keys,
        report["load"]["distribution"].as_str().unwrap_or_default(),
        args.processes,
        stage.config.run.workers,
        stage.config.batch.max_entries
    ));
    say(&format!(
        "tidegate {}, Valkey {}, PostgreSQL {}, {} cores here",
        text(&versions["tidegate"]),
        text(&versions["valkey"]),
        text(&versions["postgres"]),
        report["cores"]
    ));
    let line = |name: &str, figure: &Value, unit: &str| {
        let figure = match figure {
            Value::Null => "unknown".into(),
            Value::Number(n) if n.as_f64().is_some_and(|n| n >= 1_000.0) => {
                indicatif::HumanCount(n.as_f64().unwrap_or(0.0) as u64).to_string()
            }
            Value::Number(n) => format!("{:.2}", n.as_f64().unwrap_or(0.0)),
            other => other.to_string(),
        };
        say(&format!("  {name:<34}{figure:>14} {unit}"));
    };
    if let Some(drain) = report.get("drain").filter(|drain| !drain.is_null()) {
        say(&format!("\ndrain of {} entries, median of {} runs", indicatif::HumanCount(args.entries), args.runs));
        line("entries", &drain["entries_per_second"], "/s");
        line("  slowest run", &drain["slowest_entries_per_second"], "/s");
        line("  fastest run", &drain["fastest_entries_per_second"], "/s");
        line("rows written", &drain["rows_per_second"], "/s");
        line("worker's CPU for a million entries", &drain["cpu_seconds_per_million"], "s");
        line("worker's peak memory", &drain["peak_memory_mib"], "MiB a process");
        line("an entry's size in Valkey", &drain["bytes_per_entry"], "bytes");
    }
    if let Some(steady) = report.get("steady").filter(|steady| !steady.is_null()) {
        say(&format!(
            "\nsteady {} entries/s for {} s, from XADD to visible in PostgreSQL (seen by a poll every ms)",
            args.rate, args.seconds
        ));
        for percentile in ["p50", "p95", "p99", "p99.9", "max"] {
            line(percentile, &steady["latency_ms"][percentile], "ms");
        }
        line("workers' CPU", &steady["cpu_percent"], "% of a core");
    }
    say(if exact { "\nevery row is exact" } else { "\nROWS DIFFER from what was added" });
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

async fn report(
    args: &Args,
    stage: &Stage,
    load: &Load,
    drains: &[Drain],
    steady: Option<&Steady>,
    exact: bool,
) -> Result<Value, Trouble> {
    let entries = args.entries as f64;
    let of = |figure: &dyn Fn(&Drain) -> Option<f64>| {
        let mut figures: Vec<f64> = drains.iter().filter_map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures
    };
    let median = |figure: &dyn Fn(&Drain) -> Option<f64>| of(figure).get(drains.len() / 2).copied();
    let rate = |drain: &Drain| Some(entries / drain.seconds);
    let drain = (!drains.is_empty()).then(|| {
        json!({
            "entries": args.entries,
            "runs": args.runs,
            "entries_per_second": median(&rate),
            "slowest_entries_per_second": of(&rate).first(),
            "fastest_entries_per_second": of(&rate).last(),
            "rows_per_second": median(&|drain| Some(drain.rows as f64 / drain.seconds)),
            "cpu_seconds_per_million": median(&|drain| Some(drain.cpu_seconds? / entries * 1e6)),
            "peak_memory_mib": median(&|drain| Some(drain.peak_memory_bytes? as f64 / f64::from(1 << 20))),
            "bytes_per_entry": median(&|drain| Some(drain.bytes_per_entry)),
        })
    });
    let steady = steady.map(|steady| {
        let at = |percentile| steady.latency.value_at_quantile(percentile) as f64 / 1_000.0;
        json!({
            "rate": args.rate,
            "seconds": args.seconds,
            "latency_ms": {
                "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "p99.9": at(0.999),
                "max": steady.latency.max() as f64 / 1_000.0,
            },
            "cpu_percent": steady.cpu_share.map(|share| share * 100.0),
        })
    });
    let info = Connection::open(&stage.valkey, "tidegate:bench").await?;
    let info = info.call(Command::new("INFO").arg("server")).await?;
    let version =
        |name: &str| info.as_text()?.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
    let postgres: String =
        stage.database.run(async |c| sqlx::query_scalar("show server_version").fetch_one(c).await).await?;
    Ok(json!({
        "load": {
            "keys": load.keys,
            "distribution": load.skew.map_or_else(|| "uniform".into(), |skew| format!("zipf {skew}")),
            "amounts": [load.amounts.start(), load.amounts.end()],
            "id_bytes": [load.id_bytes.start(), load.id_bytes.end()],
            "seed": load.seed,
        },
        "processes": args.processes,
        "workers": stage.config.run.workers,
        "batch_max_entries": stage.config.batch.max_entries,
        "drain": drain,
        "steady": steady,
        "exact": exact,
        "versions": {
            "tidegate": env!("CARGO_PKG_VERSION"),
            "valkey": version("valkey_version:").or_else(|| version("redis_version:")),
            "postgres": postgres.split(' ').next(),
        },
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
    }))
}
