//! Caches and counters under what nobody should do to them: readers that are cancelled, panic or never end; ids and rows of every kind; numbers at the
//! ends of 64 bits; values that vanish while many are read; servers that begin empty in the middle of a write.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tidegate::client::cache::AppError;
use tidegate::client::{
    Cache, CacheOptions, Count, CounterOptions, NearCache, NearOptions, NotAdded, NotLoaded, Taken, Ttl, Why,
};
use tidegate::ops::sandbox::Valkey;
use tokio::sync::Notify;

use crate::cache::{address, cache, never, of, server, text};
use crate::harness::{Client, Daemon, Lab, Resp, STREAM, eventually, output, within_limit};
use crate::managed::{
    INDEX, counters, counters_at, daemon, is_clean, is_managed, leave_memory, nothing_is_dirty, options, program, value,
};
use crate::proxy::{Proxy, Then, Way};

/// Longer than any test lasts.
const FOREVER: Duration = Duration::from_secs(3600);

fn held_forever() -> CacheOptions {
    CacheOptions { lease: FOREVER, ..CacheOptions::default() }
}

/// Ids that mean something to somebody: to a cluster, to a pattern, to a terminal, to C.
fn strange_ids() -> Vec<String> {
    let mut ids: Vec<String> = [
        "",
        "{",
        "}",
        "{}",
        "}{",
        "{a}b",
        "a}b{c",
        "a\nb",
        "\r\n",
        " ",
        "*",
        "a*b",
        "[ab]",
        "?",
        "\\",
        "\"",
        "'",
        "%00",
        "\0",
        "a\0b",
        "naïve",
        "\u{202e}",
        "cache:users:{7}",
        ":",
        "r 7",
        "w0 7;",
    ]
    .map(str::to_owned)
    .into();
    ids.push("x".repeat(100_000));
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_cancelled_or_panics_while_it_loads_keeps_nobody_waiting() {
    let server = server().await;
    let (one, other) = (cache(&server, held_forever()), cache(&server, held_forever()));
    for (id, panics) in [("cancelled", false), ("panics", true)] {
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let task = tokio::spawn({
            let (one, reached, go_on) = (one.clone(), reached.clone(), go_on.clone());
            async move {
                let load = async || {
                    reached.notify_one();
                    go_on.notified().await;
                    if panics { panic!("the loader's own fault") } else { Ok(None) }
                };
                one.get(id, load).await.map(text)
            }
        });
        within_limit("the load", reached.notified()).await;
        // Of those that wait in this process one goes on; those of other processes need not wait for the end of the lease.
        let waiting = tokio::spawn({
            let one = one.clone();
            async move { one.get(id, async || Ok(Some("loaded".to_owned()))).await.map(text) }
        });
        if panics {
            go_on.notify_one()
        } else {
            task.abort()
        }
        assert!(within_limit("its end", task).await.is_err());
        let row = within_limit("one that waited", waiting).await.expect("no panic").expect("loaded");
        assert_eq!(row.as_deref(), Some("loaded"), "{id}");
        let row = within_limit("another process", other.get(id, never)).await.expect("there");
        assert_eq!(text(row).as_deref(), Some("loaded"), "{id}");
    }
    // The same for many at once.
    let reached = Arc::new(Notify::new());
    let task = tokio::spawn({
        let (one, reached) = (one.clone(), reached.clone());
        async move {
            let load = async |_: &[&str]| {
                reached.notify_one();
                std::future::pending::<Result<Vec<Option<String>>, AppError>>().await
            };
            one.get_many(&["1", "2"], load).await.map(drop)
        }
    });
    within_limit("the load", reached.notified()).await;
    task.abort();
    for id in ["1", "2"] {
        let row = within_limit("another process", other.get(id, async || Ok(Some("loaded".into())))).await;
        assert_eq!(text(row.expect("loaded")).as_deref(), Some("loaded"));
        assert_eq!(text(one.get(id, never).await.expect("put in place")).as_deref(), Some("loaded"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_loader_that_never_ends_others_of_its_process_load_after_its_lease() {
    let server = server().await;
    let cache = cache(&server, CacheOptions { lease: Duration::from_millis(300), ..CacheOptions::default() });
    let reached = Arc::new(Notify::new());
    let stuck = tokio::spawn({
        let (cache, reached) = (cache.clone(), reached.clone());
        async move {
            let load = async || {
                reached.notify_one();
                std::future::pending::<Result<Option<String>, AppError>>().await
            };
            cache.get("7", load).await.map(drop)
        }
    });
    within_limit("the load", reached.notified()).await;
    let others = join_all((0..10).map(|_| cache.get("7", async || Ok(Some("loaded".to_owned())))));
    for row in within_limit("the others", others).await {
        assert_eq!(text(row.expect("loaded")).as_deref(), Some("loaded"));
    }
    assert!(!stuck.is_finished());
    stuck.abort();
}

/// What a loader of many gives.
type Rows = Result<Vec<Option<String>>, AppError>;

#[tokio::test(flavor = "multi_thread")]
async fn many_rows_that_cannot_be_loaded_are_served_stale_and_a_loader_that_miscounts_is_told_so() {
    let server = server().await;
    let ttl = Ttl { early: Duration::ZERO, jitter: 0.0, ..Ttl::of(Duration::from_millis(80)) }.stale_for(FOREVER);
    let cache = cache(&server, CacheOptions { ttl, ..held_forever() });
    let rows = async |load: fn(&[&str]) -> Rows, ids: &[&str]| {
        let rows = cache.get_many(ids, async |ids| load(ids)).await;
        rows.map(|rows| rows.into_iter().map(text).collect::<Vec<_>>()).map_err(|why| why.to_string())
    };
    let fails = |_: &[&str]| -> Rows { Err("PostgreSQL is away".into()) };
    let loads = |ids: &[&str]| Ok(ids.iter().map(|id| Some(format!("row {id}"))).collect());
    assert_eq!(rows(fails, &["1", "2"]).await, Err("PostgreSQL is away".into()));
    let both = vec![Some("row 1".to_owned()), Some("row 2".to_owned())];
    assert_eq!(rows(loads, &["1", "2"]).await, Ok(both.clone()));
    let mut client = Client::connect(server.port()).await;
    let end = FOREVER.as_millis() as i64;
    for key in ["cache:users:{1}", "cache:users:{2}"] {
        eventually("stale", true, async || client.call(&["PTTL", key]).await.int() < Some(end)).await;
    }
    assert_eq!(rows(fails, &["1", "2"]).await, Ok(both));
    // Of one of them there is nothing that could be served.
    assert_eq!(rows(fails, &["1", "3"]).await, Err("PostgreSQL is away".into()));
    // Which row is whose nobody knows: none is taken for missing, or for another one.
    let short = |_: &[&str]| Ok(vec![Some("row 3".to_owned())]);
    assert_eq!(rows(short, &["3", "4"]).await, Err("the loader gave 1 rows for 2 ids".into()));
    for id in ["3", "4"] {
        assert_eq!(
            text(cache.get(id, async || Ok(Some("right".into()))).await.expect("loaded")).as_deref(),
            Some("right")
        );
    }
    assert_eq!(rows(fails, &[]).await, Ok(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_any_id_is_its_own_and_is_heard_of_and_dropped_alone() {
    let lab = Lab::new().await;
    let url = lab.valkey.url();
    let cache: Cache<String> = Cache::new(&address(&url), "users", held_forever());
    let heartbeat = Duration::from_millis(200);
    let near =
        NearCache::new(&address(&url), cache.clone(), NearOptions { heartbeat, verify: 0.0, ..NearOptions::default() });
    eventually("it listens", true, async || near.is_listening()).await;
    let ids = strange_ids();
    for (n, id) in ids.iter().enumerate() {
        let row = format!("row {n}");
        let loaded = cache.get(id, async || Ok(Some(row.clone()))).await.expect("loaded");
        assert_eq!(text(loaded), Some(row), "{id:?}");
    }
    for (n, id) in ids.iter().enumerate() {
        let row = Some(format!("row {n}"));
        assert_eq!(text(cache.get(id, never).await.expect("there")), row, "{id:?}");
        assert_eq!(text(near.get(id, never).await.expect("there")), row, "{id:?}");
        assert_eq!(near.held(id).map(text), Some(row), "{id:?}");
    }
    for (n, id) in ids.iter().enumerate() {
        cache.write(id, async || Ok(((), Some(Some(format!("new {n}")))))).await.expect("written");
        eventually(&format!("{id:?} is heard of"), false, async || {
            near.held(id).map(text).is_some_and(|held| held == Some(format!("row {n}")))
        })
        .await;
        assert_eq!(text(near.get(id, never).await.expect("there")), Some(format!("new {n}")), "{id:?}");
    }
    // One by one, by exactly its key; then, with its characters escaped, by a pattern. Whoever runs the verb can write no NUL.
    let there = async |id: &str| lab.client().await.call(&["EXISTS", &cache.key(id)]).await.int() == Some(1);
    let mut left: BTreeSet<&str> = ids.iter().map(String::as_str).collect();
    let escaped = |key: &str| {
        let escape = |c: char| if "*?[]\\^".contains(c) { format!("\\{c}") } else { c.to_string() };
        key.chars().map(escape).collect::<String>()
    };
    for (n, id) in ids.iter().enumerate().filter(|(_, id)| !id.contains('\0') && id.len() < 1_000) {
        let key = if n % 2 == 0 { cache.key(id) } else { escaped(&cache.key(id)) };
        let how = if n % 2 == 0 { vec!["invalidate", "--", &key] } else { vec!["invalidate", "--pattern", &key] };
        let (code, stdout, stderr) = output(&mut lab.program(&how)).await;
        assert!(code == 0 && stdout.contains("1 keys were dropped"), "{id:?}: {stdout}{stderr}");
        left.remove(id.as_str());
        for id in &ids {
            assert_eq!(there(id).await, left.contains(id.as_str()), "{id:?}, after {key:?}");
        }
    }
    let rest: Vec<&str> = left.iter().copied().collect();
    assert_eq!(cache.invalidate(&rest).await, Ok(rest.len() as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_valkey_does_not_take_is_read_all_the_same_and_keeps_nobody_waiting() {
    let limited = Valkey::start(&["--proto-max-bulk-len", "1mb"]).await.expect("Valkey starts");
    let options = CacheOptions { max_bytes: usize::MAX, ..held_forever() };
    let (one, other) = (cache(&limited, options), cache(&limited, options));
    let large = "x".repeat(3 << 20);
    for cache in [&one, &other, &one] {
        // The server cuts the connection; whoever comes next has another one.
        let row = within_limit("a large row", cache.get("large", async || Ok(Some(large.clone())))).await;
        assert!(text(row.expect("loaded")).as_ref() == Some(&large));
        let row = within_limit("a small row", cache.get("small", async || Ok(Some("small".into())))).await;
        assert_eq!(text(row.expect("loaded")).as_deref(), Some("small"));
    }
    cache_goes_on_where_valkey_is_full().await;
}

async fn cache_goes_on_where_valkey_is_full() {
    let server = server().await;
    let (one, other) = (cache(&server, held_forever()), cache(&server, held_forever()));
    let mut client = Client::connect(server.port()).await;
    // It is full when the row is there: the lease was granted before.
    let load = async || {
        Client::connect(server.port()).await.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
        Ok(Some("loaded".to_owned()))
    };
    assert_eq!(text(within_limit("a row", one.get("7", load)).await.expect("loaded")).as_deref(), Some("loaded"));
    for cache in [&one, &other] {
        let row = within_limit("a row", cache.get("7", async || Ok(Some("loaded".into())))).await.expect("loaded");
        assert_eq!(text(row).as_deref(), Some("loaded"));
    }
    client.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
    let row = within_limit("a row", other.get("7", async || Ok(Some("loaded".into())))).await.expect("loaded");
    assert_eq!(text(row).as_deref(), Some("loaded"));
    assert_eq!(text(one.get("7", never).await.expect("put in place")).as_deref(), Some("loaded"));
}

#[tokio::test(flavor = "multi_thread")]
async fn times_of_any_length_are_borne() {
    let lab = Lab::new().await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let max = Duration::MAX;
    for (time, jitter) in [(max, f64::NAN), (Duration::ZERO, -1.0), (max, f64::INFINITY)] {
        let what = format!("{time:?}, {jitter}");
        let ttl = Ttl { fresh: time, jitter, sliding: false, missing: time, early: Duration::ZERO, stale_for: time };
        for ttl in [ttl, Ttl { early: time, ..ttl }, Ttl { sliding: true, ..ttl }] {
            let cache_options = CacheOptions { ttl, lease: time, fence: time, ..CacheOptions::default() };
            let cache: Cache<String> = Cache::new(&address(&lab.valkey.url()), "users", cache_options);
            let near_options = NearOptions { ttl_cap: time, heartbeat: time, verify: jitter, ..NearOptions::default() };
            let near = NearCache::new(&address(&lab.valkey.url()), cache.clone(), near_options);
            for n in 0..3 {
                let row = async || Ok(Some(format!("row {n}")));
                assert!(within_limit(&what, cache.get("7", row)).await.expect("a row").is_some(), "{what}");
                assert!(within_limit(&what, near.get("7", row)).await.expect("a row").is_some(), "{what}");
                assert!(within_limit(&what, cache.get("8", async || Ok(None))).await.expect("an answer").is_none());
                let write = cache.write("7", async || Ok(((), Some(Some("new".to_owned())))));
                within_limit(&what, write).await.expect("written");
                let revalidating = cache.get_revalidating("7", || async { Ok(Some("newer".to_owned())) });
                assert!(within_limit(&what, revalidating).await.expect("a row").is_some());
            }
            cache.invalidate(&["7", "8"]).await.expect("asked");
        }
        let of_counters = CounterOptions {
            lease: time,
            patience: time,
            breaker: time,
            ttl: time,
            jitter,
            retry_for: time,
            lanes: usize::MAX,
        };
        let counters = counters_at(&lab.valkey.url(), &lab.database, of_counters).await;
        for id in ["a", "b"] {
            within_limit(&what, counters.add(id, 1)).await.expect("accepted");
            within_limit(&what, counters.incr(id, 1)).await.expect("accepted");
            within_limit(&what, counters.get_many(&[id, "c"])).await;
        }
    }
    lab.await_value("a", 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_caches_of_one_name_with_other_times_break_no_read() {
    let server = server().await;
    let short = cache(&server, of(Ttl::fixed(Duration::from_secs(100))));
    let long = cache(&server, of(Ttl::fixed(Duration::from_secs(100)).stale_for(FOREVER)));
    assert_eq!(text(short.get("7", async || Ok(Some("1".into()))).await.expect("loaded")).as_deref(), Some("1"));
    // What the one has stored the other one takes for a row past its end: it loads it, or serves it if it cannot.
    assert_eq!(text(long.get("7", async || Err("away".into())).await.expect("stale")).as_deref(), Some("1"));
    assert_eq!(text(long.get("7", async || Ok(Some("2".into()))).await.expect("loaded")).as_deref(), Some("2"));
    // And the first one serves that for as long as it is in Valkey.
    assert_eq!(text(short.get("7", never).await.expect("there")).as_deref(), Some("2"));
    assert_eq!(text(long.get("7", never).await.expect("there")).as_deref(), Some("2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_begins_empty_between_fence_and_lift_keeps_no_old_row() {
    let mut server = server().await;
    let (writer, reader) = (cache(&server, CacheOptions::default()), cache(&server, CacheOptions::default()));
    reader.get("7", async || Ok(Some("old".into()))).await.expect("loaded");
    let fence = writer.fence(&["7"]).await.expect("set");
    server.kill();
    server.restart().await.expect("Valkey comes back");
    // The transaction goes on: what is read is the old row, and of the fence nobody knows any more.
    let old = async || Ok(Some("old".to_owned()));
    eventually("the cache", true, async || {
        reader.get("7", old).await.expect("loaded");
        reader.stats().hits > 0
    })
    .await;
    // COMMIT.
    fence.lift(Some(Some(Arc::new("new".to_owned())))).await;
    let row = reader.get("7", async || Ok(Some("new".into()))).await.expect("loaded");
    assert_eq!(text(row).as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_near_cache_beyond_its_capacity_holds_no_more_and_nothing_old() {
    const ROWS: usize = 500;
    let server = server().await;
    let cache = cache(&server, CacheOptions::default());
    let options = NearOptions { entries: 20, verify: 0.0, ..NearOptions::default() };
    let near = NearCache::new(&address(&server.url()), cache.clone(), options);
    eventually("it listens", true, async || near.is_listening()).await;
    let ids: Vec<String> = (0..ROWS).map(|n| n.to_string()).collect();
    let held = || ids.iter().filter(|id| near.held(id).is_some()).count();
    for version in ["1", "2"] {
        let mut client = Client::connect(server.port()).await;
        let set = |id: &String| ["SET".to_owned(), cache.key(id), version.to_owned(), "PX".into(), "600000".into()];
        client.pipeline(&ids.iter().map(set).collect::<Vec<_>>()).await;
        for _ in 0..3 {
            for id in &ids {
                eventually(id, Some(version.to_owned()), async || text(near.get(id, never).await.expect("there")))
                    .await;
            }
        }
        eventually("no more than its capacity", true, async || held() <= 20).await;
    }
    let stats = near.stats();
    assert!(stats.misses as usize > ROWS && stats.invalidated as usize >= ROWS, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_at_an_end_of_64_bits_refuses_whole() {
    let lab = Lab::new().await;
    let rows = [("most", i64::MAX), ("almost", i64::MAX - 1), ("least", i64::MIN), ("absent", i64::MAX)];
    for (id, value) in rows {
        lab.execute(&format!("insert into public.counters values ('{id}', {value}, now())")).await;
    }
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    for (id, value) in &rows[..3] {
        eventually(id, Count::Exact(*value), async || counters.get(id).await).await;
    }
    for id in ["a", "b"] {
        eventually(id, Count::Exact(0), async || counters.get(id).await).await;
    }
    let mut client = lab.client().await;
    let refused = |added: &Result<_, NotAdded>| matches!(added, Err(NotAdded::CounterRefused(_)));
    assert!(matches!(counters.add("most", 1).await, Err(NotAdded::CounterRefused(_))));
    assert!(matches!(counters.incr("most", i64::MAX).await, Err(NotAdded::CounterRefused(_))));
    assert!(matches!(counters.incr("least", i64::MIN).await, Err(NotAdded::CounterRefused(_))));
    assert!(matches!(counters.take("least", 1, i64::MIN).await, Err(NotAdded::CounterRefused(_))));
    // One of many that does not fit: all of its call are refused, also those before it, and one that fits alone.
    let many: [&[(&str, i64)]; 4] = [
        &[("a", 1), ("most", 1), ("b", 1)],
        &[("a", 5), ("a", -3), ("almost", 1), ("almost", 1)],
        &[("a", i64::MIN), ("a", i64::MIN)],
        &[("least", -1), ("a", 1)],
    ];
    for increments in many {
        let added = counters.add_many(increments).await;
        assert!(added.iter().all(refused), "{increments:?}: {added:?}");
    }
    // A floor holds at the ends, too.
    assert_eq!(counters.take("most", 1, i64::MAX).await, Ok(Taken::No(i64::MAX)));
    assert_eq!(counters.take("a", 1, 0).await, Ok(Taken::No(0)));
    assert_eq!(counters.take("a", u32::MAX, i64::MAX).await, Ok(Taken::No(0)));
    // Nothing of all this has left a trace.
    assert_eq!(client.call(&["XLEN", STREAM]).await.int(), Some(0));
    assert_eq!(client.call(&["HLEN", INDEX]).await.int(), Some(0));
    for (id, expected) in rows[..3].iter().copied().chain([("a", 0), ("b", 0)]) {
        assert_eq!(value(&lab, id).await, Some(expected), "{id}");
        assert!(client.call(&["PTTL", &format!("counter:{id}")]).await.int() > Some(0), "{id} is clean");
    }
    assert_eq!(counters.take("most", 0, i64::MAX).await, Ok(Taken::Yes(Some(i64::MAX))));
    assert_eq!(counters.take("a", u32::MAX, i64::MIN).await, Ok(Taken::Yes(Some(-i64::from(u32::MAX)))));
    // Nobody knows that it does not fit: it is accepted, becomes a dead letter, and the value is as in PostgreSQL.
    counters.add("absent", 1).await.expect("accepted");
    counters.settled("absent", Duration::from_secs(60)).await.expect("settled");
    eventually("absent", Count::Exact(i64::MAX), async || counters.get("absent").await).await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 1);
    nothing_is_dirty(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_increments_may_be_none_name_one_counter_twice_and_have_a_bad_one_among_them() {
    let lab = Lab::new().await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.add_many::<&str>(&[]).await, []);
    assert_eq!(counters.get_many(&[]).await, []);
    assert_eq!(counters.add_many(&[("nul\0", 1)]).await, [Err(NotAdded::BadId)]);
    // Absent, and twice in one call; then present, and twice in several calls.
    assert_eq!(
        counters.add_many(&[("a", 1), ("nul\0", 1), ("a", 2)]).await,
        [Ok(None), Err(NotAdded::BadId), Ok(None)]
    );
    eventually("a", Count::Exact(3), async || counters.get("a").await).await;
    let many: Vec<(String, i64)> =
        (0..1_000).map(|n| (if n % 2 == 0 { "a".into() } else { format!("b{n}") }, 1)).collect();
    assert!(counters.add_many(&many).await.iter().all(Result::is_ok));
    lab.await_value("a", 503).await;
    assert_eq!(counters.get("a").await, Count::Exact(503));
    for id in strange_ids().iter().filter(|id| !id.contains('\0') && id.len() < 1_000) {
        assert_eq!(counters.get(id).await, Count::Exact(0), "{id:?}");
        assert_eq!(counters.incr(id, 7).await, Ok(Count::Exact(7)), "{id:?}");
        is_clean(&lab, id).await;
        lab.client().await.call(&["DEL", &format!("counter:{id}")]).await;
        assert_eq!(counters.get(id).await, Count::Exact(7), "{id:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_postgresql_cannot_have_is_known_to_be_bad_and_the_others_are_read() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters values ('a', 5, now()), ('b', 6, now())").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    // A PostgreSQL that is taken to be away is left alone for as long as the test lasts.
    let counters =
        counters_at(&lab.valkey.url(), &lab.database, CounterOptions { breaker: FOREVER, ..options() }).await;
    let bad = Count::Unknown(Why::BadId);
    assert_eq!(counters.get_many(&["nul\0", "a", "nul\0"]).await, [bad, Count::Exact(5), bad]);
    assert_eq!(counters.get("nul\0").await, bad);
    assert_eq!(counters.incr("nul\0", 1).await, Err(NotAdded::BadId));
    assert_eq!(counters.take("nul\0", 1, 0).await, Err(NotAdded::BadId));
    assert_eq!(counters.get("b").await, Count::Exact(6));
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_that_vanish_while_many_are_read_are_read_exactly() {
    const COUNTERS: usize = 300;
    let lab = Lab {
        valkey: Valkey::start(&["--maxmemory-policy", "volatile-random"]).await.expect("Valkey starts"),
        ..Lab::new().await
    };
    let rows =
        format!("insert into public.counters select 'c' || n, n, now() from generate_series(0, {COUNTERS} - 1) n");
    lab.execute(&rows).await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    let ids: Vec<String> = (0..COUNTERS).map(|n| format!("c{n}")).collect();
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    let expected: Vec<Count> = (0..COUNTERS).map(|n| Count::Exact(n as i64)).collect();
    eventually("all", expected.clone(), async || counters.get_many(&names).await).await;
    // Others' values take as many keys and most of the memory: without them everything that can be evicted would be
    // gone after a few buffers of connections, and the server would stay full.
    let mut client = lab.client().await;
    let other_value = "x".repeat(10_000);
    for n in 0..COUNTERS {
        client.call(&["SET", &format!("other:{n}"), &other_value, "EX", "600"]).await;
    }
    // Whatever comes takes another one's place.
    leave_memory(&mut client, 0).await;
    let over = Arc::new(AtomicBool::new(false));
    let busy = tokio::spawn({
        let over = over.clone();
        let mut client = lab.client().await;
        async move {
            // Each of them is a new one, and must find room.
            for n in (COUNTERS..).take_while(|_| !over.load(Ordering::Relaxed)) {
                client.call(&["SET", &format!("other:{n}"), &other_value, "EX", "600"]).await;
                client.call(&["DEL", &format!("counter:c{}", n % COUNTERS)]).await;
            }
        }
    });
    // Until as many values were evicted as there are counters, and thirty times at least.
    let reading = async {
        let (mut exact, mut rounds) = (0, 0);
        while rounds < 30 || evicted(&mut client).await < COUNTERS {
            rounds += 1;
            for (count, expected) in counters.get_many(&names).await.into_iter().zip(&expected) {
                match count {
                    Count::Unknown(_) => {}
                    // A full Valkey grants no lease; then PostgreSQL itself is asked.
                    Count::Stored(value) => assert_eq!(Count::Exact(value), *expected),
                    count => {
                        assert_eq!(count, *expected);
                        exact += 1;
                    }
                }
            }
        }
        (exact, rounds)
    };
    let (exact, rounds) = within_limit("as many evictions as counters", reading).await;
    over.store(true, Ordering::Relaxed);
    within_limit("who writes and deletes", busy).await.expect("no panic");
    assert!(exact > COUNTERS, "{exact} read exactly in {rounds} rounds");
    // While the server is full it may be full of what cannot be evicted, such as the buffers of its connections.
    client.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
    eventually("all at rest", expected, async || counters.get_many(&names).await).await;
}

/// How many keys a Valkey has evicted.
async fn evicted(client: &mut Client) -> usize {
    let stats = client.call(&["INFO", "stats"]).await.text();
    let evicted = stats.lines().find_map(|line| line.strip_prefix("evicted_keys:")?.parse().ok());
    evicted.expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_cancelled_while_a_value_is_brought_keeps_nobody_waiting() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters select 'c' || n, 7, now() from generate_series(0, 9) n").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let through = lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string());
    let held = CounterOptions { lease: FOREVER, patience: FOREVER, ..options() };
    let (one, other) = (
        counters_at(&lab.valkey.url(), &through, held).await,
        counters_at(&lab.valkey.url(), &lab.database, options()).await,
    );
    // What it asks PostgreSQL has no answer.
    proxy.hold(Way::ToServer);
    let leases = async || {
        let keys = lab.client().await.call(&["KEYS", "tidegate:hydrate:*"]).await.array();
        keys.len()
    };
    let tasks: Vec<tokio::task::JoinHandle<()>> = vec![
        tokio::spawn({
            let one = one.clone();
            async move {
                let _ = one.get("c0").await;
            }
        }),
        tokio::spawn({
            let one = one.clone();
            async move { drop(one.incr("c1", 1).await) }
        }),
        tokio::spawn({
            let one = one.clone();
            async move { drop(one.get_many(&["c2", "c3", "c4"]).await) }
        }),
    ];
    eventually("leases", 5, leases).await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    eventually("leases", 0, leases).await;
    for n in 0..5 {
        let id = format!("c{n}");
        let count = within_limit("a value", other.get(&id)).await;
        assert_eq!(count, Count::Exact(7), "{id}");
    }
}

/// Cancels what asks with this function when so many leases are granted to it, and before it hears of that: then there is none any more.
async fn leave_unheard(lab: &Lab, proxy: &Proxy, function: &[u8], granted: usize, asking: impl Future) {
    let leases = async || {
        let mut client = lab.client().await;
        let (counters, rows) = (["KEYS", "tidegate:hydrate:*"], ["KEYS", "tidegate:load:*"]);
        client.call(&counters).await.array().len() + client.call(&rows).await.array().len()
    };
    let asked = proxy.trap(Way::ToServer, function, Then::Hold);
    let on_its_way = async {
        within_limit("the question", asked).await.expect("sprung");
        proxy.hold(Way::ToClient);
        proxy.release(Way::ToServer);
        eventually("granted", granted, leases).await;
    };
    tokio::select! {
        _ = asking => panic!("it was answered"),
        () = on_its_way => {}
    }
    proxy.release(Way::ToClient);
    eventually("leases", 0, leases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_cancelled_while_a_lease_is_on_its_way_keeps_nobody_waiting() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters select 'c' || n, 7, now() from generate_series(0, 9) n").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let held = CounterOptions { lease: FOREVER, ..options() };
    let one = counters_at(&proxy.url(), &lab.database, held).await;
    let rows: Cache<String> = Cache::new(&address(&proxy.url()), "users", held_forever());
    let other = counters(&lab).await;
    assert_eq!(one.get("c9").await, Count::Exact(7));
    assert_eq!(rows.get("9", async || Ok(Some("Ada".into()))).await.expect("loaded").as_deref(), Some(&"Ada".into()));
    leave_unheard(&lab, &proxy, b"tidegate_1_lease", 1, one.get("c0")).await;
    leave_unheard(&lab, &proxy, b"tidegate_1_incr", 1, one.incr("c1", 1)).await;
    leave_unheard(&lab, &proxy, b"tidegate_1_incr", 1, one.take("c2", 1, 0)).await;
    leave_unheard(&lab, &proxy, b"tidegate_1_lease", 2, one.get_many(&["c3", "c4"])).await;
    leave_unheard(&lab, &proxy, b"tidegate_1_load", 1, rows.get("7", never)).await;
    for n in 0..5 {
        let id = format!("c{n}");
        assert_eq!(within_limit("a value", other.get(&id)).await, Count::Exact(7), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_counters_whose_flush_is_behind_are_waited_for_together() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let through = lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string());
    let mut command = program(&lab, &["run"]);
    command.env("DATABASE_URL", &through);
    let _daemon = Daemon::start(command);
    is_managed(&lab).await;
    let patience = Duration::from_secs(1);
    let counters =
        counters_at(&lab.valkey.url(), &through, CounterOptions { patience, lease: FOREVER, ..options() }).await;
    proxy.cut();
    let ids: Vec<String> = (0..60).map(|n| format!("c{n}")).collect();
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    let increments: Vec<(&str, i64)> = names.iter().map(|id| (*id, 1)).collect();
    assert!(counters.add_many(&increments).await.iter().all(Result::is_ok));
    let began = Instant::now();
    let counts = counters.get_many(&names).await;
    assert!(counts.iter().all(|count| matches!(count, Count::Unknown(_))), "{counts:?}");
    // One after another they would take a minute.
    assert!(began.elapsed() < patience * 20, "{:?}", began.elapsed());
    proxy.heal();
    eventually("all", vec![Count::Exact(1); 60], async || counters.get_many(&names).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_somebody_made_of_another_type_is_loaded_and_dropped_like_any_other() {
    let server = server().await;
    let cache = cache(&server, held_forever());
    let mut client = Client::connect(server.port()).await;
    client.call(&["RPUSH", "cache:users:{7}", "a", "b"]).await;
    client.call(&["RPUSH", "tidegate:load:users:{8}", "a"]).await;
    for id in ["7", "8"] {
        let row = within_limit("a row", cache.get(id, async || Ok(Some("loaded".into())))).await.expect("loaded");
        assert_eq!(text(row).as_deref(), Some("loaded"), "{id}");
    }
    // What was no row has been replaced by one; where the lease is no lease the row is loaded each time, until somebody drops that.
    assert_eq!(text(cache.get("7", never).await.expect("there")).as_deref(), Some("loaded"));
    let failed = within_limit("an error", cache.get("8", async || Err("away".into()))).await;
    assert!(matches!(failed, Err(NotLoaded::Loader(_))), "{failed:?}");
    client.call(&["DEL", "tidegate:load:users:{8}"]).await;
    cache.get("8", async || Ok(Some("loaded".into()))).await.expect("loaded");
    assert_eq!(client.call(&["GET", "cache:users:{8}"]).await, Resp::Text(b"loaded".to_vec()));
}
