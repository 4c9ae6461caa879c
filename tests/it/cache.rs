//! Cached rows: loaded once, never older than a COMMIT, and never in the way when Valkey is away.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tidegate::client::cache::AppError;
use tidegate::client::{Cache, CacheOptions, CacheStats, NotLoaded, NotWritten, OnValkeyDown, Ttl};
use tidegate::functions::{self, Call, Function, Status};
use tidegate::ops::sandbox::Valkey;
use tidegate::valkey::{Command, Connection, Endpoint};
use tokio::sync::Notify;

use crate::harness::{Client, Lab, Resp, eventually, output, within_limit};
use crate::proxy::Proxy;

pub(crate) fn address(url: &str) -> Endpoint {
    let limit = Duration::from_secs(5);
    Endpoint::new(url.to_owned().into(), limit, limit)
}

pub(crate) async fn server() -> Valkey {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let connection = Connection::open(&address(&server.url()), "test").await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    server
}

pub(crate) fn cache(server: &Valkey, options: CacheOptions) -> Cache<String> {
    Cache::new(&address(&server.url()), "users", options)
}

pub(crate) fn of(ttl: Ttl) -> CacheOptions {
    CacheOptions { ttl, ..CacheOptions::default() }
}

/// A loader that must not be called.
pub(crate) async fn never() -> Result<Option<String>, AppError> {
    panic!("the row is in the cache")
}

pub(crate) fn text(row: Option<Arc<String>>) -> Option<String> {
    row.map(|row| row.to_string())
}

/// A reader that has read an old row, and puts it in place when it is told to go on.
async fn has_read_old(
    cache: &Cache<String>,
    id: &'static str,
) -> (Arc<Notify>, tokio::task::JoinHandle<Result<Option<String>, NotLoaded>>) {
    let (read, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let reading = tokio::spawn({
        let (read, go_on, cache) = (read.clone(), go_on.clone(), cache.clone());
        async move {
            let load = async || {
                read.notify_one();
                go_on.notified().await;
                Ok(Some("old".to_owned()))
            };
            cache.get(id, load).await.map(text)
        }
    });
    within_limit("the read", read.notified()).await;
    (go_on, reading)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_loaded_once_and_so_is_the_knowledge_that_there_is_none() {
    let server = server().await;
    let cache = cache(&server, CacheOptions::default());
    let loads = AtomicUsize::new(0);
    let load = async || {
        loads.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
        Ok(Some("Ada".to_owned()))
    };
    let rows = join_all((0..50).map(|_| cache.get("7", load))).await;
    assert!(rows.into_iter().all(|row| text(row.expect("loaded")).as_deref() == Some("Ada")));
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    assert_eq!(text(cache.get("7", never).await.expect("there")).as_deref(), Some("Ada"));
    assert_eq!(text(cache.get("8", async || Ok(None)).await.expect("loaded")), None);
    assert_eq!(text(cache.get("8", never).await.expect("known to be missing")), None);
    let mut client = Client::connect(server.port()).await;
    assert_eq!(client.call(&["GET", "cache:users:{7}"]).await, Resp::Text(b"Ada".to_vec()), "plain bytes");
    let left = client.call(&["PTTL", "cache:users:{8}"]).await.int().expect("a number");
    assert!(left > 0 && left <= 33_000, "a missing row is remembered for {left} ms");
    let rows = cache.get_many(&["7", "9", "8"], async |ids| {
        assert_eq!(ids, ["9"]);
        Ok(vec![Some("Grace".to_owned())])
    });
    let rows: Vec<_> = rows.await.expect("loaded").into_iter().map(text).collect();
    assert_eq!(rows, [Some("Ada".to_owned()), Some("Grace".to_owned()), None]);
    assert_eq!(text(cache.get("9", never).await.expect("there")).as_deref(), Some("Grace"));
    // Foreign bytes are loaded again; what is too large, or nothing, is not cached.
    client.call(&[b"SET".as_slice(), b"cache:users:{9}", b"\xff\xfe"]).await;
    assert_eq!(text(cache.get("9", async || Ok(Some("G".into()))).await.expect("loaded")).as_deref(), Some("G"));
    for row in ["x".repeat(2 << 20), String::new()] {
        let loaded = cache.get("10", async || Ok(Some(row.clone()))).await.expect("loaded");
        assert_eq!(text(loaded), Some(row));
        assert_eq!(client.call(&["EXISTS", "cache:users:{10}", "tidegate:load:users:{10}"]).await.int(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_created_or_changed_through_the_cache_is_seen_at_once() {
    let server = server().await;
    let cache = cache(&server, CacheOptions::default());
    assert_eq!(text(cache.get("7", async || Ok(None)).await.expect("loaded")), None);
    let written = cache.write("7", async || Ok((3, Some(Some("Ada".to_owned()))))).await.expect("written");
    assert_eq!(written, 3);
    assert_eq!(text(cache.get("7", never).await.expect("there")).as_deref(), Some("Ada"));
    // Of a transaction that fails nothing is left, not even the old row: it is loaded.
    let failed = cache.write::<()>("7", async || Err("deadlock detected".into())).await;
    assert!(matches!(failed, Err(NotWritten::Transaction(error)) if error.to_string() == "deadlock detected"));
    assert_eq!(text(cache.get("7", async || Ok(Some("Ada".into()))).await.expect("loaded")).as_deref(), Some("Ada"));
    cache.write("7", async || Ok(((), Some(None)))).await.expect("deleted");
    assert_eq!(text(cache.get("7", never).await.expect("known to be missing")), None);
    cache.write("7", async || Ok(((), None))).await.expect("written, unknown how");
    assert_eq!(text(cache.get("7", async || Ok(Some("new".into()))).await.expect("loaded")).as_deref(), Some("new"));
    assert_eq!(cache.invalidate(&["7", "8"]).await, Ok(1));
    assert_eq!(
        text(cache.get("7", async || Ok(Some("newer".into()))).await.expect("loaded")).as_deref(),
        Some("newer")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_loaded_the_old_row_does_not_put_it_in_place_behind_a_commit() {
    let server = server().await;
    let (reader, writer) = (cache(&server, CacheOptions::default()), cache(&server, CacheOptions::default()));
    let (read, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let reading = {
        let (read, go_on, reader) = (read.clone(), go_on.clone(), reader.clone());
        tokio::spawn(async move {
            let load = async || {
                read.notify_one();
                go_on.notified().await;
                Ok(Some("old".to_owned()))
            };
            text(reader.get("7", load).await.expect("loaded"))
        })
    };
    within_limit("the read", read.notified()).await;
    writer.write("7", async || Ok(((), Some(Some("new".to_owned()))))).await.expect("written");
    go_on.notify_one();
    assert_eq!(
        within_limit("the reader", reading).await.expect("no panic").as_deref(),
        Some("old"),
        "it had begun before"
    );
    assert_eq!(text(reader.get("7", never).await.expect("there")).as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_dies_between_commit_and_lift_leaves_no_old_row() {
    let server = server().await;
    let options = CacheOptions { fence: Duration::from_millis(400), ..CacheOptions::default() };
    let cache = cache(&server, options);
    cache.get("7", async || Ok(Some("old".into()))).await.expect("loaded");
    let fence = cache.fence(&["7"]).await.expect("set");
    // COMMIT; and the process is gone.
    drop(fence);
    for _ in 0..3 {
        let row = cache.get("7", async || Ok(Some("new".into()))).await.expect("loaded");
        assert_eq!(text(row).as_deref(), Some("new"));
    }
    let mut client = Client::connect(server.port()).await;
    eventually("the fence", Some(0), async || client.call(&["EXISTS", "tidegate:load:users:{7}"]).await.int()).await;
    cache.get("7", async || Ok(Some("new".into()))).await.expect("loaded");
    assert_eq!(text(cache.get("7", never).await.expect("cached again")).as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_is_renewed_while_its_writer_works() {
    let server = server().await;
    let options = CacheOptions { fence: Duration::from_secs(1), ..CacheOptions::default() };
    let cache = cache(&server, options);
    let (port, reader) = (server.port(), cache.clone());
    let written = cache.write("7", async || {
        let mut client = Client::connect(port).await;
        for _ in 0..30 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let held = client.call(&["EXISTS", "tidegate:load:users:{7}"]).await.int();
            reader.get("7", async || Ok(Some("old".into()))).await?;
            let cached = client.call(&["EXISTS", "cache:users:{7}"]).await.int();
            if (held, cached) != (Some(1), Some(0)) {
                return Err(format!("fence {held:?}, row {cached:?}").into());
            }
        }
        Ok(((), Some(Some("new".to_owned()))))
    });
    written.await.expect("fenced all the time");
    assert_eq!(text(cache.get("7", never).await.expect("there")).as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_writers_that_meet_leave_no_old_row_in_whatever_order_they_commit_and_lift() {
    let server = server().await;
    let (one, other) = (cache(&server, CacheOptions::default()), cache(&server, CacheOptions::default()));
    let row = |version: usize| Some(Some(Arc::new(format!("version {version}"))));
    // Who commits first, and who lifts first.
    for (first, lifts_first) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        one.get("7", async || Ok(Some("version 0".into()))).await.expect("loaded");
        let mut fences = [Some(one.fence(&["7"]).await.expect("set")), Some(other.fence(&["7"]).await.expect("set"))];
        for n in [lifts_first, 1 - lifts_first] {
            let version = if n == first { 1 } else { 2 };
            // Between the two lifts a row that is read comes from the table, where both have committed.
            fences[n].take().expect("once").lift(row(version)).await;
            let read = one.get("7", async || Ok(Some("version 2".into()))).await.expect("loaded");
            assert_eq!(text(read).as_deref(), Some("version 2"), "first {first}, lifts first {lifts_first}");
        }
        assert_eq!(one.invalidate(&["7"]).await, Ok(1), "it is cached again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_dies_before_its_commit_leaves_the_row_as_it_was() {
    let server = server().await;
    let cache = cache(&server, CacheOptions { fence: Duration::from_millis(300), ..CacheOptions::default() });
    cache.get("7", async || Ok(Some("old".into()))).await.expect("loaded");
    drop(cache.fence(&["7"]).await.expect("set"));
    let old = async || Ok(Some("old".to_owned()));
    assert_eq!(text(cache.get("7", old).await.expect("loaded")).as_deref(), Some("old"), "fenced");
    let mut client = Client::connect(server.port()).await;
    eventually("the fence", Some(0), async || client.call(&["EXISTS", "tidegate:load:users:{7}"]).await.int()).await;
    assert_eq!(text(cache.get("7", old).await.expect("loaded")).as_deref(), Some("old"));
    assert_eq!(text(cache.get("7", never).await.expect("cached again")).as_deref(), Some("old"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_runs_out_under_a_slow_writer_leaves_no_old_row_behind_its_lift() {
    let server = server().await;
    let writer = cache(&server, CacheOptions { fence: Duration::from_millis(100), ..CacheOptions::default() });
    let reader = cache(&server, CacheOptions::default());
    let (seven, eight) = (writer.fence(&["7"]).await.expect("set"), writer.fence(&["8"]).await.expect("set"));
    let mut client = Client::connect(server.port()).await;
    let leases = ["EXISTS", "tidegate:load:users:{7}", "tidegate:load:users:{8}"];
    eventually("the fences", Some(0), async || client.call(&leases).await.int()).await;
    // The transaction goes on. One reader has put the old row in place, another one has read it and is about to.
    reader.get("7", async || Ok(Some("old".into()))).await.expect("loaded");
    let (go_on, reading) = has_read_old(&reader, "8").await;
    // COMMIT.
    for fence in [seven, eight] {
        fence.lift(Some(Some(Arc::new("new".to_owned())))).await;
    }
    go_on.notify_one();
    within_limit("the reader", reading).await.expect("no panic").expect("loaded");
    for id in ["7", "8"] {
        let row = reader.get(id, async || Ok(Some("new".into()))).await.expect("loaded");
        assert_eq!(text(row).as_deref(), Some("new"), "{id}");
    }
}

/// Readers and writers of one row, step by step in any order; gives how often a row in the cache was old although nobody was about to repair it.
async fn interleave(connection: &Connection, seed: u64) -> usize {
    let keys = ["cache:o:{1}".to_owned(), "tidegate:load:o:{1}".to_owned()];
    connection.call(Command::new("FLUSHALL")).await.expect("empty");
    let call = async |call: Call| call.send(connection).await.expect("an answer").status;
    let (mut random, mut row, mut next, mut old) = (StdRng::seed_from_u64(seed), 0, 1, 0);
    let mut readers: [Option<(u64, Option<i64>)>; 3] = [None; 3];
    // A writer's token, what it has written if it has the row's lock, and whether it has committed.
    let mut writers: [Option<(u64, Option<i64>, bool)>; 3] = [None; 3];
    let mut lock = None;
    for _ in 0..600 {
        let n = random.random_range(0..3usize);
        if random.random_bool(0.6) {
            readers[n] = match readers[n] {
                None => {
                    let token: u64 = random.random();
                    let early = if random.random_bool(0.1) { 100_000_000 } else { 0 };
                    let load = Call::new(Function::Load, &keys).arg(token).arg(1_000_000).arg(early);
                    (call(load).await == Status::Miss).then_some((token, None))
                }
                Some(_) if random.random_bool(0.03) => None,
                Some((token, None)) => Some((token, Some(row))),
                Some((token, Some(read))) => {
                    call(Call::new(Function::Store, &keys).arg(token).arg(read).arg(1_000_000)).await;
                    None
                }
            };
        } else {
            writers[n] = match writers[n] {
                None if random.random_bool(0.8) => None,
                None => {
                    let token = random.random();
                    call(Call::new(Function::Fence, &keys).arg(token).arg(1_000_000)).await;
                    Some((token, None, false))
                }
                Some((token, None, _)) if lock.is_none() => {
                    (lock, next) = (Some(n), next + 1);
                    Some((token, Some(next), false))
                }
                Some(waiting @ (_, None, _)) => Some(waiting),
                Some((token, Some(new), false)) => {
                    (row, lock) = (new, None);
                    // Some die right behind their COMMIT.
                    (!random.random_bool(0.05)).then_some((token, Some(new), true))
                }
                Some((token, Some(new), true)) => {
                    call(Call::new(Function::Lift, &keys).arg(token).arg(new).arg(1_000_000)).await;
                    None
                }
            };
        }
        let is_writing = writers.iter().flatten().any(|(_, _, is_committed)| !is_committed);
        if random.random_bool(0.02) {
            connection.call(Command::new("DEL").arg(&keys[0])).await.expect("evicted");
        }
        if !is_writing && random.random_bool(0.05) {
            connection.call(Command::new("DEL").arg(&keys[1])).await.expect("run out");
        }
        let cached = connection.call(Command::new("GET").arg(&keys[0])).await.expect("an answer");
        old += usize::from(cached.as_text().is_some_and(|cached| cached != row.to_string()));
    }
    old
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_order_of_readers_and_writers_no_old_row_is_in_the_cache_behind_a_commit() {
    let server = server().await;
    let connection = Connection::open(&address(&server.url()), "test").await.expect("connected");
    for seed in 1..=25 {
        assert_eq!(interleave(&connection, seed).await, 0, "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_is_loaded_once_by_all_processes_and_nobody_waits_in_between() {
    let server = server().await;
    let ttl = Ttl { early: Duration::from_millis(120), jitter: 0.0, ..Ttl::of(Duration::from_millis(400)) };
    // Each has its own connection and its own flights, as a process has.
    let processes: Vec<Cache<String>> = (0..4).map(|_| cache(&server, of(ttl))).collect();
    let loads = Arc::new(AtomicI64::new(0));
    let began = Instant::now();
    let readers = processes.iter().flat_map(|cache| (0..12).map(|_| cache.clone())).map(|cache| {
        let loads = loads.clone();
        tokio::spawn(async move {
            while loads.load(Ordering::Relaxed) < 8 {
                let loads = loads.clone();
                let load = move || async move {
                    loads.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    Ok(Some("Ada".to_owned()))
                };
                cache.get_revalidating("7", load).await.expect("loaded");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        within_limit("a reader", reader).await.expect("no panic");
    }
    // Behind the first load there is a refresh every 280 ms, at most.
    let most = began.elapsed().as_millis() / 280 + 1;
    let loads = loads.load(Ordering::Relaxed);
    assert!((8..=most).contains(&loads.unsigned_abs().into()), "{loads} loads, and {most} at the most");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_loader_dies_another_one_loads_after_its_lease() {
    let server = server().await;
    let living = cache(&server, CacheOptions::default());
    // A process that asks, and is gone.
    let connection = Connection::open(&address(&server.url()), "test").await.expect("connected");
    let load = Call::new(Function::Load, ["cache:users:{7}", "tidegate:load:users:{7}"]).arg(1).arg(300).arg(0);
    assert_eq!(load.send(&connection).await.expect("an answer").status, Status::Miss);
    let row = within_limit("the next one", living.get("7", async || Ok(Some("Ada".into())))).await.expect("loaded");
    assert_eq!(text(row).as_deref(), Some("Ada"));
    assert_eq!(text(living.get("7", never).await.expect("there")).as_deref(), Some("Ada"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_loaded_is_served_stale_and_errors_are_not_cached() {
    let server = server().await;
    let ttl = Ttl { early: Duration::ZERO, jitter: 0.0, ..Ttl::of(Duration::from_millis(80)) }
        .stale_for(Duration::from_secs(60));
    let cache = cache(&server, of(ttl));
    let fails = async || Err::<Option<String>, AppError>("PostgreSQL is away".into());
    assert!(
        matches!(cache.get("7", fails).await, Err(NotLoaded::Loader(why)) if why.to_string() == "PostgreSQL is away")
    );
    cache.get("7", async || Ok(Some("Ada".into()))).await.expect("loaded");
    let mut client = Client::connect(server.port()).await;
    eventually("stale", true, async || client.call(&["PTTL", "cache:users:{7}"]).await.int() < Some(60_000)).await;
    assert_eq!(text(cache.get("7", fails).await.expect("stale")).as_deref(), Some("Ada"));
    assert_eq!(text(cache.get("7", async || Ok(Some("new".into()))).await.expect("loaded")).as_deref(), Some("new"));
}

/// What a cache has done since it was asked last.
fn done(cache: &Cache<String>, before: &mut CacheStats) -> CacheStats {
    let (now, then) = (cache.stats(), *before);
    *before = now;
    CacheStats {
        hits: now.hits - then.hits,
        misses: now.misses - then.misses,
        stale: now.stale - then.stale,
        bypassed: now.bypassed - then.bypassed,
        loads: now.loads - then.loads,
        failed: now.failed - then.failed,
        early: now.early - then.early,
        joined: now.joined - then.joined,
        waited: now.waited - then.waited,
        unstored: now.unstored - then.unstored,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_cache_has_done_is_counted() {
    let server = server().await;
    let proxy = Proxy::start(server.port()).await;
    let hour = Duration::from_secs(3600);
    let ttl = Ttl { early: hour, jitter: 0.0, ..Ttl::of(hour * 3) }.stale_for(hour);
    let options = CacheOptions { lease: hour, max_bytes: 100, ..of(ttl) };
    let cache: Cache<String> = Cache::new(&address(&proxy.url()), "users", options);
    let (mut before, none) = (CacheStats::default(), CacheStats::default());
    let mut client = Client::connect(server.port()).await;
    let row = async || Ok(Some("row".to_owned()));
    let fails = async || Err::<Option<String>, AppError>("away".into());
    assert_eq!(cache.stats(), none);
    // A row, and the knowledge that there is none.
    cache.get("1", row).await.expect("loaded");
    cache.get("2", async || Ok(None)).await.expect("loaded");
    assert_eq!(done(&cache, &mut before), CacheStats { misses: 2, loads: 2, ..none });
    cache.get("1", never).await.expect("there");
    cache.get("2", never).await.expect("there");
    cache.get_revalidating("1", never).await.expect("there");
    assert_eq!(done(&cache, &mut before), CacheStats { hits: 3, ..none });
    cache.get("3", fails).await.expect_err("not loaded");
    cache.get("4", async || Ok(Some("x".repeat(101)))).await.expect("loaded");
    assert_eq!(done(&cache, &mut before), CacheStats { misses: 2, loads: 2, failed: 1, unstored: 1, ..none });
    let many = cache.get_many(&["1", "2", "5", "6"], async |ids| Ok(ids.iter().map(|_| None).collect()));
    many.await.expect("loaded");
    assert_eq!(done(&cache, &mut before), CacheStats { hits: 2, misses: 2, loads: 2, ..none });
    // Of ten who want the same row one loads it, and of two processes one waits for the other.
    let (loading, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let other = self::cache(&server, options);
    let held = tokio::spawn({
        let (other, loading, go_on) = (other.clone(), loading.clone(), go_on.clone());
        async move {
            let load = async || {
                loading.notify_one();
                go_on.notified().await;
                Ok(Some("row".to_owned()))
            };
            other.get("7", load).await.map(drop)
        }
    });
    within_limit("the load", loading.notified()).await;
    let (readers, ()) = tokio::join!(join_all((0..10).map(|_| cache.get("7", never))), async {
        let all = (before.misses + 10, 1);
        eventually("all have looked, and one waits", all, async || (cache.stats().misses, cache.stats().waited)).await;
        go_on.notify_one();
    });
    assert!(readers.into_iter().all(|row| row.is_ok_and(|row| row.is_some())));
    within_limit("the load", held).await.expect("no panic").expect("loaded");
    assert_eq!(done(&cache, &mut before), CacheStats { misses: 10, joined: 9, waited: 1, ..none });
    assert_eq!(other.stats(), CacheStats { misses: 1, loads: 1, ..none });
    // In the last of its hours one reader loads it again, before it returns or behind its back.
    for revalidates in [false, true] {
        client.call(&["PEXPIRE", "cache:users:{1}", "7000000"]).await;
        match revalidates {
            false => cache.get("1", row).await.expect("there"),
            true => cache.get_revalidating("1", row).await.expect("there"),
        };
        let left = async || client.call(&["PTTL", "cache:users:{1}"]).await.int() > Some(7_200_000);
        eventually("loaded again", true, left).await;
        assert_eq!(done(&cache, &mut before), CacheStats { hits: 1, loads: 1, early: 1, ..none });
    }
    // Past its end it is loaded, or served where that fails.
    let ended = ["PEXPIRE", "cache:users:{1}", "3500000"];
    client.call(&ended).await;
    cache.get("1", fails).await.expect("stale");
    cache.get_many(&["1"], async |_| Err("away".into())).await.expect("stale");
    assert_eq!(done(&cache, &mut before), CacheStats { stale: 2, loads: 2, failed: 2, ..none });
    cache.get("1", row).await.expect("loaded");
    assert_eq!(done(&cache, &mut before), CacheStats { misses: 1, loads: 1, ..none });
    // A writer is at work: what is read is not put in place.
    let fence = cache.fence(&["1"]).await.expect("set");
    cache.get("1", row).await.expect("loaded");
    fence.lift(None).await;
    assert_eq!(done(&cache, &mut before), CacheStats { misses: 1, loads: 1, unstored: 1, ..none });
    // Nobody can be asked.
    proxy.cut();
    cache.get("1", row).await.expect("loaded");
    cache.get_many(&["1", "2"], async |_| Ok(vec![None, None])).await.expect("loaded");
    assert_eq!(done(&cache, &mut before), CacheStats { bypassed: 3, loads: 3, unstored: 3, ..none });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_lives_for_as_long_as_it_is_read() {
    let server = server().await;
    let cache = cache(&server, of(Ttl::sliding(Duration::from_secs(100))));
    cache.get("7", async || Ok(Some("session".into()))).await.expect("loaded");
    let mut client = Client::connect(server.port()).await;
    client.call(&["PEXPIRE", "cache:users:{7}", "5000"]).await;
    assert_eq!(text(cache.get("7", never).await.expect("there")).as_deref(), Some("session"));
    assert!(client.call(&["PTTL", "cache:users:{7}"]).await.int() > Some(90_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_away_breaks_no_read_and_writes_as_its_options_say() {
    let server = server().await;
    let proxy = Proxy::start(server.port()).await;
    let options = CacheOptions { on_valkey_down: OnValkeyDown::Refuse, ..CacheOptions::default() };
    let strict: Cache<String> = Cache::new(&address(&proxy.url()), "users", options);
    let lenient: Cache<String> = Cache::new(&address(&proxy.url()), "users", CacheOptions::default());
    strict.get("7", async || Ok(Some("Ada".into()))).await.expect("loaded");
    proxy.cut();
    for cache in [&strict, &lenient] {
        let row = cache.get("7", async || Ok(Some("from the table".into()))).await.expect("loaded");
        assert_eq!(text(row).as_deref(), Some("from the table"));
    }
    let refused = strict.write::<()>("7", async || panic!("nothing is written")).await;
    assert!(matches!(refused, Err(NotWritten::NoFence(_))), "{refused:?}");
    assert_eq!(lenient.write("7", async || Ok((5, None))).await.expect("written"), 5);
    proxy.heal();
    eventually(
        "the cache",
        true,
        async || matches!(lenient.get("7", async || Ok(Some("loaded".into()))).await, Ok(Some(row)) if *row == "Ada"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_invalidated_by_pattern_at_a_pace_while_readers_refill_them() {
    let lab = Lab::new().await;
    let connection = Connection::open(&address(&lab.valkey.url()), "test").await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    let cache: Cache<String> = Cache::new(&address(&lab.valkey.url()), "users", CacheOptions::default());
    let mut client = lab.client().await;
    let commands: Vec<[String; 3]> = (0..5_000)
        .flat_map(|n| [format!("cache:users:{{{n}}}"), format!("cache:others:{n}")])
        .map(|key| ["SET".to_owned(), key, "old".to_owned()])
        .collect();
    client.pipeline(&commands).await;
    // A reader that has read an old row and has not put it in place yet.
    let (go_on, reading) = has_read_old(&cache, "late").await;
    let run = async |arguments: &[&str]| output(&mut lab.program(arguments)).await;
    let (code, stdout, stderr) = run(&["invalidate", "--pattern", "cache:users:*", "--dry-run"]).await;
    assert!(code == 0 && stdout.contains("5000 keys match"), "{stdout}{stderr}");
    let began = std::time::Instant::now();
    let (code, stdout, stderr) = run(&["invalidate", "--pattern", "cache:users:*", "--rate", "20000"]).await;
    assert!(code == 0 && stdout.contains("5000 keys were dropped"), "{stdout}{stderr}");
    assert!(began.elapsed() > Duration::from_millis(800), "two scans of 10,000 keys at 20,000 a second");
    go_on.notify_one();
    within_limit("the reader", reading).await.expect("no panic").expect("loaded");
    assert_eq!(client.call(&["EXISTS", "cache:users:{late}"]).await.int(), Some(0), "it was read before");
    assert_eq!(client.call(&["DBSIZE"]).await.int(), Some(5_000), "others stay");
    // One that is interrupted goes on where it stopped.
    client.pipeline(&commands).await;
    let mut child = lab.program(&["invalidate", "--pattern", "cache:users:*", "--rate", "2000"]);
    let mut child = child.stderr(std::process::Stdio::piped()).spawn().expect("it runs");
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stderr.take().expect("piped")));
    let cursor = loop {
        let line = within_limit("a cursor", lines.next_line()).await.expect("readable").expect("a line");
        if !line.starts_with("0 so far")
            && let Some((_, cursor)) = line.split_once("--from ")
        {
            break cursor.to_owned();
        }
    };
    child.kill().await.expect("killed");
    let left = client.call(&["DBSIZE"]).await.int().expect("a number");
    assert!((5_001..10_000).contains(&left), "{left}");
    // The leases are looked for from the start, the rows from the cursor on.
    let (code, _, stderr) = run(&["invalidate", "--pattern", "cache:users:*", "--from", &cursor]).await;
    assert_eq!((code, client.call(&["DBSIZE"]).await.int()), (0, Some(5_000)), "{stderr}");
    let (code, stdout, _) = run(&["invalidate", "cache:others:1", "cache:others:2", "cache:no such key"]).await;
    assert!(code == 0 && stdout.contains("2 keys were dropped"), "{stdout}");
    assert_eq!(run(&["invalidate", "--pattern", "x", "--from", "here"]).await.0, 2);
    let _ = std::io::stdout().flush();
}
