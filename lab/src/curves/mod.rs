//! How throughput changes with processes, with shards and with the distance to the servers.
//!
//! Each point of a curve drains the same backlog by `tidegate bench`, on the same two servers; all points take their turns in each round, in another order
//! each time. The machine may be shared with other work, so what counts is the ratio to the first point within a round, and CPU time for an entry; medians
//! of both are printed, as a table for docs/benchmarks.md.

mod idle;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::figures::{median, range, thousands};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tidegate::ops::sandbox::{Postgres, Valkey};
use tidegate_lab::distance::Distance;
use tidegate_lab::harness::{eventually, migrate, program, standby_of};
use tokio::process::Command;

/// What a Valkey that people care for is started with.
const DURABLE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "everysec"];

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What is measured
    #[arg(value_enum)]
    curve: Curve,
    /// Entries in each backlog
    #[arg(long, default_value_t = 1_000_000)]
    entries: u64,
    /// How often each point is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Different keys
    #[arg(long, default_value_t = 1_000)]
    keys: u64,
    /// How keys are drawn
    #[arg(long, default_value = "zipf")]
    distribution: String,
    /// By this way of delivery only: group or exclusive
    #[arg(long)]
    delivery: Option<String>,
    /// No round begins later than so many minutes after the start, if it would take as long as the one before: at least one is measured
    #[arg(long, default_value_t = 6)]
    minutes: u64,
    /// With `idle`: streams
    #[arg(long, default_value_t = 10_000)]
    streams: u16,
    /// With `idle`: entries a second, each to any of the streams
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// With `idle`: for how long the processors' time is observed
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The program that is measured; default: the one of this build
    #[arg(long)]
    program: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Curve {
    /// 1, 2, 4, 8 and 16 processes on one stream, by both ways of delivery
    Processes,
    /// One stream and one process, then 4 and 4, by both ways of delivery
    Shards,
    /// As `shards`, and PostgreSQL waits for a standby at each COMMIT
    Standby,
    /// 1, 10, 100 and 1,000 streams of one process, by both ways of delivery
    Streams,
    /// 1, 4 and 16 shards, 0, 1, 5 and 20 ms away from each server
    Distance,
    /// Many streams of which few have anything
    Idle,
}

/// One point of a curve.
#[derive(Debug, Clone)]
struct Point {
    delivery: &'static str,
    processes: u8,
    shards: u16,
    /// Milliseconds that are added to each answer of each server.
    away: u64,
}

/// What the drains of one point came to, one for each round.
#[derive(Debug, Default)]
struct Drained {
    rates: Vec<f64>,
    ratios: Vec<f64>,
    cpu: Vec<f64>,
    valkey: Vec<f64>,
    memory: Vec<f64>,
    hot: Vec<f64>,
    table: Vec<f64>,
}

pub async fn run(args: Args) -> bool {
    if args.curve == Curve::Idle {
        return idle::run(&args).await;
    }
    let began = Instant::now();
    let mut points = points(args.curve);
    points.retain(|point| args.delivery.as_ref().is_none_or(|delivery| delivery == point.delivery));
    let valkey = Valkey::start(&DURABLE).await.expect("Valkey starts");
    let settings = ["fsync=on", "full_page_writes=on", "max_wal_size=4GB", "max_connections=300"];
    let mut postgres = Postgres::start(&settings).await.expect("PostgreSQL starts");
    let database = postgres.url("postgres");
    migrate(&database).await;
    let _standby = match args.curve {
        Curve::Standby => Some(waits_for_a_standby(&mut postgres, &settings).await),
        _ => None,
    };
    let mut drained: Vec<Drained> = points.iter().map(|_| Drained::default()).collect();
    let mut all_exact = true;
    for round in 0..usize::from(args.rounds) {
        let so_far = began.elapsed();
        if round > 0 && so_far + so_far / round as u32 > Duration::from_secs(60 * args.minutes) {
            break;
        }
        let mut rates = vec![0.0; points.len()];
        for place in 0..points.len() {
            // Nobody is always the first on servers that are warm, or always the last.
            let n = (place + round) % points.len();
            let report = drain(&args, &points[n], &valkey, &database, postgres.port()).await;
            let (is_exact, of) = (report["exact"] == true, &report["drain"]);
            all_exact &= is_exact;
            let figure = |name: &str| of[name].as_f64().unwrap_or(f64::NAN);
            rates[n] = figure("entries_per_second");
            drained[n].cpu.push(figure("cpu_seconds_per_million"));
            drained[n].valkey.push(figure("valkey_us_per_entry"));
            drained[n].memory.push(figure("peak_memory_mib"));
            drained[n].hot.push(figure("hot_percent"));
            drained[n].table.push(figure("table_mib"));
            eprintln!("round {}: {} {:.0}/s", round + 1, points[n].name(), rates[n]);
        }
        for (n, rate) in rates.iter().enumerate() {
            let first = points.iter().position(|other| points[n].is_compared_with(other)).unwrap_or(n);
            drained[n].rates.push(*rate);
            drained[n].ratios.push(rate / rates[first]);
        }
    }
    print(&args, &points, &drained);
    all_exact
}

/// From now on each COMMIT is answered when a standby has it on its disk, too.
async fn waits_for_a_standby(postgres: &mut Postgres, settings: &[&str]) -> Postgres {
    let standby = standby_of(postgres, settings).await;
    let mut sql = PgConnection::connect(&postgres.url("postgres")).await.expect("connected");
    for statement in ["alter system set synchronous_standby_names = '*'", "select pg_reload_conf()"] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect(statement);
    }
    let state = "select coalesce(max(sync_state), 'none') from pg_stat_replication";
    let mut state = async || sqlx::query_scalar::<_, String>(state).fetch_one(&mut sql).await.expect("a state");
    eventually("the standby is waited for", "sync".to_owned(), &mut state).await;
    standby
}

fn points(curve: Curve) -> Vec<Point> {
    let ways = ["group", "exclusive"];
    let point = |delivery, processes, shards, away| Point { delivery, processes, shards, away };
    match curve {
        Curve::Processes => {
            ways.iter().flat_map(|way| [1, 2, 4, 8, 16].map(|processes| point(way, processes, 1, 0))).collect()
        }
        Curve::Shards | Curve::Standby => {
            ways.iter().flat_map(|way| [(1, 1), (1, 4), (4, 4)].map(|(p, s)| point(way, p, s, 0))).collect()
        }
        Curve::Streams => {
            ways.iter().flat_map(|way| [1, 10, 100, 1_000].map(|shards| point(way, 1, shards, 0))).collect()
        }
        Curve::Distance => {
            let shards = |away| [1, 4, 16].map(|shards| point("exclusive", 1, shards, away));
            [0, 1, 5, 20].into_iter().flat_map(shards).collect()
        }
        Curve::Idle => Vec::new(),
    }
}

impl Point {
    fn name(&self) -> String {
        let Point { delivery, processes, shards, away } = self;
        format!("{delivery}, {processes} processes, {shards} shards, {away} ms away")
    }

    /// Whether the other one is what this one's ratio is about: the same, by one process on one shard.
    fn is_compared_with(&self, other: &Point) -> bool {
        (other.delivery, other.away, other.processes, other.shards) == (self.delivery, self.away, 1, 1)
    }
}

/// Drains one backlog; gives what `tidegate bench` reports.
async fn drain(args: &Args, point: &Point, valkey: &Valkey, database: &str, postgres: u16) -> Value {
    let mut command = Command::new(args.program.clone().unwrap_or_else(program));
    command.args([
        "bench",
        "--phase",
        "drain",
        "--runs",
        "1",
        "--without-start",
        "--output",
        "json",
        "--delivery",
        point.delivery,
    ]);
    for (name, value) in [
        ("--processes", point.processes.to_string()),
        ("--shards", point.shards.to_string()),
        ("--entries", args.entries.to_string()),
        ("--keys", args.keys.to_string()),
        ("--distribution", args.distribution.clone()),
        ("--seed", "7".into()),
    ] {
        command.arg(name).arg(value);
    }
    command.env("VALKEY_URL", valkey.url()).env("DATABASE_URL", database).kill_on_drop(true);
    // They end with the drain.
    let mut between = Vec::new();
    if point.away > 0 {
        let away = Duration::from_millis(point.away);
        let to_valkey = Distance::to(valkey.port(), away).await;
        let to_postgres = Distance::to(postgres, away).await;
        command.env("VALKEY_URL", format!("valkey://127.0.0.1:{}", to_valkey.port()));
        let there = database.replace(&format!(":{postgres}/"), &format!(":{}/", to_postgres.port()));
        command.env("DATABASE_URL", there);
        between.extend([to_valkey, to_postgres]);
    }
    let output = command.output().await.expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}: {text}{words}", point.name()))
}

fn print(args: &Args, points: &[Point], drained: &[Drained]) {
    println!(
        "{} entries on {} keys ({}), append-only file on, ledger on, {} rounds in turn; from when all processes are at work",
        args.entries,
        args.keys,
        args.distribution,
        drained.first().map_or(0, |drained| drained.rates.len())
    );
    println!(
        "\n| delivery | processes | shards | ms away | entries/s | ratio | CPU s per million, all processes | Valkey's CPU, µs an entry | peak MiB a process | HOT updates, % | table, MiB |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    for (point, drained) in points.iter().zip(drained) {
        let Point { delivery, processes, shards, away } = point;
        let rates = |figures: &[f64]| {
            let (least, most) = range(figures);
            format!("{} ({}–{})", thousands(median(figures)), thousands(least), thousands(most))
        };
        println!(
            "| {delivery} | {processes} | {shards} | {away} | {} | {:.2} | {:.2} | {:.2} | {:.0} | {:.0} | {:.0} |",
            rates(&drained.rates),
            median(&drained.ratios),
            median(&drained.cpu),
            median(&drained.valkey),
            median(&drained.memory),
            median(&drained.hot),
            median(&drained.table),
        );
    }
}

/// The processor time of a process until now, all its threads, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let fields: BTreeMap<usize, &str> =
        stat.rsplit_once(')').expect("a name").1.split_whitespace().enumerate().collect();
    let ticks = |n: usize| fields[&n].parse::<f64>().expect("a number");
    (ticks(11) + ticks(12)) / 100.0
}
