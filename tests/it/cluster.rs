//! A Valkey Cluster: streams on several primaries, slots that move, primaries that die.
//!
//! The tests share one cluster of three primaries and three replicas, one test at a time; each leaves it as it found it, and has a stream, or
//! streams, of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tidegate::client::Producer;
use tidegate::model::pipeline::Pipeline;
use tidegate::valkey::{Endpoint, Link};
use tidegate_lab::cluster::Cluster;
use tidegate_lab::tls::Certificate;
use tidegate_lab::writers::{Writer, both_go_on, lab, program, rows};
use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard};

use crate::harness::{Client, Daemon, Lab, Resp, eventually, output};
use crate::rights::{as_user, blocks};

static CLUSTER: Mutex<Option<Cluster>> = Mutex::const_new(None);

/// The cluster, for this test alone. One that a test left broken is replaced.
pub(crate) async fn cluster() -> MappedMutexGuard<'static, Cluster> {
    let mut guard = CLUSTER.lock().await;
    let is_whole = match guard.as_ref() {
        Some(cluster) => cluster.is_whole(3, 6).await,
        None => false,
    };
    if !is_whole {
        *guard = None;
        *guard = Some(Cluster::start(3, 1, &[]).await);
    }
    MutexGuard::map(guard, |cluster| cluster.as_mut().expect("started"))
}

/// Waits until every entry that the stream holds has landed; then nothing may have landed twice, nor anything that no server took.
async fn assert_exact(lab: &Lab, cluster: &Cluster, stream: &str, table: &str) -> BTreeSet<String> {
    let held = cluster.keys_in(stream).await;
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
        let (group, alone) = (format!("flush:{{{tag}}}"), format!("flush:{{{tag}}}:alone"));
        let daemons = (0..2).map(|_| Daemon::start(program(&lab, url, &["run"], &group, Some(&alone)))).collect();
        let writers = [&group, &alone].map(|stream| Writer::to(&cluster.ports(), stream)).into();
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
async fn streams_of_one_home_share_a_link_until_a_slot_goes() {
    let cluster = cluster().await;
    let (goes, stays) = ("flush:{goes}", "flush:{stays}");
    let limit = Duration::from_secs(10);
    let endpoint = Endpoint::new(cluster.url().into(), limit, limit);
    let home = cluster.await_primary_of(goes).await;
    if cluster.await_primary_of(stays).await != home {
        cluster.move_slot(stays, home).await;
    }
    // Whichever node is asked may not have heard yet where the slot has gone.
    let homes = async || {
        let primaries = endpoint.homes().await.expect("told").len();
        (primaries, endpoint.home_of(stays).await == endpoint.home_of(goes).await)
    };
    eventually("three primaries, one of them of both", (3, true), homes).await;
    let shared = endpoint.home_of(goes).await.expect("told");
    let link = Link::open(&endpoint.at(&shared), "test").await.expect("connected");
    assert!(link.has(goes).await.expect("told") && link.has(stays).await.expect("told"));
    cluster.move_slot(goes, cluster.other_primaries(goes).await[0]).await;
    assert!(!link.has(goes).await.expect("told") && link.has(stays).await.expect("told") && !link.is_lost());
    assert_ne!(endpoint.home_of(goes).await.expect("learned"), shared);
    let there = Link::open(&endpoint.of_stream(goes), "test").await.expect("connected");
    assert!(there.has(goes).await.expect("told"));
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
    // First without any load: a worker waits for entries when its slot goes.
    let (idle, lab) = ("flush:{idle}", lab().await);
    let _daemon = Daemon::start(program(&lab, &cluster.url(), &["run"], idle, None));
    for value in 1..=2 {
        let mut client = cluster.client_of(idle).await;
        client.call(&["XADD", idle, "*", "id", "idle", "amount", "1"]).await;
        lab.await_value("idle", value).await;
        let to = cluster.other_primaries(idle).await[0];
        cluster.move_slot_in_one_step(idle, to).await;
    }
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
    let (group, alone) = ("flush:{on-its-way}", "flush:{on-its-way}:alone");
    let (from, to) = (cluster.await_primary_of(group).await, cluster.other_primaries(group).await[0]);
    let mut client = cluster.client_of(group).await;
    for stream in [group, alone] {
        client.call(&["XADD", stream, "*", "id", "before", "amount", "1"]).await;
    }
    let mut daemon = Daemon::start(program(&lab, &cluster.url(), &["run"], group, Some(alone)));
    let landed = async |table: &str, id: &str, value: i64| {
        eventually(id, Some(value), async || rows(&lab, table).await.get(id).copied()).await;
    };
    let both = async |id: &str, value: i64| {
        landed("public.counters", id, value).await;
        landed("public.alone", id, value).await;
    };
    both("before", 1).await;
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
    // Who reads alone waits: its lease is not where the stream is.
    landed("public.counters", "on its way", 1).await;
    landed("public.counters", "many", 50).await;
    assert_eq!(cluster.primary_of("stays:{on-its-way}").await, Some(from), "the slot has not gone yet");
    cluster.move_the_rest(group, from, to).await;
    add(&mut there, "after").await;
    for (id, value) in [("on its way", 1), ("many", 50), ("after", 1)] {
        both(id, value).await;
    }
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
    cluster.promote(old).await;
    both_go_on(&flowing.lab).await;
    eventually("all as before", true, async || cluster.is_whole(3, 6).await).await;
    // Replication is asynchronous: the last entries may be lost with the primary.
    flowing.end_exact(&cluster, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_and_takes_slots_and_the_seed_leaves() {
    // One of its own, for it ends with other nodes than it began with; the slots that the seed takes along are nobody's.
    let mut cluster = Cluster::start(3, 0, &["--cluster-require-full-coverage", "no"]).await;
    let seed = cluster.await_primary_of("{joins}").await;
    let flowing = Flowing::on(&cluster, &cluster.url_of(&[seed]), "joins").await;
    let newcomer = cluster.join().await;
    cluster.move_slot(&flowing.group, newcomer).await;
    both_go_on(&flowing.lab).await;
    cluster.node(seed).valkey.kill();
    // A new connection finds its way without the only node that the url names.
    cluster.nodes()[newcomer].ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    both_go_on(&flowing.lab).await;
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
    eventually("all as before", true, async || cluster.is_whole(3, 6).await).await;
    flowing.end_exact(&cluster, false).await;
}

/// Keeps everybody from reading and writing the table until it is dropped.
pub(crate) async fn locked(lab: &Lab) -> sqlx::PgConnection {
    let mut holder = lab.sql().await;
    for statement in ["begin", "lock table public.counters in access exclusive mode"] {
        sqlx::query(statement).execute(&mut holder).await.expect(statement);
    }
    holder
}

/// How many entries of a group each consumer holds.
async fn holders(cluster: &Cluster, stream: &str) -> BTreeMap<String, i64> {
    let held = cluster.client_of(stream).await.call(&["XPENDING", stream, "tidegate:counters"]).await.array();
    let Resp::Array(consumers) = &held[3] else { return BTreeMap::new() };
    let consumer = |fields: &Resp| {
        let fields = fields.clone().array();
        (fields[0].text(), fields[1].text().parse().expect("a number"))
    };
    consumers.iter().map(consumer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_worker_held_is_reclaimed_soon_after_the_slot_has_moved_and_nothing_of_a_living_one() {
    let (cluster, lab) = (cluster().await, lab().await);
    let stream = "flush:{reclaim}";
    let daemon = || {
        let mut command = program(&lab, &cluster.url(), &["run"], stream, None);
        // By silence alone nobody is taken for dead within this test.
        Daemon::start({
            command.env("TIDEGATE__RECLAIM__DEAD_AFTER", "10m");
            command
        })
    };
    let mut client = cluster.client_of(stream).await;
    let mut add = async |id: &str, times: usize| {
        let add = vec!["XADD", stream, "*", "id", id, "amount", "1"];
        client.pipeline(&vec![add; times]).await;
    };
    let mut living = daemon();
    add("first", 1).await;
    lab.await_value("first", 1).await;
    let holder = locked(&lab).await;
    add("held", 10).await;
    let of_living = async || holders(&cluster, stream).await.into_values().collect::<Vec<_>>();
    eventually("held by the living", vec![10], of_living).await;
    // While its own flush fails it takes over nobody else's.
    living.wait_for("flushing is interrupted").await;
    let name = holders(&cluster, stream).await.into_keys().next().expect("one consumer");
    living.signal(Signal::STOP);
    let mut dies = daemon();
    eventually("it is there", true, async || dies.count("created") + dies.count("running") > 0).await;
    add("left", 7).await;
    eventually("held by both", 2, async || holders(&cluster, stream).await.len()).await;
    dies.kill().await;
    living.signal(Signal::CONT);

    let to = cluster.other_primaries(stream).await[0];
    let from = cluster.await_primary_of(stream).await;
    cluster.move_slot(stream, to).await;
    let mut heir = daemon();
    let reclaimed = heir.wait_for_event("reclaimed", |_| true).await;
    assert_eq!(reclaimed["entries"], 7, "{reclaimed}");
    assert_eq!(holders(&cluster, stream).await.get(&name), Some(&10), "what the living one flushes is still its own");
    drop(holder);
    lab.await_value("held", 10).await;
    lab.await_value("left", 7).await;
    eventually("nothing is pending", true, async || holders(&cluster, stream).await.is_empty()).await;
    cluster.move_slot(stream, from).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_does_not_reach_a_slot_that_was_elsewhere_meanwhile() {
    let (cluster, lab) = (cluster().await, lab().await);
    let stream = "flush:{returns}";
    let mut daemon = program(&lab, &cluster.url(), &["run"], stream, None);
    daemon.env("TIDEGATE__RECLAIM__DEAD_AFTER", "10m").env("TIDEGATE__TRIM__EVERY", "1h");
    let mut daemon = Daemon::start(daemon);
    let mut client = cluster.client_of(stream).await;
    client.call(&["XADD", stream, "*", "id", "first", "amount", "1"]).await;
    lab.await_value("first", 1).await;
    let holder = locked(&lab).await;
    let add = vec!["XADD", stream, "*", "id", "read before", "amount", "1"];
    let ids: Vec<String> = client.pipeline(&vec![add; 10]).await.iter().map(Resp::text).collect();
    let held = async || holders(&cluster, stream).await.into_values().collect::<Vec<_>>();
    eventually("held", vec![10], held).await;

    // Elsewhere the stream gets another past: other entries under the same ids, which somebody else holds.
    let (home, away) = (cluster.await_primary_of(stream).await, cluster.other_primaries(stream).await[0]);
    cluster.move_slot(stream, away).await;
    let group = "tidegate:counters";
    let mut commands = vec![vec!["MULTI"], vec!["DEL", stream]];
    commands.push(vec!["XGROUP", "CREATE", stream, group, "0", "MKSTREAM"]);
    commands.extend(ids.iter().map(|id| vec!["XADD", stream, id, "id", "of another past", "amount", "1"]));
    commands.push(vec!["XREADGROUP", "GROUP", group, "somebody", "STREAMS", stream, ">"]);
    commands.push(vec!["EXEC"]);
    let done = cluster.client_of(stream).await.pipeline(&commands).await;
    assert!(matches!(done.last(), Some(Resp::Array(_))), "{done:?}");
    cluster.move_slot(stream, home).await;

    daemon.forget();
    drop(holder);
    lab.await_value("read before", 10).await;
    daemon.wait_for("the connection changed: acknowledgement dropped").await;
    assert_eq!(holders(&cluster, stream).await.get("somebody"), Some(&10), "its marks are still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn as_the_documented_users_over_tls_while_a_slot_moves() {
    let certificate = Certificate::for_this_machine();
    if certificate.is_none() {
        eprintln!("without TLS: this Valkey was built without it");
    }
    let (cluster, lab) = (Cluster::start_with(certificate, 3, 0, &[]).await, lab().await);
    for node in cluster.nodes() {
        for line in blocks("acl") {
            let words: Vec<&str> = line.split(' ').collect();
            assert_eq!(node.ask(&words).await, Some(Resp::Text(b"OK".to_vec())), "{line}");
        }
    }
    let (group, alone) = ("flush:{users}", "flush:{users}:alone");
    let program = |arguments: &[&str], user: &str| {
        let mut command = program(&lab, &as_user(&cluster.url(), user), arguments, group, Some(alone));
        if let Some(trusted) = cluster.trusted() {
            command.env("SSL_CERT_FILE", trusted);
        }
        command
    };
    let mut run = program(&["run"], "tidegate");
    run.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__COMPACT__MARGIN", "1s");
    let mut daemon = Daemon::start(run);
    let lines = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(lines.path(), "k 5\n").expect("written");
    let produce = async || {
        for pipeline in ["counters", "alone"] {
            let arguments = ["produce", "--pipeline", pipeline, lines.path().to_str().expect("text")];
            let (code, _, stderr) = output(&mut program(&arguments, "producer")).await;
            assert_eq!(code, 0, "{stderr}");
        }
    };
    let landed = async |value: i64| {
        for table in ["public.counters", "public.alone"] {
            eventually(table, Some(value), async || rows(&lab, table).await.get("k").copied()).await;
        }
    };
    produce().await;
    landed(5).await;
    let (from, to) = (cluster.await_primary_of(group).await, cluster.other_primaries(group).await[0]);
    cluster.begin_to_move(group, to).await;
    cluster.move_key(group, from, to).await;
    let ahead = cluster.nodes()[to].client().await;
    let mut ahead = ahead;
    let add = vec!["XADD", group, "*", "id", "ahead", "amount", "1"];
    assert!(matches!(ahead.pipeline(&[vec!["ASKING"], add]).await[1], Resp::Text(_)));
    lab.await_value("ahead", 1).await;
    cluster.move_the_rest(group, from, to).await;
    produce().await;
    landed(10).await;
    let length = async || cluster.client_of(group).await.call(&["XLEN", group]).await.int();
    eventually("trimmed where it is now", true, async || length().await.is_some_and(|length| length <= 1)).await;
    for arguments in [
        &["status"][..],
        &["doctor"],
        &["pending", "--pipeline", "counters"],
        &["group", "list", "--pipeline", "counters"],
        &["audit", "--pipeline", "counters"],
    ] {
        let (code, stdout, stderr) = output(&mut program(arguments, "observer")).await;
        assert!(code < 5 && !(stdout.clone() + &stderr).contains("NOPERM"), "{arguments:?}: {code} {stdout}{stderr}");
    }
    let repair = ["audit", "--pipeline", "counters", "--repair", "--yes"];
    let (code, stdout, stderr) = output(&mut program(&repair, "operator")).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, stdout, stderr) =
        output(&mut program(&["replay", "--pipeline", "counters", "--since", "1h", "--yes"], "replay_operator")).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    let lines = daemon.all_lines();
    assert!(!lines.iter().any(|line| line.contains("NOPERM")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_a_cluster_is_said_with_the_next_step() {
    let (cluster, lab) = (cluster().await, lab().await);
    let fault = async |url: &str, message: &str| {
        let mut daemon = Daemon::start(program(&lab, url, &["run"], "flush:{said}", None));
        daemon.wait_for(message).await["fault"].as_str().unwrap_or_default().to_owned()
    };
    let one = format!("valkey://127.0.0.1:{}", cluster.nodes()[0].valkey.port());
    let told = fault(&one, "reading is halted").await;
    assert!(told.ends_with("is a node of a cluster: write valkey-cluster:// in valkey.url"), "{told}");
    let told = fault(&lab.valkey.url().replace("valkey://", "valkey-cluster://"), "reading is halted").await;
    assert!(told.ends_with("is no node of a cluster: write valkey:// in valkey.url"), "{told}");

    // A stream without a hash tag is read; nothing can be added to it and its counters in one step.
    let lines = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(lines.path(), "k 5\n").expect("written");
    let produce = ["produce", lines.path().to_str().expect("text")];
    let (code, _, stderr) = output(&mut program(&lab, &cluster.url(), &produce, "flush:untagged", None)).await;
    assert!(
        code == 78 && stderr.contains("CROSSSLOT") && stderr.contains("give the pipeline's stream a hash tag"),
        "{stderr}"
    );
    let mut client = cluster.client_of("flush:untagged").await;
    client.call(&["XADD", "flush:untagged", "*", "id", "k", "amount", "1"]).await;
    let until_empty = ["run", "--until-empty"];
    let (code, _, stderr) = output(&mut program(&lab, &cluster.url(), &until_empty, "flush:untagged", None)).await;
    assert_eq!((code, lab.value("k").await), (0, Some(1)), "{stderr}");

    // One primary of three may evict the streams, and not the one that is asked first: it is enough.
    let node = &cluster.nodes()[cluster.other_primaries("{3}").await[0]];
    node.ask(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let (code, _, stderr) = output(&mut program(&lab, &cluster.url(), &until_empty, "flush:untagged", None)).await;
    let (diagnosed, found, _) = output(&mut program(&lab, &cluster.url(), &["doctor"], "flush:untagged", None)).await;
    node.ask(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    assert!(code == 78 && stderr.contains("allkeys-lru"), "{code}: {stderr}");
    let evidence = format!("127.0.0.1:{}: maxmemory-policy is allkeys-lru", node.valkey.port());
    assert!(diagnosed == 4 && found.contains(&evidence), "{diagnosed}: {found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_follows_a_slot_and_counts_each_increment_once() {
    let cluster = cluster().await;
    let pipeline = Pipeline { stream: "flush:{produced}".into(), ..Pipeline::counters() };
    let second = Duration::from_secs(10);
    let endpoint = Endpoint::new(cluster.url().into(), second, second);
    let producer = Producer::connect(&endpoint, &pipeline).await.expect("connected");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let adding = tokio::spawn(async move {
        let (mut added, mut refused) = (0, Vec::new());
        while !stopped.load(Ordering::Relaxed) {
            let increments: Vec<(String, i64)> = (0..200).map(|n| (format!("produced{}", n % 50), 1)).collect();
            for outcome in producer.add_many(&increments).await {
                match outcome {
                    Ok(_) => added += 1,
                    Err(why) => refused.push(why),
                }
            }
        }
        (added, refused)
    });
    let home = cluster.await_primary_of(&pipeline.stream).await;
    for to in cluster.other_primaries(&pipeline.stream).await.into_iter().chain([home]) {
        cluster.move_slot(&pipeline.stream, to).await;
    }
    stop.store(true, Ordering::Relaxed);
    let (added, refused) = adding.await.expect("it ends");
    assert!(refused.is_empty(), "{} of {added}: {:?}", refused.len(), refused.first());
    let mut client = cluster.client_of(&pipeline.stream).await;
    assert_eq!(client.call(&["XLEN", &pipeline.stream]).await, Resp::Int(added));
    let mut sum = 0;
    for n in 0..50 {
        let value = client.call(&["GET", &pipeline.counter_of(&format!("produced{n}"))]).await;
        sum += value.text().parse::<i64>().expect("a number");
    }
    assert_eq!(sum, added);
}
