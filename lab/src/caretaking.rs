//! What trimming and compaction cost a flush: how soon an entry is visible in PostgreSQL under a steady load, with both at work a
//! hundred times a second and with neither, by turns; and how large ledger and stream are in the end.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use sqlx::{Connection, PgConnection};

use tidegate_lab::harness::{Daemon, Lab, STREAM};

use crate::load;

/// Between two looks whether an entry has landed: a part of every latency.
const POLL_EVERY: Duration = Duration::from_micros(200);
/// A ledger that is compacted has fewer rows than one that is not, by this factor at least.
const BOUNDED: u64 = 10;

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How long each turn takes
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// How often each has its turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Entries a second
    #[arg(long, default_value_t = 10_000)]
    rate: u64,
}

/// What a turn showed.
struct Turn {
    /// Microseconds from XADD to visible.
    latency: Histogram<u64>,
    entries: i64,
    ledger_rows: u64,
    ledger_bytes: i64,
    stream: i64,
}

pub async fn run(args: Args) -> bool {
    println!("{} entries/s, turns of {} s; times are ms from XADD to visible, by polls", args.rate, args.seconds);
    println!(
        "trim, compact      p50      p99    p99.9      max   entries  ledger rows  ledger bytes  left in the stream"
    );
    let mut all = [(); 2].map(|()| Vec::new());
    for _ in 0..args.turns {
        for (at_work, turns) in [false, true].into_iter().zip(&mut all) {
            let turn = turn(&args, at_work).await;
            println!("{}", line(if at_work { "at work" } else { "neither" }, &turn));
            turns.push(turn);
        }
    }
    let median = |turns: &[Turn], of: fn(&Turn) -> u64| {
        let mut values: Vec<u64> = turns.iter().map(of).collect();
        values.sort_unstable();
        values[values.len() / 2]
    };
    let [neither, at_work] = all;
    let [p99_without, p99] =
        [&neither, &at_work].map(|turns| median(turns, |turn| turn.latency.value_at_quantile(0.99)));
    let [rows_without, rows] = [&neither, &at_work].map(|turns| median(turns, |turn| turn.ledger_rows));
    println!("p99 at work / p99 without, medians: {:.2}", p99 as f64 / p99_without as f64);
    let is_bounded = rows * BOUNDED < rows_without;
    println!(
        "ledger rows at work and without, medians: {rows} and {rows_without}: {}",
        if is_bounded { "bounded" } else { "NOT BOUNDED" }
    );
    is_bounded
}

fn line(name: &str, turn: &Turn) -> String {
    let ms = |quantile: f64| turn.latency.value_at_quantile(quantile) as f64 / 1000.0;
    format!(
        "{name:<13} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>9} {:>12} {:>13} {:>19}",
        ms(0.5),
        ms(0.99),
        ms(0.999),
        ms(1.0),
        turn.entries,
        turn.ledger_rows,
        turn.ledger_bytes,
        turn.stream
    )
}

async fn turn(args: &Args, at_work: bool) -> Turn {
    let lab = Lab::new().await;
    let mut command = lab.program(&["run"]);
    let every = if at_work { "10ms" } else { "1d" };
    command
        .env("TIDEGATE__LOG__LEVEL", "info")
        .env("TIDEGATE__TRIM__EVERY", every)
        .env("TIDEGATE__COMPACT__EVERY", every);
    command.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__COMPACT__MARGIN", "1s");
    let mut daemon = Daemon::start(command);
    daemon.wait_for("created the consumer group").await;
    let load = tokio::spawn(load::run(lab.client().await, args.rate, Duration::from_secs(args.seconds)));
    let mut sql = lab.sql().await;
    let (mut client, mut latency) = (lab.client().await, Histogram::new(3).expect("three digits are possible"));
    let mut probe = 0;
    while !load.is_finished() {
        probe += 1;
        let started = Instant::now();
        client.add("probe", 1).await;
        until_visible(&mut sql, probe).await;
        latency.saturating_record(started.elapsed().as_micros() as u64);
    }
    load.await.expect("the load");
    // What was left for the caretaker is done with after the margin.
    if at_work {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let stream = client.call(&["XLEN", STREAM]).await.int().expect("a length");
    let entries = lab.in_ledger().await;
    let ledger_rows = lab.number("select count(*) from tidegate.ledger").await.unsigned_abs();
    let bytes = "select coalesce(sum(pg_column_size(l.*)), 0)::bigint from tidegate.ledger l";
    let ledger_bytes = lab.number(bytes).await;
    sql.close().await.expect("closed");
    daemon.kill().await;
    Turn { latency, entries, ledger_rows, ledger_bytes, stream }
}

async fn until_visible(sql: &mut PgConnection, value: i64) {
    let query = "select coalesce((select value from public.counters where id = 'probe'), 0)::bigint";
    while sqlx::query_scalar::<_, i64>(query).fetch_one(&mut *sql).await.expect("PostgreSQL answers") < value {
        tokio::time::sleep(POLL_EVERY).await;
    }
}
