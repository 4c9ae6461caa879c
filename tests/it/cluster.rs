//! A Valkey Cluster: streams on several primaries, slots that move, primaries that die.
//!
//! The tests share one cluster of three primaries and three replicas, one test at a time; each leaves it as it found it, and has a stream, or
//! streams, of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tidegate::model::pipeline::Pipeline;
use tidegate_lab::cluster::Cluster;
use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard};
use tokio::task::JoinHandle;

use crate::harness::{Client, Daemon, Lab, Resp, eventually, output};

static CLUSTER: Mutex<Option<Cluster>> = Mutex::const_new(None);

/// The cluster, for this test alone. One that a test left broken is replaced.
async fn cluster() -> MappedMutexGuard<'static, Cluster> {
    let mut guard = CLUSTER.lock().await;
    let is_whole = match guard.as_ref() {
        Some(cluster) => is_whole(cluster).await,
        None => false,
    };
    if !is_whole {
        *guard = None;
        *guard = Some(Cluster::start(3, 1, &[]).await);
    }
    MutexGuard::map(guard, |cluster| cluster.as_mut().expect("started"))
}

/// Whether three of six nodes are primaries, and each of the others has what its primary has.
async fn is_whole(cluster: &Cluster) -> bool {
    let mut primaries = 0;
    for node in cluster.nodes() {
        let is_primary = node.is_primary().await;
        primaries += usize::from(is_primary);
        if !is_primary && !node.is_replica_in_step().await {
            return false;
        }
    }
    primaries == 3 && cluster.nodes().len() == 6
}

/// A daemon on a cluster. Its pipeline `counters` reads this stream as a member of the group, and `alone`, where it is named, that one alone.
fn program(lab: &Lab, url: &str, arguments: &[&str], stream: &str, alone: Option<&str>) -> tokio::process::Command {
    let mut command = lab.program(arguments);
    command.env("VALKEY_URL", url).env("TIDEGATE__PIPELINES__COUNTERS__STREAM", stream);
    command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "group");
    if let Some(alone) = alone {
        for (key, value) in [("STREAM", alone), ("TABLE", "public.alone"), ("DELIVERY", "exclusive")] {
            command.env(format!("TIDEGATE__PIPELINES__ALONE__{key}"), value);
        }
    }
    command
}

/// A database with a second table.
async fn lab() -> Lab {
    let lab = Lab::new().await;
    lab.execute("create table public.alone (like public.counters including all)").await;
    lab
}

/// A foreign producer: adds entries, each of a key of its own, and finds the primary by itself.
struct Writer {
    stop: Arc<AtomicBool>,
    task: JoinHandle<BTreeSet<String>>,
}

impl Writer {
    fn to(cluster: &Cluster, stream: &str) -> Writer {
        let ports: Vec<u16> = cluster.nodes().iter().map(|node| node.valkey.port()).collect();
        let (stop, stream) = (Arc::new(AtomicBool::new(false)), stream.to_owned());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut taken, mut n, mut at) = (BTreeSet::new(), 0u64, 0);
            let mut client = None;
            while !stopped.load(Ordering::Relaxed) {
                if client.is_none() {
                    // Whoever has it not says so, and the next one is asked.
                    at += 1;
                    client = Client::try_connect(ports[at % ports.len()]).await.ok();
                }
                let Some(connected) = &mut client else {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                };
                let ids: Vec<String> = (n..n + 20).map(|n| format!("k{n}")).collect();
                n += 20;
                let commands: Vec<Vec<&str>> =
                    ids.iter().map(|id| vec!["XADD", &stream, "*", "id", id, "amount", "1"]).collect();
                let answers = tokio::time::timeout(Duration::from_millis(500), connected.try_pipeline(&commands)).await;
                let Ok(Ok(answers)) = answers else {
                    client = None;
                    continue;
                };
                let added = ids.into_iter().zip(&answers).filter(|(_, answer)| matches!(answer, Resp::Text(_)));
                taken.extend(added.map(|(id, _)| id));
                if answers.iter().any(|answer| matches!(answer, Resp::Error(_))) {
                    client = None;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            taken
        });
        Writer { stop, task }
    }

    /// The keys of all entries that a server took.
    async fn stop(self) -> BTreeSet<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("it ends")
    }
}

/// The rows of a table.
async fn rows(lab: &Lab, table: &str) -> BTreeMap<String, i64> {
    let query = format!("select id, value from {table}");
    let rows: Vec<(String, i64)> =
        sqlx::query_as(sqlx::AssertSqlSafe(query)).fetch_all(&mut lab.sql().await).await.expect("readable");
    rows.into_iter().collect()
}

/// The keys of the entries that a stream holds.
async fn keys_in(cluster: &Cluster, stream: &str) -> BTreeSet<String> {
    let entries = cluster.client_of(stream).await.call(&["XRANGE", stream, "-", "+"]).await.array();
    entries.into_iter().map(|entry| entry.array().remove(1).array()[1].text()).collect()
}

/// Waits until every entry that the stream holds has landed; then nothing may have landed twice, nor anything that no server took.
async fn assert_exact(lab: &Lab, cluster: &Cluster, stream: &str, table: &str) -> BTreeSet<String> {
    let held = keys_in(cluster, stream).await;
    let missing = async || {
        let rows = rows(lab, table).await;
        held.iter().filter(|key| !rows.contains_key(*key)).count()
    };
    eventually("entries that have not landed", 0, missing).await;
    let rows = rows(lab, table).await;
    let doubled: Vec<_> = rows.iter().filter(|(_, value)| **value != 1).collect();
    assert!(doubled.is_empty(), "{stream}: {doubled:?}");
    held
}

/// Waits until rows of both ways of delivery have landed that had not when it was called.
async fn both_go_on(lab: &Lab) {
    for table in ["public.counters", "public.alone"] {
        let before = rows(lab, table).await.len();
        eventually(table, true, async || rows(lab, table).await.len() > before).await;
    }
}

/// Two streams in one slot, one for each way of delivery, under a load each.
struct Flowing {
    lab: Lab,
    group: String,
    alone: String,
    daemons: Vec<Daemon>,
    writers: Vec<Writer>,
}

impl Flowing {
    async fn on(cluster: &Cluster, url: &str, tag: &str) -> Flowing {
        let lab = lab().await;
        let (group, alone) = (format!("flush:{{{tag}}}"), format!("alone:{{{tag}}}"));
        let daemons = (0..2).map(|_| Daemon::start(program(&lab, url, &["run"], &group, Some(&alone)))).collect();
        let writers = [&group, &alone].map(|stream| Writer::to(cluster, stream)).into();
        let flowing = Flowing { lab, group, alone, daemons, writers };
        both_go_on(&flowing.lab).await;
        flowing
    }

    /// The writers stop, and everything lands once. `is_lossless`: whether all that a server took must still be there.
    async fn end_exact(mut self, cluster: &Cluster, is_lossless: bool) -> Lab {
        for (writer, (stream, table)) in
            self.writers.into_iter().zip([(&self.group, "public.counters"), (&self.alone, "public.alone")])
        {
            let taken = writer.stop().await;
            let held = assert_exact(&self.lab, cluster, stream, table).await;
            let lost = taken.difference(&held).count();
            assert!(!taken.is_empty() && (lost == 0 || !is_lossless), "{stream}: {lost} of {} lost", taken.len());
        }
        for daemon in &mut self.daemons {
            assert_eq!(daemon.count("reading is halted"), 0, "{}", daemon.last_lines());
            daemon.signal(Signal::TERM);
            assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
        }
        self.lab
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_on_all_primaries_land_by_both_ways_of_delivery() {
    let cluster = cluster().await;
    for delivery in ["group", "exclusive"] {
        let lab = Lab::new().await;
        let stream = format!("flush:{delivery}");
        let pipeline = Pipeline { stream: stream.clone(), shards: 8, ..Pipeline::counters() };
        let mut homes = BTreeSet::new();
        for shard in 0..8 {
            homes.insert(cluster.await_primary_of(&pipeline.stream_of(shard)).await);
        }
        assert_eq!(homes.len(), 3, "the shards lie on all primaries");
        let program = |arguments: &[&str]| {
            let mut command = program(&lab, &cluster.url_of(&[0]), arguments, &stream, None);
            command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", "8");
            command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", delivery);
            command
        };
        let lines = tempfile::NamedTempFile::new().expect("a file");
        let text: String = (0..4_000).map(|n| format!("{delivery}{} 2\n", n % 1_000)).collect();
        std::fs::write(lines.path(), text).expect("written");
        let produced = output(&mut program(&["produce", lines.path().to_str().expect("text")])).await;
        assert_eq!(produced.0, 0, "{}", produced.2);
        let (code, _, stderr) = output(&mut program(&["run", "--until-empty"])).await;
        assert_eq!(code, 0, "{stderr}");
        let rows = rows(&lab, "public.counters").await;
        assert!(rows.len() == 1_000 && rows.values().all(|value| *value == 8), "{}", rows.len());
        let counter = pipeline.counter_of(&format!("{delivery}7"));
        let value = cluster.client_of(&counter).await.call(&["GET", &counter]).await.text();
        assert_eq!(value, "8", "the counter lies beside its stream");
        // What the table loses comes again, from every primary.
        lab.execute("delete from public.counters; delete from tidegate.ledger").await;
        let (code, stdout, stderr) = output(&mut program(&["replay", "--since", "1h", "--yes"])).await;
        assert_eq!((code, stdout.matches("rewound").count()), (0, 8), "{stdout}{stderr}");
        assert_eq!(output(&mut program(&["run", "--until-empty"])).await.0, 0);
        assert_eq!(lab.number("select sum(value)::bigint from public.counters").await, 8_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_move_key_by_key_under_load_are_followed() {
    let cluster = cluster().await;
    let flowing = Flowing::on(&cluster, &cluster.url(), "by-keys").await;
    let home = cluster.await_primary_of(&flowing.group).await;
    for to in cluster.other_primaries(&flowing.group).await.into_iter().chain([home]) {
        cluster.move_slot(&flowing.group, to).await;
        both_go_on(&flowing.lab).await;
    }
    flowing.end_exact(&cluster, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_move_in_one_step_under_load_are_followed() {
    let cluster = cluster().await;
    let flowing = Flowing::on(&cluster, &cluster.url(), "in-one-step").await;
    let home = cluster.await_primary_of(&flowing.group).await;
    for to in cluster.other_primaries(&flowing.group).await.into_iter().chain([home]) {
        if !cluster.move_slot_in_one_step(&flowing.group, to).await {
            eprintln!("skipped: this Valkey has no CLUSTER MIGRATESLOTS (9.0 and newer have)");
            return;
        }
        both_go_on(&flowing.lab).await;
    }
    flowing.end_exact(&cluster, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_slot_is_on_its_way_its_stream_is_read_where_it_has_gone() {
    let cluster = cluster().await;
    let lab = lab().await;
    let (group, alone) = ("flush:{on-its-way}", "alone:{on-its-way}");
    let (from, to) = (cluster.await_primary_of(group).await, cluster.other_primaries(group).await[0]);
    let mut client = cluster.client_of(group).await;
    for stream in [group, alone] {
        client.call(&["XADD", stream, "*", "id", "before", "amount", "1"]).await;
    }
    let mut daemon = Daemon::start(program(&lab, &cluster.url(), &["run"], group, Some(alone)));
    let both = async |id: &str| {
        for table in ["public.counters", "public.alone"] {
            eventually(table, Some(&1), async || rows(&lab, table).await.get(id).copied().as_ref().map(|_| &1)).await;
        }
    };
    both("before").await;
    // Other keys of the slot stay behind, so the slot's owner is still the old one.
    client.call(&["SET", "stays:{on-its-way}", "1"]).await;
    cluster.begin_to_move(group, to).await;
    for stream in [group, alone] {
        cluster.move_key(stream, from, to).await;
    }
    let mut there = cluster.nodes()[to].client().await;
    let add = async |there: &mut Client, id: &str| {
        for stream in [group, alone] {
            let asking = vec!["ASKING"];
            let answers = there.pipeline(&[asking, vec!["XADD", stream, "*", "id", id, "amount", "1"]]).await;
            assert!(matches!(answers[1], Resp::Text(_)), "{answers:?}");
        }
    };
    add(&mut there, "on its way").await;
    for _ in 0..50 {
        add(&mut there, "many").await;
    }
    both("on its way").await;
    assert_eq!(cluster.primary_of("stays:{on-its-way}").await, Some(from), "the slot has not gone yet");
    cluster.move_the_rest(group, from, to).await;
    add(&mut there, "after").await;
    both("after").await;
    eventually("all of them", Some(50), async || rows(&lab, "public.counters").await.get("many").copied()).await;
    eventually("all of them", Some(50), async || rows(&lab, "public.alone").await.get("many").copied()).await;
    assert_eq!(daemon.count("reading is halted"), 0, "{}", daemon.last_lines());
    cluster.move_slot(group, from).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_dies_under_load_is_replaced_and_what_survives_lands_once() {
    let mut cluster = cluster().await;
    let flowing = Flowing::on(&cluster, &cluster.url(), "dies").await;
    let old = cluster.await_primary_of(&flowing.group).await;
    let new = cluster.kill_primary_of(&flowing.group).await;
    assert_ne!(old, new);
    both_go_on(&flowing.lab).await;
    // The old one is back as a replica, and takes over again.
    cluster.bring_back(old).await;
    eventually("a replica again", true, async || cluster.nodes()[old].is_replica_in_step().await).await;
    cluster.nodes()[old].ask(&["CLUSTER", "FAILOVER"]).await;
    eventually("the primary again", Some(old), async || cluster.primary_of(&flowing.group).await).await;
    both_go_on(&flowing.lab).await;
    eventually("all as before", true, async || is_whole(&cluster).await).await;
    // Replication is asynchronous: the last entries may be lost with the primary.
    flowing.end_exact(&cluster, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_and_takes_slots_and_the_seed_leaves() {
    let cluster = cluster().await;
    drop(cluster);
    // One of its own, for it ends with other nodes than it began with.
    let mut cluster = Cluster::start(3, 0, &[]).await;
    let seed = cluster.await_primary_of("{joins}").await;
    let flowing = Flowing::on(&cluster, &cluster.url_of(&[seed]), "joins").await;
    let newcomer = cluster.join().await;
    cluster.move_slot(&flowing.group, newcomer).await;
    both_go_on(&flowing.lab).await;
    cluster.node(seed).valkey.kill();
    // A new connection finds its way without the only node that the url names.
    cluster.nodes()[newcomer].ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    both_go_on(&flowing.lab).await;
    cluster.bring_back(seed).await;
    eventually("served again", true, async || cluster.primary_of("{joins}").await.is_some()).await;
    flowing.end_exact(&cluster, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_down_for_a_while_is_waited_for() {
    let cluster = cluster().await;
    let mut flowing = Flowing::on(&cluster, &cluster.url(), "down").await;
    let others = cluster.other_primaries(&flowing.group).await;
    // Most primaries hang, so nobody can vote for their replicas, and those that are left serve nothing.
    others.iter().for_each(|number| cluster.nodes()[*number].valkey.pause());
    let told = |line: &serde_json::Value| line["fault"].as_str().is_some_and(|fault| fault.contains("CLUSTERDOWN"));
    flowing.daemons[0].wait_for_event("interrupted", told).await;
    others.iter().for_each(|number| cluster.nodes()[*number].valkey.resume());
    both_go_on(&flowing.lab).await;
    eventually("all as before", true, async || is_whole(&cluster).await).await;
    flowing.end_exact(&cluster, false).await;
}
