//! The reading side in a Valkey Cluster: managed counters, rows, and the commands about them, while slots move and primaries die.
//!
//! The tests share the cluster of [`crate::cluster`]; each has keys of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use rand::RngExt;
use tidegate::client::postgres::Database;
use tidegate::client::{
    Cache, CacheOptions, Count, CounterOptions, Counters, NearCache, NearOptions, NotAdded, Tracking,
};
use tidegate::config::{Needs, Sources};
use tidegate::functions;
use tidegate::model::pipeline::{Mode, Pipeline};
use tidegate::model::shard::shard_of;
use tidegate::retry::Fault;
use tidegate::valkey::{Connection, Endpoint};
use tidegate_lab::cluster::Cluster;
use tidegate_lab::writers::{lab, program as any_program, rows};
use tokio::process::Command;
use tokio::task::JoinHandle;

use crate::cluster::{cluster, locked};
use crate::harness::{Client, Daemon, Lab, Resp, eventually, output};
use crate::managed::is_open;

/// Counters of each test's pipeline.
const COUNTERS: usize = 24;

fn address(url: &str) -> Endpoint {
    let limit = Duration::from_secs(5);
    Endpoint::new(url.to_owned().into(), limit, limit)
}

/// A managed pipeline of several shards.
fn pipeline(stream: &str) -> Pipeline {
    Pipeline {
        stream: stream.into(),
        shards: 3,
        counters: format!("counter:of-{stream}:"),
        mode: Mode::Managed,
        ..Pipeline::counters()
    }
}

/// The program with this pipeline.
fn program(lab: &Lab, url: &str, pipeline: &Pipeline, arguments: &[&str]) -> Command {
    let mut command = any_program(lab, url, arguments, &pipeline.stream, None);
    command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", pipeline.shards.to_string());
    command.env("TIDEGATE__PIPELINES__COUNTERS__COUNTER_PREFIX", &pipeline.counters);
    command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed");
    command
}

async fn counters(lab: &Lab, url: &str, pipeline: &Pipeline) -> Counters<Database> {
    let env = [("DATABASE_URL".to_owned(), lab.database.clone())].into();
    let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES).expect("valid");
    let database = Database::new(loaded.config.postgres.address().expect("set"), "main", pipeline, 4);
    // Patient enough, on a machine under load, for a slot that is moved key by key, and for a primary that is replaced.
    let options = CounterOptions {
        patience: Duration::from_secs(20),
        retry_for: Duration::from_secs(60),
        breaker: Duration::from_millis(50),
        ..CounterOptions::default()
    };
    Counters::connect(&address(url), pipeline, database, options).await.expect("connected")
}

/// Waits until a daemon manages all shards.
async fn is_managed(cluster: &Cluster, pipeline: &Pipeline) {
    for shard in 0..pipeline.shards {
        let keys = pipeline.keys_of(shard);
        eventually("managed", true, async || is_open(&mut cluster.client_of(&keys.state).await, &keys).await).await;
    }
}

/// Producers, readers, and whoever deletes values, until they are stopped.
struct Busy {
    stop: Arc<AtomicBool>,
    /// What was accepted, and what nobody knows of.
    accepted: Arc<Vec<AtomicI64>>,
    unknown: Arc<AtomicI64>,
    reads: Arc<AtomicI64>,
    tasks: Vec<JoinHandle<()>>,
}

/// The numbers of those counters whose increments a primary may lose when it dies: those that it has.
async fn counters_on(cluster: &Cluster, pipeline: &Pipeline, primary: usize) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    for n in 0..COUNTERS {
        if cluster.await_primary_of(&pipeline.counter_of(&id(n))).await == primary {
            found.insert(n);
        }
    }
    found
}

fn id(n: usize) -> String {
    format!("id{n}")
}

impl Busy {
    /// `may_lose`: those of the counters that may lose what was accepted.
    fn with(counters: &Counters<Database>, cluster: &Cluster, pipeline: &Pipeline, may_lose: &BTreeSet<usize>) -> Busy {
        let stop = Arc::new(AtomicBool::new(false));
        let accepted: Arc<Vec<AtomicI64>> = Arc::new((0..COUNTERS).map(|_| AtomicI64::new(0)).collect());
        let (unknown, reads) = (Arc::<AtomicI64>::default(), Arc::<AtomicI64>::default());
        let mut tasks = Vec::new();
        for adder in 0..3 {
            let (counters, stop, accepted) = (counters.clone(), stop.clone(), accepted.clone());
            let (unknown, reads, may_lose) = (unknown.clone(), reads.clone(), may_lose.clone());
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let n = rand::rng().random_range(0..COUNTERS);
                    let by = rand::rng().random_range(1..5);
                    let before = accepted[n].load(Ordering::SeqCst);
                    let note = |outcome: Result<(), NotAdded>, n: usize| match outcome {
                        Ok(()) => drop(accepted[n].fetch_add(by, Ordering::SeqCst)),
                        Err(NotAdded::Unknown(_)) => drop(unknown.fetch_add(by, Ordering::SeqCst)),
                        Err(why) => assert!(why.happened_not(), "{why}"),
                    };
                    match adder {
                        0 => note(counters.add(&id(n), by).await, n),
                        1 => match counters.incr(&id(n), by).await {
                            Ok(count) => {
                                note(Ok(()), n);
                                // All that was accepted before is in it.
                                if let Some(value) = count.exact() {
                                    reads.fetch_add(1, Ordering::SeqCst);
                                    assert!(value >= before + by || may_lose.contains(&n), "{value} {before}");
                                }
                            }
                            Err(why) => note(Err(why), n),
                        },
                        _ => {
                            let pairs: Vec<(String, i64)> = (0..COUNTERS).map(|n| (id(n), by)).collect();
                            for (n, outcome) in counters.add_many(&pairs).await.into_iter().enumerate() {
                                note(outcome.map(drop), n);
                            }
                        }
                    }
                }
            }));
        }
        let (stopped, ports, pipeline) = (stop.clone(), cluster.ports(), pipeline.clone());
        tasks.push(tokio::spawn(async move {
            // A value is disposable: whoever has it drops it, the others send on.
            while !stopped.load(Ordering::Relaxed) {
                let counter = pipeline.counter_of(&id(rand::rng().random_range(0..COUNTERS)));
                for port in &ports {
                    if let Ok(mut client) = Client::try_connect(*port).await {
                        let _ = client.try_pipeline(&[["DEL", counter.as_str()]]).await;
                    }
                }
            }
        }));
        Busy { stop, accepted, unknown, reads, tasks }
    }

    /// Waits until more is accepted and read than was.
    async fn goes_on(&self) {
        let sum = || self.accepted.iter().map(|count| count.load(Ordering::SeqCst)).sum::<i64>();
        let (before, reads) = (sum(), self.reads.load(Ordering::SeqCst));
        let on = async || sum() > before + 200 && self.reads.load(Ordering::SeqCst) > reads + 3;
        eventually("more was accepted", true, on).await;
    }

    /// Stops all of it; gives what was accepted of each, and how much nobody knows of.
    async fn end(self) -> (Vec<i64>, i64) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("no value was wrong");
        }
        let accepted = self.accepted.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        (accepted, self.unknown.load(Ordering::SeqCst))
    }
}

/// Every counter, by all ways of reading, equals its row; gives the rows.
async fn assert_agree(lab: &Lab, counters: &Counters<Database>) -> Vec<i64> {
    let ids: Vec<String> = (0..COUNTERS).map(id).collect();
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    for id in &names {
        counters.settled(id, Duration::from_secs(60)).await.expect("settled");
    }
    let stored = rows(lab, "public.counters").await;
    let stored: Vec<i64> = ids.iter().map(|id| stored.get(id).copied().unwrap_or(0)).collect();
    let exact = |values: &[i64]| values.iter().map(|value| Count::Exact(*value)).collect::<Vec<_>>();
    eventually("values equal rows", exact(&stored), async || counters.get_many(&names).await).await;
    stored
}

#[tokio::test(flavor = "multi_thread")]
async fn managed_counters_are_exact_while_slots_move_and_values_vanish() {
    let (cluster, lab) = (cluster().await, lab().await);
    let pipeline = pipeline("flush:managed-moves");
    let _daemons = [0, 1].map(|_| Daemon::start(program(&lab, &cluster.url(), &pipeline, &["run"])));
    is_managed(&cluster, &pipeline).await;
    let counters = counters(&lab, &cluster.url(), &pipeline).await;
    let busy = Busy::with(&counters, &cluster, &pipeline, &BTreeSet::new());
    busy.goes_on().await;
    let stream = pipeline.stream_of(1);
    let home = cluster.await_primary_of(&stream).await;
    for to in cluster.other_primaries(&stream).await.into_iter().chain([home]) {
        cluster.move_slot(&stream, to).await;
        busy.goes_on().await;
    }
    for to in cluster.other_primaries(&stream).await.into_iter().chain([home]) {
        if !cluster.move_slot_in_one_step(&stream, to).await {
            eprintln!("key by key only: this Valkey has no CLUSTER MIGRATESLOTS (9.0 and newer have)");
            break;
        }
        busy.goes_on().await;
    }
    let (accepted, unknown) = busy.end().await;
    assert_eq!(unknown, 0, "nobody died");
    assert_eq!(assert_agree(&lab, &counters).await, accepted);
}

#[tokio::test(flavor = "multi_thread")]
async fn managed_counters_agree_with_their_rows_after_a_primary_has_died() {
    let (mut cluster, lab) = (cluster().await, lab().await);
    let pipeline = pipeline("flush:managed-dies");
    let _daemons = [0, 1].map(|_| Daemon::start(program(&lab, &cluster.url(), &pipeline, &["run"])));
    is_managed(&cluster, &pipeline).await;
    let counters = counters(&lab, &cluster.url(), &pipeline).await;
    let stream = pipeline.stream_of(2);
    let old = cluster.await_primary_of(&stream).await;
    let may_lose = counters_on(&cluster, &pipeline, old).await;
    let busy = Busy::with(&counters, &cluster, &pipeline, &may_lose);
    busy.goes_on().await;
    // Replication is asynchronous: what the replica has not heard is lost with the primary, though it was accepted and read. Some of it was flushed.
    cluster.cut_off_replica_of(&stream).await;
    busy.goes_on().await;
    let holder = locked(&lab).await;
    for n in &may_lose {
        counters.add(&id(*n), 1).await.expect("accepted");
        busy.accepted[*n].fetch_add(1, Ordering::SeqCst);
    }
    cluster.kill_primary_of(&stream).await;
    drop(holder);
    busy.goes_on().await;
    cluster.bring_back(old).await;
    cluster.heal().await;
    eventually("a replica again", true, async || cluster.nodes()[old].is_replica_in_step().await).await;
    cluster.promote(old).await;
    busy.goes_on().await;
    eventually("all as before", true, async || cluster.is_whole(3, 6).await).await;
    let (accepted, unknown) = busy.end().await;
    assert_eq!(unknown, 0, "what had no answer was sent again");
    let stored = assert_agree(&lab, &counters).await;
    let lost = accepted.iter().zip(stored).map(|(accepted, stored)| accepted - stored);
    let lost: Vec<(usize, i64)> = lost.enumerate().filter(|(_, by)| *by != 0).collect();
    assert!(!lost.is_empty() && lost.iter().all(|(n, by)| *by > 0 && may_lose.contains(n)), "{lost:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn values_in_doubt_are_dropped_wherever_a_slot_that_is_on_its_way_has_them() {
    let (cluster, lab) = (cluster().await, lab().await);
    let pipeline = pipeline("flush:managed-doubt");
    let mut daemon = Daemon::start(program(&lab, &cluster.url(), &pipeline, &["run"]));
    is_managed(&cluster, &pipeline).await;
    let counters = counters(&lab, &cluster.url(), &pipeline).await;
    let keys = pipeline.keys_of(shard_of("in doubt", 3));
    // A second counter of the shard, which stays dirty: nothing is flushed for now.
    let other = (0..).map(id).find(|id| pipeline.keys_of(shard_of(id, 3)) == keys).expect("one");
    assert_eq!(counters.incr("in doubt", 5).await, Ok(Count::Exact(5)));
    assert_eq!(counters.incr(&other, 1).await, Ok(Count::Exact(1)));
    for id in ["in doubt", &other] {
        counters.settled(id, Duration::from_secs(60)).await.expect("settled");
    }
    let holder = locked(&lab).await;
    assert_eq!(counters.incr(&other, 1).await, Ok(Count::Exact(2)));
    let (home, to) = (cluster.await_primary_of(&keys.stream).await, cluster.other_primaries(&keys.stream).await[0]);
    cluster.begin_to_move(&keys.stream, to).await;
    cluster.move_key(&keys.counter("in doubt"), home, to).await;
    let wrong = ["SET", &keys.counter("in doubt"), "999", "PX", "600000"];
    let set = cluster.nodes()[to].client().await.pipeline(&[vec!["ASKING"], wrong.to_vec()]).await;
    assert_eq!(set[1], Resp::Text(b"OK".to_vec()));
    daemon.forget();
    let connection =
        Connection::open(&address(&cluster.url()).of_stream(&keys.state), "test").await.expect("connected");
    functions::gate::close(&connection, &keys, "a test").await.expect("closed");
    // On the node where the state is the values cannot all be dropped.
    daemon.wait_for("counters are not made clean for now").await;
    cluster.move_the_rest(&keys.stream, home, to).await;
    daemon.wait_for_event("values_dropped", |_| true).await;
    drop(holder);
    eventually("the right value", Count::Exact(5), async || counters.get("in doubt").await).await;
    cluster.move_slot(&keys.stream, home).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_managed_pipeline_without_a_hash_tag_is_refused_with_the_next_step() {
    let (cluster, lab) = (cluster().await, lab().await);
    let untagged = Pipeline { shards: 1, ..pipeline("flush:managed-untagged") };
    let (code, _, stderr) = output(&mut program(&lab, &cluster.url(), &untagged, &["run", "--until-empty"])).await;
    let told = "give the stream a hash tag, such as {flush:managed-untagged}, or the pipeline several shards";
    assert!(code == 78 && stderr.contains(told), "{code} {stderr}");
    let env = [("DATABASE_URL".to_owned(), lab.database.clone())].into();
    let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES).expect("valid");
    let database = Database::new(loaded.config.postgres.address().expect("set"), "main", &untagged, 1);
    let refused = Counters::connect(&address(&cluster.url()), &untagged, database, CounterOptions::default()).await;
    assert!(matches!(refused, Err(Fault::Valkey { code, .. }) if code == "CROSSSLOT"));
    let tagged = Pipeline { stream: "flush:{managed-tagged}".into(), ..untagged };
    let (code, _, stderr) = output(&mut program(&lab, &cluster.url(), &tagged, &["run", "--until-empty"])).await;
    assert_eq!(code, 0, "{stderr}");
}

/// Loads the functions on every primary, as a daemon does.
async fn with_functions(cluster: &Cluster) -> Endpoint {
    let endpoint = address(&cluster.url());
    for home in endpoint.homes().await.expect("told") {
        let connection = Connection::open(&endpoint.at(&home), "test").await.expect("connected");
        functions::load(&connection).await.expect("loaded");
    }
    endpoint
}

/// A row id on each primary.
async fn one_on_each(cluster: &Cluster, cache: &Cache<String>) -> BTreeMap<usize, String> {
    let mut found = BTreeMap::new();
    for n in 0.. {
        let id = format!("row{n}");
        found.entry(cluster.await_primary_of(&cache.key(&id)).await).or_insert(id);
        if found.len() == 3 {
            break;
        }
    }
    found
}

async fn get(cache: &Cache<String>, id: &str, row: &str) -> String {
    cache.get(id, async || Ok(Some(row.to_owned()))).await.expect("an answer").expect("a row").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_on_all_primaries_are_read_written_and_invalidated_while_slots_move() {
    let cluster = cluster().await;
    let endpoint = with_functions(&cluster).await;
    let cache: Cache<String> = Cache::new(&endpoint, "clustered", CacheOptions::default());
    let ids: Vec<String> = one_on_each(&cluster, &cache).await.into_values().collect();
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    let load = async |ids: &[&str]| Ok(ids.iter().map(|id| Some(format!("loaded {id}"))).collect());
    let many = async || cache.get_many(&names, load).await.expect("rows").len();
    assert_eq!(many().await, 3);
    for id in &names {
        // Loaded once, by whoever came first.
        assert_eq!(get(&cache, id, "again").await, format!("loaded {id}"));
        let key = cache.key(id);
        let there = cluster.client_of(&key).await.call(&["GET", &key]).await;
        assert_eq!(there, Resp::Text(format!("loaded {id}").into_bytes()), "on its own primary");
    }
    let moves = cache.key(names[0]);
    let home = cluster.await_primary_of(&moves).await;
    for (n, to) in cluster.other_primaries(&moves).await.into_iter().chain([home]).enumerate() {
        // Half way: the row is where the slot is going, and the slot is not yet.
        let from = cluster.begin_to_move(&moves, to).await;
        cluster.move_key(&moves, from, to).await;
        let before = get(&cache, names[0], "not loaded").await;
        assert_ne!(before, "not loaded", "a row is read where it has gone");
        cluster.move_the_rest(&moves, from, to).await;
        let new = format!("written {n}");
        let written = new.clone();
        cache.write(names[0], async move || Ok(((), Some(Some(written))))).await.expect("written");
        assert_eq!(get(&cache, names[0], "not loaded").await, new);
        assert_eq!(cache.invalidate(&names).await.expect("asked"), 3);
        for id in &names {
            assert_eq!(get(&cache, id, &new).await, new);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_whose_key_has_no_hash_tag_is_loaded_each_time() {
    let cluster = cluster().await;
    let endpoint = with_functions(&cluster).await;
    let cache: Cache<String> = Cache::new(&endpoint, "clustered", CacheOptions::default());
    for id in ["", "}", "}x"] {
        for row in ["one", "two"] {
            assert_eq!(get(&cache, id, row).await, row, "{id:?}");
        }
        cache.write(id, async || Ok(((), Some(Some("written".to_owned()))))).await.expect("written");
        assert_eq!(get(&cache, id, "three").await, "three", "{id:?}");
    }
    // A row beside it is written behind a fence all the same.
    assert_eq!(get(&cache, "7", "old").await, "old");
    let fence = cache.fence(&["", "7"]).await.expect("set for one of them");
    assert_eq!(get(&cache, "7", "still old").await, "still old");
    fence.lift(None).await;
    assert_eq!(get(&cache, "7", "new").await, "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_goes_on_when_a_primary_dies_and_breaks_no_read_meanwhile() {
    let mut cluster = cluster().await;
    let endpoint = with_functions(&cluster).await;
    let cache: Cache<String> = Cache::new(&endpoint, "clustered-dies", CacheOptions::default());
    let on_each = one_on_each(&cluster, &cache).await;
    let (old, id) = on_each.iter().next().expect("one");
    assert_eq!(get(&cache, id, "first").await, "first");
    let dying = cluster.await_primary_of(&cache.key(id)).await;
    assert_eq!(dying, *old);
    cluster.node(dying).valkey.kill();
    // Nobody has its place yet: the row is loaded.
    assert_eq!(get(&cache, id, "loaded while nobody has the slot").await, "loaded while nobody has the slot");
    for (other, id) in on_each.iter().filter(|(other, _)| **other != dying) {
        assert_eq!(get(&cache, id, "other").await, "other", "{other}");
    }
    cluster.await_primary_of(&cache.key(id)).await;
    // What the replica has is the row of before; a writer's row is seen at once.
    let written = async || {
        cache.write(id, async || Ok(((), Some(Some("written".to_owned()))))).await.expect("written");
        get(&cache, id, "not there").await
    };
    eventually("the cache is used again", "written".to_owned(), written).await;
    cluster.bring_back(dying).await;
    eventually("all as before", true, async || cluster.is_whole(3, 6).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_near_cache_hears_every_primary_also_after_slots_have_moved_and_one_has_died() {
    let mut cluster = cluster().await;
    let endpoint = with_functions(&cluster).await;
    for tracking in [Tracking::Broadcast, Tracking::Default, Tracking::OptIn] {
        for no_loop in [false, true] {
            let name = format!("near-{tracking:?}-{no_loop}");
            let cache: Cache<String> = Cache::new(&endpoint, &name, CacheOptions::default());
            let on_each = one_on_each(&cluster, &cache).await;
            let options = NearOptions {
                tracking,
                no_loop,
                verify: 0.0,
                heartbeat: Duration::from_millis(200),
                ..NearOptions::default()
            };
            let near = NearCache::new(&endpoint, cache, options);
            eventually("it listens to all", true, async || near.is_listening()).await;
            for id in on_each.values() {
                is_heard(&cluster, &near, id).await;
            }
            let id = on_each.values().next().expect("one");
            let key = near.cache().key(id);
            let (home, to) = (cluster.await_primary_of(&key).await, cluster.other_primaries(&key).await[0]);
            cluster.move_slot(&key, to).await;
            is_heard(&cluster, &near, id).await;
            if !cluster.move_slot_in_one_step(&key, home).await {
                cluster.move_slot(&key, home).await;
            }
            is_heard(&cluster, &near, id).await;
        }
    }
    let cache: Cache<String> = Cache::new(&endpoint, "near-dies", CacheOptions::default());
    let on_each = one_on_each(&cluster, &cache).await;
    let options = NearOptions { verify: 0.0, heartbeat: Duration::from_millis(200), ..NearOptions::default() };
    let near = NearCache::new(&endpoint, cache, options);
    eventually("it listens to all", true, async || near.is_listening()).await;
    for id in on_each.values() {
        is_heard(&cluster, &near, id).await;
    }
    let (dying, id) = on_each.iter().next().expect("one");
    cluster.kill_primary_of(&near.cache().key(id)).await;
    eventually("it listens to the successor", true, async || near.is_listening()).await;
    for id in on_each.values() {
        is_heard(&cluster, &near, id).await;
    }
    cluster.bring_back(*dying).await;
    eventually("all as before", true, async || cluster.is_whole(3, 6).await).await;
}

/// A row of another process's is held, and let go when that changes it; what is held is never older than what is in Valkey at rest.
async fn is_heard(cluster: &Cluster, near: &NearCache<String>, id: &str) {
    let key = near.cache().key(id);
    for value in ["one", "two"] {
        let set = async || {
            let answer = cluster.client_of(&key).await.call(&["SET", &key, value, "PX", "600000"]).await;
            answer == Resp::Text(b"OK".to_vec())
        };
        eventually("set", true, set).await;
        let read = async || {
            let row = near.get(id, async || Ok(None)).await.expect("an answer").map(|row| row.to_string());
            let held = near.held(id).flatten().map(|row| row.to_string());
            (row, held)
        };
        eventually("read and held", (Some(value.to_owned()), Some(value.to_owned())), read).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_functions_are_on_every_primary_also_on_one_that_joins() {
    // One of its own, for it ends with another node than it began with.
    let mut cluster = Cluster::start(3, 0, &[]).await;
    let lab = lab().await;
    let pipeline = pipeline("flush:managed-joins");
    let _daemon = Daemon::start(program(&lab, &cluster.url(), &pipeline, &["run"]));
    let knows = async |cluster: &Cluster, number: usize| {
        let list = ["FUNCTION", "LIST", "LIBRARYNAME", functions::NAME];
        matches!(cluster.nodes()[number].ask(&list).await, Some(Resp::Array(found)) if !found.is_empty())
    };
    for number in 0..3 {
        eventually("the functions are there", true, async || knows(&cluster, number).await).await;
    }
    let newcomer = cluster.join().await;
    assert!(!knows(&cluster, newcomer).await);
    // A slot of none of the pipeline's shards.
    cluster.move_slot("{anything}", newcomer).await;
    eventually("the newcomer has them", true, async || knows(&cluster, newcomer).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_about_counters_and_rows_ask_every_primary() {
    let (cluster, lab) = (cluster().await, lab().await);
    let pipeline = pipeline("flush:managed-verbs");
    let verb = async |arguments: &[&str]| output(&mut program(&lab, &cluster.url(), &pipeline, arguments)).await;
    let homes: BTreeSet<usize> = {
        let mut homes = BTreeSet::new();
        for shard in 0..3 {
            homes.insert(cluster.await_primary_of(&pipeline.stream_of(shard)).await);
        }
        homes
    };
    assert!(homes.len() > 1, "the shards lie on several primaries");
    // Values from before it was managed.
    for n in 0..COUNTERS {
        lab.execute(&format!("insert into public.counters values ('{}', 100, now())", id(n))).await;
        let counter = pipeline.counter_of(&id(n));
        cluster.client_of(&counter).await.call(&["SET", &counter, "7"]).await;
        let stream = pipeline.stream_of(shard_of(&id(n), 3));
        cluster.client_of(&stream).await.call(&["XADD", &stream, "*", "id", &id(n), "amount", "5"]).await;
    }
    let mut daemon = Daemon::start(program(&lab, &cluster.url(), &pipeline, &["run"]));
    daemon.wait_for("the counters of this stream were not managed until now").await;
    let (code, stdout, stderr) = verb(&["adopt"]).await;
    assert_eq!((code, stdout.matches("not managed until now").count()), (0, 3), "{stdout}{stderr}");
    let (code, stdout, stderr) = verb(&["adopt", "--yes"]).await;
    assert_eq!((code, stdout.matches("values were dropped").count()), (0, 3), "{stdout}{stderr}");
    is_managed(&cluster, &pipeline).await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), (0..COUNTERS).map(|n| id(n) + "\n").collect::<String>()).expect("written");
    let warm = async || verb(&["warm", "--ids", file.path().to_str().expect("text")]).await.1;
    eventually("all are in place", format!("{COUNTERS} of {COUNTERS} counters are in place\n"), warm).await;
    for n in 0..COUNTERS {
        let counter = pipeline.counter_of(&id(n));
        assert_eq!(cluster.client_of(&counter).await.call(&["GET", &counter]).await.text(), "105");
    }
    let (code, stdout, stderr) = verb(&["counter", "show", &id(1)]).await;
    assert!(code == 0 && stdout.contains("in Valkey                       105"), "{stdout}{stderr}");
    let (code, stdout, stderr) = verb(&["memory", "--observe", "1"]).await;
    let streams = (0..3).filter(|shard| stdout.contains(&format!("{}: ", pipeline.stream_of(*shard)))).count();
    assert_eq!((code, stdout.matches("primary 127.0.0.1:").count(), streams), (0, 3, 3), "{stdout}{stderr}");
    let (code, stdout, stderr) = verb(&["audit", "--full"]).await;
    assert!(code == 0 && stdout.contains("24 counters judged (full), none differs"), "{stdout}{stderr}");
    // One that has no row is met on whichever primary it is.
    for n in 0..3 {
        let lonely = format!("lonely{n}");
        let counter = pipeline.counter_of(&lonely);
        cluster.client_of(&counter).await.call(&["SET", &counter, "1"]).await;
    }
    let (code, stdout, _) = verb(&["audit", "--full"]).await;
    assert!(code == 3 && stdout.contains("27 counters judged (full), 3 differ"), "{code} {stdout}");
    let (code, stdout, stderr) = verb(&["invalidate", "--counters", "counters", "--dirty"]).await;
    assert_eq!((code, stdout.as_str()), (0, "27 keys were dropped\n"), "{stderr}");
    for n in 0..9 {
        let key = format!("cache:verbs:{{{n}}}");
        cluster.client_of(&key).await.call(&["SET", &key, "a row"]).await;
    }
    let (code, stdout, stderr) =
        verb(&["invalidate", "cache:verbs:{0}", "cache:verbs:{1}", "cache:verbs:{none}"]).await;
    assert_eq!((code, stdout.as_str()), (0, "2 keys were dropped\n"), "{stderr}");
    let (code, stdout, _) = verb(&["invalidate", "--pattern", "cache:verbs:*", "--dry-run"]).await;
    assert_eq!((code, stdout.as_str()), (0, "7 keys match; nothing was dropped\n"));
    let (code, stdout, stderr) = verb(&["invalidate", "--pattern", "cache:verbs:*"]).await;
    assert_eq!((code, stdout.as_str()), (0, "7 keys were dropped\n"), "{stderr}");
    let (_, stdout, _) = verb(&["invalidate", "--pattern", "cache:verbs:*", "--dry-run"]).await;
    assert_eq!(stdout, "0 keys match; nothing was dropped\n");
}
