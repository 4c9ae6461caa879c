//! How large the ledger becomes under a steady load with default settings, how fast its rows are merged, and how much memory a
//! daemon needs that starts with it.

use std::time::{Duration, Instant};

use tidegate_lab::harness::{Daemon, GROUP, Lab, STREAM, eventually};
use tokio::time::sleep;

use crate::load;

/// What an entry may take in the ledger: 8 bytes of digest, and its share of the row and its indexes.
const BYTES_AN_ENTRY: f64 = 12.0;
/// What a daemon may need while it looks through the ledger.
const MEBIBYTES_AT_START: u64 = 64;
/// How often the ledger is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How long a daemon that starts may look through it.
const LOOKS_THROUGH: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Entries a second
    #[arg(long, default_value_t = 10_000)]
    rate: u64,
    /// For how long
    #[arg(long, default_value_t = 600)]
    seconds: u64,
}

pub async fn run(args: Args) -> bool {
    let lab = Lab::new().await;
    let mut daemon = Daemon::start(lab.program_by_default(&["run"]));
    daemon.wait_for("created the consumer group").await;
    let lasts = Duration::from_secs(args.seconds);
    let load = tokio::spawn(load::run(lab.client().await, args.rate, lasts));
    println!("{} entries/s for {} s, default settings", args.rate, args.seconds);
    println!("seconds  rows written  rows now  MB: digests    rows   TOAST  indexes");
    let started = Instant::now();
    while !load.is_finished() {
        sleep(LOOK_EVERY).await;
        let (seconds, [live, heap, toast, indexes]) = (started.elapsed().as_secs(), megabytes(&lab).await);
        let (written, rows) = (written(&lab).await, rows(&lab).await);
        println!("{seconds:>7} {written:>13} {rows:>9} {live:>12.1} {heap:>7.1} {toast:>7.1} {indexes:>8.1}");
    }
    let entries = load.await.expect("the load");
    eventually("pending and undelivered", (0, 0), async || {
        let told = lab.client().await.call(&["XINFO", "GROUPS", STREAM]).await.array().remove(0).array();
        (lab.pending().await, told.last().and_then(|lag| lag.int()).unwrap_or(i64::MAX))
    })
    .await;
    let settled = started.elapsed();
    // What was flushed last is merged by the next look or two.
    let mut before = i64::MAX;
    while rows(&lab).await < before {
        before = rows(&lab).await;
        sleep(LOOK_EVERY).await;
    }
    let merged = written(&lab).await - before;
    let [live, heap, toast, indexes] = megabytes(&lab).await;
    // What is free in it is used again: as much as the load leaves behind between two rounds of autovacuum.
    lab.execute("vacuum full tidegate.ledger").await;
    let bytes_each = |parts: [f64; 4]| parts[1..].iter().sum::<f64>() * 1e6 / entries as f64;
    let (on_disk, packed) = (bytes_each([live, heap, toast, indexes]), bytes_each(megabytes(&lab).await));
    let seconds = settled.as_secs();
    println!("{entries} entries in {before} rows of {GROUP}'s ledger; {merged} rows were merged in {seconds} s");
    println!("MB: {live:.1} digests, {heap:.1} rows, {toast:.1} TOAST, {indexes:.1} indexes");
    println!("bytes an entry: {packed:.1}, with what is free in the files {on_disk:.1}");
    daemon.kill().await;
    let mut daemon = Daemon::start(lab.program_by_default(&["run"]));
    daemon.wait_for("running").await;
    sleep(LOOKS_THROUGH).await;
    let peak = daemon.peak_mebibytes();
    println!("a daemon that starts with it needs {peak} MiB at the most");
    daemon.kill().await;
    packed <= BYTES_AN_ENTRY && peak <= MEBIBYTES_AT_START
}

async fn rows(lab: &Lab) -> i64 {
    lab.number("select count(*) from tidegate.ledger").await
}

/// What the rows hold, and what they, their TOAST and their indexes take on the disk.
async fn megabytes(lab: &Lab) -> [f64; 4] {
    let live = "select coalesce(sum(pg_column_size(l.*)), 0)::bigint from tidegate.ledger l";
    let heap = "select pg_relation_size('tidegate.ledger')";
    let toast = "select pg_total_relation_size(reltoastrelid) from pg_class where oid = 'tidegate.ledger'::regclass";
    let indexes = "select pg_indexes_size('tidegate.ledger')";
    let mut sizes = [0.0; 4];
    for (size, query) in sizes.iter_mut().zip([live, heap, toast, indexes]) {
        *size = lab.number(query).await as f64 / 1e6;
    }
    sizes
}

/// Rows that flushes have written, as far as PostgreSQL has counted.
async fn written(lab: &Lab) -> i64 {
    lab.number("select n_tup_ins from pg_stat_user_tables where schemaname = 'tidegate' and relname = 'ledger'").await
}
