//! The near cache: what a process holds in its memory is what Valkey has, or nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tidegate::client::{Cache, CacheOptions, NearCache, NearOptions, Tracking};
use tidegate::functions;
use tidegate::ops::sandbox::Valkey;
use tidegate::valkey::{Connection, Endpoint};

use crate::harness::{Client, Resp, eventually, within_limit};
use crate::proxy::{Proxy, Way};

const WAYS: [(Tracking, bool); 6] = [
    (Tracking::Broadcast, false),
    (Tracking::Broadcast, true),
    (Tracking::Default, false),
    (Tracking::Default, true),
    (Tracking::OptIn, false),
    (Tracking::OptIn, true),
];

fn address(url: &str) -> Endpoint {
    let limit = Duration::from_secs(20);
    Endpoint::new(url.to_owned().into(), limit, limit)
}

async fn server() -> Valkey {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let connection = Connection::open(&address(&server.url()), "test").await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    server
}

fn options(tracking: Tracking, no_loop: bool) -> NearOptions {
    NearOptions { tracking, no_loop, verify: 0.0, heartbeat: Duration::from_millis(200), ..NearOptions::default() }
}

async fn near_at(url: &str, options: NearOptions) -> NearCache<String> {
    let cache = Cache::new(&address(url), "users", CacheOptions::default());
    let near = NearCache::new(&address(url), cache, options);
    eventually("it listens", true, async || near.is_listening()).await;
    near
}

/// Reads a row that is in Valkey.
async fn read(near: &NearCache<String>, id: &str) -> Option<String> {
    near.get(id, async || Ok(None)).await.expect("an answer").map(|row| row.to_string())
}

async fn set(client: &mut Client, id: &str, value: &str) {
    client.call(&["SET", &format!("cache:users:{{{id}}}"), value, "PX", "600000"]).await;
}

/// What a near cache holds, without asking.
fn held(near: &NearCache<String>, id: &str) -> Option<String> {
    near.held(id).flatten().map(|row| row.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn by_each_way_of_tracking_a_change_is_heard() {
    let server = server().await;
    let mut client = Client::connect(server.port()).await;
    for (tracking, no_loop) in WAYS {
        let near = near_at(&server.url(), options(tracking, no_loop)).await;
        let what = format!("{tracking:?}, no_loop {no_loop}");
        let changes: [&[&str]; 7] = [
            &["SET", "cache:users:{7}", "changed", "PX", "600000"],
            &["UNLINK", "cache:users:{7}"],
            &["PEXPIRE", "cache:users:{7}", "1"],
            &["APPEND", "cache:users:{7}", "more"],
            &["FLUSHALL"],
            &["FCALL", "tidegate_1_invalidate", "2", "cache:users:{7}", "tidegate:load:users:{7}"],
            &["FCALL", "tidegate_1_fence", "2", "cache:users:{7}", "tidegate:load:users:{7}", "1", "1"],
        ];
        for change in changes {
            set(&mut client, "7", "Ada").await;
            eventually(&what, Some("Ada".to_owned()), async || {
                read(&near, "7").await;
                held(&near, "7")
            })
            .await;
            let before = near.stats().hits;
            assert_eq!(read(&near, "7").await.as_deref(), Some("Ada"));
            assert_eq!(near.stats().hits, before + 1, "{what}");
            let done = client.call(change).await;
            assert!(!matches!(done, Resp::Error(_)), "{what}: {change:?}: {done:?}");
            eventually(&format!("{what}: {change:?}"), None, async || held(&near, "7")).await;
            client.call(&["DEL", "tidegate:load:users:{7}"]).await;
        }
        // This process's own writes are seen at once, whatever is pushed.
        near.write("7", async || Ok(((), Some(Some("own".to_owned()))))).await.expect("written");
        assert_eq!(read(&near, "7").await.as_deref(), Some("own"), "{what}");
    }
}

/// How often the server was asked for a value.
async fn gets(client: &mut Client) -> u64 {
    let stats = client.call(&["INFO", "commandstats"]).await.text();
    let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_get:calls=")?.split(',').next()?.parse().ok());
    calls.unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_change_has_overtaken_is_not_held() {
    let server = server().await;
    let mut client = Client::connect(server.port()).await;
    for (tracking, no_loop) in WAYS {
        let proxy = Proxy::start(server.port()).await;
        let heartbeat = Duration::from_secs(30);
        let near = near_at(&proxy.url(), NearOptions { heartbeat, ..options(tracking, no_loop) }).await;
        let old = "old".repeat(400_000);
        set(&mut client, "7", &old).await;
        let (asked, heard) = (gets(&mut client).await, near.stats().invalidated);
        // A long answer is on its way for a while; the message about the change, on its own connection, is short.
        proxy.slow(1_000_000);
        let reading = tokio::spawn({
            let near = near.clone();
            async move { read(&near, "7").await }
        });
        eventually("the question", true, async || gets(&mut client).await > asked).await;
        set(&mut client, "7", "new").await;
        eventually("the message", true, async || near.stats().invalidated > heard).await;
        assert_eq!(within_limit("the answer", reading).await.expect("no panic"), Some(old), "{tracking:?}");
        assert_eq!(held(&near, "7"), None, "{tracking:?}, no_loop {no_loop}");
        assert_eq!(read(&near, "7").await.as_deref(), Some("new"), "{tracking:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_old_is_held_at_rest_after_races_cuts_and_bursts() {
    let server = server().await;
    for (tracking, no_loop) in WAYS {
        let near = near_at(&server.url(), options(tracking, no_loop)).await;
        let over = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..3u64)
            .map(|n| {
                let (near, over) = (near.clone(), over.clone());
                tokio::spawn(async move {
                    let mut random = StdRng::seed_from_u64(n);
                    while !over.load(Ordering::Relaxed) {
                        read(&near, &random.random_range(0..20).to_string()).await;
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        let (mut client, mut random) = (Client::connect(server.port()).await, StdRng::seed_from_u64(5));
        for round in 0..12 {
            for _ in 0..20 {
                let (id, value) = (random.random_range(0..20).to_string(), random.random::<u32>().to_string());
                set(&mut client, &id, &value).await;
            }
            if round % 4 == 3 {
                let list = client.call(&["CLIENT", "LIST"]).await.text();
                for line in list.lines().filter(|line| line.contains("name=tidegate-near")) {
                    let id = line.split(' ').next().and_then(|word| word.strip_prefix("id=")).expect("an id");
                    client.call(&["CLIENT", "KILL", "ID", id]).await;
                }
                for _ in 0..10 {
                    let (id, value) = (random.random_range(0..20).to_string(), random.random::<u32>().to_string());
                    set(&mut client, &id, &value).await;
                }
            }
        }
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            within_limit("a reader", reader).await.expect("no panic");
        }
        eventually(&format!("{tracking:?}, no_loop {no_loop}: rows that are held and old"), 0, async || {
            let mut old = 0;
            for id in (0..20).map(|id| id.to_string()) {
                if let Some(held) = held(&near, &id) {
                    let now = client.call(&["GET", &format!("cache:users:{{{id}}}")]).await;
                    old += usize::from(now != Resp::Text(held.into_bytes()));
                }
            }
            old
        })
        .await;
        assert!(near.stats().flushes >= 1 && near.stats().invalidated > 0, "{:?}", near.stats());
    }
    // A burst of changes is heard to its end.
    let near = near_at(&server.url(), options(Tracking::Broadcast, false)).await;
    let mut client = Client::connect(server.port()).await;
    let value = |n: usize| ["SET".to_owned(), format!("cache:users:{{b{n}}}"), "x".to_owned()];
    for burst in (0..100_000).collect::<Vec<_>>().chunks(2_000) {
        client.pipeline(&burst.iter().map(|n| value(*n)).collect::<Vec<_>>()).await;
    }
    eventually("the whole burst", true, async || near.stats().invalidated >= 100_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_goes_silent_empties_the_near_cache() {
    let server = server().await;
    let proxy = Proxy::start(server.port()).await;
    let near = near_at(&proxy.url(), options(Tracking::Broadcast, false)).await;
    let mut client = Client::connect(server.port()).await;
    set(&mut client, "7", "Ada").await;
    eventually("held", Some("Ada".to_owned()), async || {
        read(&near, "7").await;
        held(&near, "7")
    })
    .await;
    // Nothing is cut: what the server sends stays in the network.
    proxy.hold(Way::ToClient);
    set(&mut client, "7", "Grace").await;
    eventually("held while nothing is heard", None, async || held(&near, "7")).await;
    assert!(!near.is_listening());
    proxy.release(Way::ToClient);
    eventually("held again", Some("Grace".to_owned()), async || {
        read(&near, "7").await;
        held(&near, "7")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_hits_is_compared_and_a_row_has_an_end_whatever_is_heard() {
    let server = server().await;
    let ttl_cap = Duration::from_millis(300);
    let near = near_at(&server.url(), NearOptions { verify: 1.0, ttl_cap, ..options(Tracking::OptIn, false) }).await;
    let mut client = Client::connect(server.port()).await;
    set(&mut client, "7", "Ada").await;
    eventually("held", Some("Ada".to_owned()), async || {
        read(&near, "7").await;
        held(&near, "7")
    })
    .await;
    let compared = async || {
        assert_eq!(read(&near, "7").await.as_deref(), Some("Ada"));
        near.stats().verified >= 1
    };
    eventually("compared", true, compared).await;
    assert_eq!(near.stats().differed, 0, "{:?}", near.stats());
    eventually("the end", None, async || held(&near, "7")).await;
}
