//! What a process with very many streams costs while few of them have anything: processor time of the process and of Valkey, and how long it takes to start.

use std::time::{Duration, Instant};

use rand::RngExt;
use tidegate::model::pipeline::Pipeline;
use tidegate_lab::harness::{Client, Daemon, Lab, eventually};
use tokio::process::Command;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::{Args, cpu_seconds};

/// What an idle process may take of a core, in percent, with ten thousand streams.
const MOST_PERCENT: f64 = 3.0;
/// After the start there is something to be looked at once.
const SETTLES: Duration = Duration::from_secs(15);

/// Counts leases that are held.
const LEASES: &str = "local held = 0
for _, key in ipairs(redis.call('KEYS', 'tidegate:lease:*')) do
    if string.sub(key, -8) ~= ':readers' then held = held + 1 end
end
return held";

pub(super) async fn run(args: &Args) -> bool {
    let lab = Lab::new().await;
    let pipeline = Pipeline { shards: args.streams, ..Pipeline::counters() };
    let mut command = match &args.program {
        Some(program) => Command::new(program),
        None => Command::new(tidegate_lab::harness::program()),
    };
    command.arg("run").env_clear().kill_on_drop(true).stdin(std::process::Stdio::null());
    command.env("VALKEY_URL", lab.valkey.url()).env("DATABASE_URL", &lab.database);
    command.env("TIDEGATE__LOG__FORMAT", "json").env("TIDEGATE__ADMIN__LISTEN", "127.0.0.1:0");
    command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", args.streams.to_string());
    command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
    let started = Instant::now();
    let mut daemon = Daemon::start(command);
    daemon.wait_for_event("running", |_| true).await;
    let running = started.elapsed();
    let mut client = lab.client().await;
    let held = async || client.call(&["EVAL", LEASES, "0"]).await.int();
    eventually("all leases are held", Some(i64::from(args.streams)), held).await;
    let leased = started.elapsed();
    let mut client = lab.client().await;
    add(&mut client, &pipeline, args.streams - 1, "the last one").await;
    lab.await_value("the last one", 1).await;
    let reads = started.elapsed();
    println!(
        "{} streams: the process runs after {:.2} s, holds all leases after {:.2} s, has read of the last stream after {:.2} s",
        args.streams,
        running.as_secs_f64(),
        leased.as_secs_f64(),
        reads.as_secs_f64()
    );
    sleep(SETTLES).await;
    let valkey = lab.valkey.pid().expect("it lives").unsigned_abs();
    let before = [daemon.pid(), valkey].map(cpu_seconds);
    let began = Instant::now();
    let added = trickle(&mut client, &pipeline, args).await;
    let seconds = began.elapsed().as_secs_f64();
    let after = [daemon.pid(), valkey].map(cpu_seconds);
    let [process, server] = [0, 1].map(|n| (after[n] - before[n]) / seconds * 100.0);
    println!(
        "over {seconds:.0} s with {added} entries: the process {process:.2} % of a core, Valkey {server:.2} %; {} MiB at the most",
        daemon.peak_mebibytes()
    );
    daemon.kill().await;
    process <= MOST_PERCENT * f64::from(args.streams) / 10_000.0
}

/// Adds entries at the rate of the arguments; gives how many.
async fn trickle(client: &mut Client, pipeline: &Pipeline, args: &Args) -> u64 {
    let (began, mut added) = (Instant::now(), 0);
    if args.rate == 0 {
        sleep(Duration::from_secs(args.seconds)).await;
        return 0;
    }
    let mut next = interval(Duration::from_secs(1) / args.rate);
    next.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while began.elapsed() < Duration::from_secs(args.seconds) {
        next.tick().await;
        let shard = rand::rng().random_range(0..args.streams);
        add(client, pipeline, shard, "any").await;
        added += 1;
    }
    added
}

async fn add(client: &mut Client, pipeline: &Pipeline, shard: u16, id: &str) {
    let stream = pipeline.stream_of(shard);
    client.call(&["XADD", &stream, "*", "id", id, "amount", "1"]).await;
}
