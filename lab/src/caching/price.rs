//! Price: the processor time that an increment and a read cost Valkey, as Valkey itself tells it, and what a read of the near cache costs its process.

use std::error::Error;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tidegate::client::truth::NoTruth;
use tidegate::client::{Cache, CacheOptions, CounterOptions, Counters, NearCache, NearOptions};
use tidegate::flow::news::News;
use tidegate::functions;
use tidegate::model::pipeline::{Mode, Pipeline};
use tidegate::ops::sandbox::Valkey;
use tidegate::valkey::{Connection, Link};
use tidegate_lab::harness::eventually;
use tokio::task::JoinSet;

use super::{Table, connect, endpoint, words};

const OPERATIONS: usize = 40_000;
const AT_ONCE: usize = 50;
const COUNTERS: usize = 1_000;
/// Reads of the near cache: each is short.
const NEAR_READS: usize = 200_000;

pub(super) async fn table() -> Result<Table, Box<dyn Error>> {
    let server = Valkey::start(&[]).await?;
    let url = server.url();
    let plain = Rc::new(connect(&url).await?);
    functions::load(&plain).await?;
    let pipeline = Pipeline { mode: Mode::Managed, ..Pipeline::counters() };
    let counters = Counters::connect(&endpoint(&url), &pipeline, NoTruth, CounterOptions::default()).await?;
    let cache = Cache::<String>::new(&endpoint(&url), "rows", CacheOptions::default());
    let near = Rc::new(NearCache::new(&endpoint(&url), cache.clone(), NearOptions::default()));
    eventually("the near cache listens", true, async || near.is_listening()).await;
    for n in 0..COUNTERS {
        plain.call(words("SET", [&format!("counter:c{n}"), "1"])).await?;
        // Settled once: a value without a TTL that the index does not know would be a stranger's.
        plain.call(words("PEXPIRE", [&format!("counter:c{n}"), "600000"])).await?;
        cache.get(&format!("c{n}"), async || Ok(Some("x".repeat(100)))).await?;
        near.get(&format!("c{n}"), async || Ok(Some("x".repeat(100)))).await?;
    }
    let mut rows = Vec::new();
    let mut add = |name: &str, cost: Option<Duration>, took: Duration, operations: usize| {
        let each = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e6 / operations as f64);
        rows.push(vec![name.to_owned(), cost.map_or_else(|| "0".into(), each), each(took)]);
    };
    let of = plain.clone();
    let (cost, took) = measure(&plain, OPERATIONS, async move |id| {
        of.call(words("INCRBY", [&format!("plain:{id}"), "1"])).await.expect("added");
    })
    .await?;
    add("INCRBY", Some(cost), took, OPERATIONS);
    let of = plain.clone();
    let (cost, took) = measure(&plain, OPERATIONS, async move |id| {
        of.call(words("INCRBY", [&format!("plain:{id}"), "1"])).await.expect("added");
        of.call(words("XADD", ["plain", "*", "id", &id, "amount", "1"])).await.expect("added");
    })
    .await?;
    add("INCRBY and XADD, two commands", Some(cost), took, OPERATIONS);
    let of = plain.clone();
    let xadd = async move |id: String| {
        let stream = format!("announced:{{{}}}", &id[id.len() - 1..]);
        of.call(words("XADD", [&stream, "*", "id", &id, "amount", "1"])).await.expect("added");
    };
    let (cost, took) = measure(&plain, OPERATIONS, xadd.clone()).await?;
    add("XADD", Some(cost), took, OPERATIONS);
    let workers: Vec<_> = (0..2).map(|_| tokio::task::spawn_local(hear(url.clone()))).collect();
    let mut listening = async || {
        let list = plain.call(words("CLIENT", ["LIST"])).await.expect("a list");
        list.as_text().expect("text").matches(" name=tidegate:news").count()
    };
    eventually("two workers listen", 2, &mut listening).await;
    let (cost, took) = measure(&plain, OPERATIONS, xadd).await?;
    add("XADD to a stream that the server announces to two workers", Some(cost), took, OPERATIONS);
    workers.iter().for_each(tokio::task::JoinHandle::abort);
    eventually("nobody listens", 0, listening).await;
    let of = counters.clone();
    let (cost, took) = measure(&plain, OPERATIONS, async move |id| of.add(&id, 1).await.expect("added")).await?;
    add("tidegate, `add`", Some(cost), took, OPERATIONS);
    let of = counters.clone();
    let (cost, took) = measure(&plain, OPERATIONS / 100, async move |id| {
        let first: usize = id[1..].parse().expect("a number");
        let many: Vec<(String, i64)> = (0..100).map(|n| (format!("c{}", (first + n * 7) % COUNTERS), 1)).collect();
        of.add_many(&many).await.into_iter().for_each(|added| assert!(added.is_ok(), "{added:?}"));
    })
    .await?;
    add("tidegate, `add_many` of 100", Some(cost), took, OPERATIONS);
    let of = plain.clone();
    let (cost, took) = measure(&plain, OPERATIONS, async move |id| {
        of.call(words("GET", [&format!("plain:{id}")])).await.expect("read");
    })
    .await?;
    add("GET", Some(cost), took, OPERATIONS);
    let of = counters.clone();
    let (cost, took) = measure(&plain, OPERATIONS, async move |id| {
        of.get(&id).await.exact().expect("present");
    })
    .await?;
    add("tidegate, `Counters::get` of a value that is present", Some(cost), took, OPERATIONS);
    let (cost, took) = measure(&plain, OPERATIONS, async move |id| {
        cache.get(&id, async || Ok(None)).await.expect("present");
    })
    .await?;
    add("tidegate, `Cache::get` of a row that is present", Some(cost), took, OPERATIONS);
    // A message about a row that was put in place above may have come behind its first read: then it is not held yet.
    for n in 0..COUNTERS {
        let id = format!("c{n}");
        eventually("a row in memory", true, async || {
            let _ = near.get(&id, async || Ok(None)).await;
            near.held(&id).is_some()
        })
        .await;
    }
    let before = near.stats().misses;
    let begin = Instant::now();
    for n in 0..NEAR_READS {
        near.get(&format!("c{}", n % COUNTERS), async || Ok(None)).await?;
    }
    add("tidegate, `NearCache::get` of a row that is held", None, begin.elapsed(), NEAR_READS);
    let stats = near.stats();
    if stats.misses > before {
        return Err(format!("the near cache missed: {stats:?}").into());
    }
    Ok(Table {
        name: "price",
        title: format!("{OPERATIONS} operations on {COUNTERS} keys, {AT_ONCE} at once, not pipelined"),
        head: &["", "Valkey's processor time each, µs", "time each, µs"],
        rows,
        plotted: (1, "Valkey's processor time each, µs"),
    })
}

/// Is told of what is written to the announced streams, as an exclusive worker with many streams is.
async fn hear(url: String) {
    let streams: Vec<String> = (0..64).map(|n| format!("announced:{{{n}}}")).collect();
    let link = Link::open(&endpoint(&url), "tidegate:price").await.expect("a link");
    News::of(streams.iter().map(String::as_str)).listen(&link).await;
}

/// Does one thing again and again, [`AT_ONCE`] of it at a time; gives the processor time that Valkey used, and the time that it took.
async fn measure(
    plain: &Connection,
    operations: usize,
    one: impl AsyncFn(String) + 'static,
) -> Result<(Duration, Duration), Box<dyn Error>> {
    let (before, begin, one, mut tasks) = (used(plain).await?, Instant::now(), Rc::new(one), JoinSet::new());
    for task in 0..AT_ONCE {
        let one = one.clone();
        tasks.spawn_local(async move {
            for n in 0..operations / AT_ONCE {
                one(format!("c{}", (task * 31 + n * 7) % COUNTERS)).await;
            }
        });
    }
    tasks.join_all().await;
    Ok((used(plain).await?.saturating_sub(before), begin.elapsed()))
}

/// Processor time that Valkey has used.
async fn used(connection: &Connection) -> Result<Duration, Box<dyn Error>> {
    let reply = connection.call(words("INFO", ["cpu"])).await?;
    let text = reply.as_text().ok_or("no text")?;
    let seconds = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)?.parse::<f64>().ok());
    let all = seconds("used_cpu_user:").zip(seconds("used_cpu_sys:")).ok_or("no processor time")?;
    Ok(Duration::from_secs_f64(all.0 + all.1))
}
