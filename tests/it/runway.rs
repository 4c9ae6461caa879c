//! The runway of `tidegate memory`: how long PostgreSQL may stay away, compared with how far increments really come until Valkey refuses them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tidegate::care::room::{self, Extent, Growth};
use tidegate::client::postgres::Database;
use tidegate::client::{CounterOptions, Counters, NotAdded};
use tidegate::model::pipeline::Pipeline;
use tidegate::retry::Fault;
use tidegate::valkey::Connection;

use crate::harness::{Client, Daemon, Lab, STREAM, eventually, output, valkey, within_limit};
use crate::managed::{address, counters_at, is_managed, leave_memory, nothing_is_dirty, options, program};
use crate::proxy::Proxy;

/// How increments are spread over counters.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// Each is as likely as any other.
    Alike,
    /// Four of five are about one of ten, and every fifth is about a new one.
    HotAndNew,
    /// The n-th is as likely as 1/n (Zipf's law).
    Zipf,
}

/// What fills a Valkey while PostgreSQL is away.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// How increments are spread.
    shape: Shape,
    /// Over so many counters, without those that are new.
    counters: usize,
    /// So many of them are clean when it begins.
    clean: usize,
    /// So many cached rows of 500 bytes can be evicted.
    rows: usize,
    /// And so many keys of 500 bytes cannot.
    others: usize,
    /// So much is free.
    free: u64,
    /// So much of that is filled when it is told how much longer it goes on; a few hundred increments at the least.
    filled: f64,
}

/// How many increments are added together.
const AT_ONCE: usize = 20;

impl Load {
    /// The counter of an increment.
    fn pick(&self, random: &mut StdRng, new: &mut usize) -> String {
        let n = match self.shape {
            Shape::Alike => random.random_range(0..self.counters),
            Shape::HotAndNew if random.random_bool(0.8) => random.random_range(0..10),
            Shape::HotAndNew => {
                *new += 1;
                self.counters + *new
            }
            Shape::Zipf => (random.random_range(0.0..1.0) * (self.counters as f64 + 1.0).ln()).exp() as usize - 1,
        };
        format!("c{n}")
    }
}

/// Adds as fast as it can while it is `quick`, else at a pace, until Valkey refuses; gives how many were accepted.
async fn fill(counters: Counters<Database>, load: Load, quick: Arc<AtomicBool>, accepted: Arc<AtomicU64>) {
    let (mut random, mut new) = (StdRng::seed_from_u64(load.counters as u64), 0);
    let mut pace = tokio::time::interval(Duration::from_millis(40));
    loop {
        if !quick.load(Ordering::Relaxed) {
            pace.tick().await;
        }
        let increments: Vec<(String, i64)> = (0..AT_ONCE).map(|_| (load.pick(&mut random, &mut new), 1)).collect();
        for added in counters.add_many(&increments).await {
            match added {
                Ok(_) => drop(accepted.fetch_add(1, Ordering::Relaxed)),
                Err(NotAdded::Unavailable(Fault::Valkey { code, .. })) if code == "OOM" => return,
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}

/// How many increments `tidegate memory` says will be accepted yet, and how many are.
async fn told_and_true(load: Load) -> (f64, f64) {
    let lab = Lab { valkey: valkey(&["--maxmemory-policy", "volatile-lru"]).await, ..Lab::new().await };
    lab.execute(&format!(
        "insert into public.counters select 'c' || n, 1, now() from generate_series(0, {}) n",
        load.counters - 1
    ))
    .await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let through = lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string());
    let mut command = program(&lab, &["run"]);
    command.env("DATABASE_URL", &through).env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__TRIM__EVERY", "100ms");
    let _daemon = Daemon::start(command);
    is_managed(&lab).await;
    // Who adds is not to wait for a PostgreSQL that is away.
    let counters =
        counters_at(&lab.valkey.url(), &through, CounterOptions { patience: Duration::ZERO, ..options() }).await;
    let clean: Vec<String> = (0..load.clean).map(|n| format!("c{n}")).collect();
    for ids in clean.chunks(500) {
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        let exact = async || counters.get_many(&names).await.into_iter().all(|count| count.exact().is_some());
        eventually("brought", true, exact).await;
    }
    nothing_is_dirty(&lab).await;
    let mut client = lab.client().await;
    let row = "x".repeat(400);
    let rows = (0..load.rows)
        .map(|n| vec!["SET".to_owned(), format!("cache:users:{{{n}}}"), row.clone(), "PX".into(), "9999999".into()]);
    let others = (0..load.others).map(|n| vec!["SET".to_owned(), format!("others:{n}"), row.clone()]);
    for some in rows.chain(others).collect::<Vec<_>>().chunks(500) {
        client.pipeline(some).await;
    }
    leave_memory(&mut client, load.free).await;
    proxy.cut();
    let empty = used(&mut client).await;
    let (quick, accepted) = (Arc::new(AtomicBool::new(load.filled > 0.0)), Arc::new(AtomicU64::new(0)));
    let filling = tokio::spawn(fill(counters, load, quick.clone(), accepted.clone()));
    eventually("a backlog", true, async || {
        let filled = used(&mut client).await.saturating_sub(empty) as f64;
        accepted.load(Ordering::Relaxed) >= 600 && filled >= load.filled * load.free as f64
    })
    .await;
    quick.store(false, Ordering::Relaxed);
    let (code, stdout, stderr) =
        output(program(&lab, &["memory", "--observe", "2", "--output", "json"]).env("DATABASE_URL", &through)).await;
    let told: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{code} {stdout} {stderr}"));
    let primary = &told["primaries"][0];
    let stream = &primary["streams"][0];
    assert_eq!(stream["stream"], STREAM);
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{told}"));
    // In entries, and not in seconds: how fast they are added is nothing that it must foresee.
    let predicted = number(&primary["runway_seconds"]) * number(&stream["per_second"]);
    quick.store(true, Ordering::Relaxed);
    within_limit("full", filling).await.expect("no panic");
    let still = client.call(&["XLEN", STREAM]).await.int().expect("a number") as f64 - number(&stream["entries"]);
    eprintln!("{load:?}: told {predicted}, true {still}: {:.2}", predicted / still);
    (predicted, still)
}

/// The bytes that a server has in use.
async fn used(client: &mut Client) -> u64 {
    let info = client.call(&["INFO", "memory"]).await.text();
    info.lines().find_map(|line| line.strip_prefix("used_memory:")?.parse().ok()).expect("a number")
}

async fn assert_right_within_a_fifth(loads: impl IntoIterator<Item = Load>) {
    let mut wrong = Vec::new();
    for load in loads {
        let (told, real) = told_and_true(load).await;
        if !(0.8..=1.2).contains(&(told / real)) {
            wrong.push(format!("{load:?}: {told} told, and {real} were accepted"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runway_that_is_told_is_right_within_a_fifth() {
    let few = Load { shape: Shape::Alike, counters: 50, clean: 50, rows: 0, others: 0, free: 800_000, filled: 0.0 };
    assert_right_within_a_fifth([
        // Entries alone fill it.
        few,
        // Each counter that is touched cannot be evicted any more.
        Load { counters: 8_000, clean: 8_000, ..few },
        // Values that are absent are not brought while PostgreSQL is away: they become dirty all the same.
        Load { counters: 8_000, clean: 0, ..few },
        // Rows make room, and what has no TTL does not.
        Load { rows: 2_000, others: 2_000, counters: 2_000, clean: 1_000, free: 100_000, ..few },
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runway_is_right_whether_a_few_counters_are_hot_or_all_are_alike() {
    let third = Load {
        shape: Shape::Alike,
        counters: 20_000,
        clean: 0,
        rows: 0,
        others: 0,
        free: 2_500_000,
        filled: 1.0 / 3.0,
    };
    assert_right_within_a_fifth([
        // Most counters are dirty when two thirds are left.
        third,
        // Ever more of them become so, and as many as ever.
        Load { shape: Shape::HotAndNew, counters: 10, clean: 10, ..third },
        // Ever more of them become so, and fewer and fewer.
        Load { shape: Shape::Zipf, counters: 100_000, clean: 2_000, ..third },
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_take_what_a_stream_packs_them_into() {
    let lab = Lab::new().await;
    let connection = Connection::open(&address(&lab.valkey.url()), "test").await.expect("connected");
    let (pipeline, extent) = (Pipeline::counters(), Extent { newest: 1, keys: 0, measured: 1 });
    let growth = Growth { per_second: 1.0, ..Growth::default() };
    let long = [63, 64, 200, 5_000].map(|length| "x".repeat(length));
    let numbers = ["0", "127", "128", "-1", "5000", "70000", "9000000", "9000000000"];
    let texts = ["", "a", "01", "+1"].into_iter().chain(long.iter().map(String::as_str));
    let packed = [2, 2, 3, 3, 4, 5, 6, 10, 2, 3, 4, 4, 65, 67, 204, 5_007];
    let mut client = lab.client().await;
    for (value, bytes) in numbers.into_iter().chain(texts).map(str::as_bytes).zip(packed).chain([(&b"\xff\xfe"[..], 4)])
    {
        client.call(&[b"XADD", STREAM.as_bytes(), b"*", b"id", value]).await;
        let filled =
            room::filled(&connection, &pipeline, &pipeline.keys_of(0), growth, extent).await.expect("it may look");
        // An entry's head, the value, and what the stream takes beside them.
        assert!((filled.entry_bytes - f64::from(10 + bytes) * 1.05).abs() < 1e-6, "{value:?}: {}", filled.entry_bytes);
    }
}
