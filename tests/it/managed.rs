//! Counters that may vanish, with the daemon: exact or said to be unknown, whatever goes away.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use tidegate::client::postgres::Database;
use tidegate::client::truth::NoTruth;
use tidegate::client::{Count, CounterOptions, Counters, NotAdded, Taken, Why};
use tidegate::config::{Needs, Sources};
use tidegate::functions;
use tidegate::model::pipeline::{Mode, Pipeline, ShardKeys};
use tidegate::ops::sandbox::Postgres;
use tidegate::retry::Fault;
use tidegate::valkey::{Connection, Endpoint};
use tidegate_lab::accounts::Accounts;
use tokio::process::Command;

use crate::harness::{Client, Daemon, GROUP, Lab, Resp, STREAM, copy, eventually, output, valkey, within_limit};
use crate::proxy::{Proxy, Then, Way};

pub(crate) const STATE: &str = "tidegate:state:{flush:counters}:flush:counters:counters";
pub(crate) const INDEX: &str = "tidegate:dirty:{flush:counters}:flush:counters:counters";

pub(crate) fn pipeline() -> Pipeline {
    Pipeline { mode: Mode::Managed, ..Pipeline::counters() }
}

/// The program with a managed pipeline.
pub(crate) fn program(lab: &Lab, arguments: &[&str]) -> Command {
    let mut command = lab.program(arguments);
    command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed");
    command
}

pub(crate) fn daemon(lab: &Lab) -> Daemon {
    Daemon::start(program(lab, &["run"]))
}

pub(crate) fn address(url: &str) -> Endpoint {
    let limit = Duration::from_secs(5);
    Endpoint::new(url.to_owned().into(), limit, limit)
}

/// Where PostgreSQL is, with short limits.
fn database_at(url: &str, pipeline: &Pipeline) -> Database {
    let mut env: BTreeMap<String, String> = [("DATABASE_URL".to_owned(), url.to_owned())].into();
    for key in ["STATEMENT_TIMEOUT", "LOCK_TIMEOUT", "CONNECT_TIMEOUT"] {
        env.insert(format!("TIDEGATE__POSTGRES__{key}"), "1s".into());
    }
    let env = env.into_iter().collect();
    let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES).expect("valid");
    Database::new(loaded.config.postgres.address().expect("set"), "main", pipeline, 4)
}

/// Patient enough for a machine under load.
pub(crate) fn options() -> CounterOptions {
    CounterOptions {
        patience: Duration::from_secs(5),
        lease: Duration::from_secs(2),
        breaker: Duration::from_millis(50),
        retry_for: Duration::from_secs(20),
        ..CounterOptions::default()
    }
}

pub(crate) async fn counters_at(valkey: &str, postgres: &str, options: CounterOptions) -> Counters<Database> {
    let pipeline = pipeline();
    let database = database_at(postgres, &pipeline);
    Counters::connect(&address(valkey), &pipeline, database, options).await.expect("connected")
}

pub(crate) async fn counters(lab: &Lab) -> Counters<Database> {
    counters_at(&lab.valkey.url(), &lab.database, options()).await
}

/// Waits until a daemon manages the shard and the gate is open: the group is there, too.
pub(crate) async fn is_managed(lab: &Lab) {
    eventually("managed", true, async || is_open(&mut lab.client().await, &pipeline().keys_of(0)).await).await;
}

/// Whether a daemon manages a shard, and its gate is open.
pub(crate) async fn is_open(client: &mut Client, ShardKeys { stream, index, state, group, .. }: &ShardKeys) -> bool {
    let lineage = client.call(&["HEXISTS", state, "lineage"]).await.int();
    let status = client.call(&["FCALL", "tidegate_1_status", "3", stream, index, state, group]).await;
    lineage == Some(1) && matches!(&status, Resp::Array(answer) if answer[0] == Resp::Int(1))
}

pub(crate) async fn value(lab: &Lab, id: &str) -> Option<i64> {
    match lab.client().await.call(&["GET", &format!("counter:{id}")]).await {
        Resp::Text(text) => String::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    }
}

/// Waits until a counter is clean: it may be evicted.
pub(crate) async fn is_clean(lab: &Lab, id: &str) {
    eventually(&format!("{id} is clean"), true, async || {
        let mut client = lab.client().await;
        let left = client.call(&["PTTL", &format!("counter:{id}")]).await.int();
        left >= Some(0) && client.call(&["HEXISTS", INDEX, id]).await.int() == Some(0)
    })
    .await;
}

pub(crate) async fn nothing_is_dirty(lab: &Lab) {
    eventually("dirty counters", Some(0), async || lab.client().await.call(&["HLEN", INDEX]).await.int()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_is_dirty_then_clean_and_comes_back_exactly_when_it_vanishes() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters values ('a', 1000, now())").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("a", 5).await, Ok(Count::Exact(1005)));
    lab.await_value("a", 1005).await;
    is_clean(&lab, "a").await;
    for left in [1005, 1012, 1019] {
        lab.client().await.call(&["DEL", "counter:a"]).await;
        assert_eq!(counters.get("a").await, Count::Exact(left));
        lab.client().await.call(&["DEL", "counter:a"]).await;
        // While it is absent increments are accepted and wait for nobody.
        counters.add("a", 3).await.expect("added");
        assert_eq!(value(&lab, "a").await, None);
        assert_eq!(counters.incr("a", 4).await, Ok(Count::Exact(left + 7)));
    }
    counters.settled("a", Duration::from_secs(20)).await.expect("settled");
    assert_eq!(lab.value("a").await, Some(1026));
    assert_eq!(counters.get("new").await, Count::Exact(0));
    let all = counters.get_many(&["a", "new", "a", "newer"]).await;
    assert_eq!(all, [1026, 0, 1026, 0].map(Count::Exact));
    let added = counters.add_many(&[("a", 1), ("b", 2), ("a", -3), ("nul\0", 1)]).await;
    assert_eq!(added[..3], [Ok(Some(1027)), Ok(None), Ok(Some(1024))]);
    assert_eq!(added[3], Err(NotAdded::BadId));
    assert_eq!(counters.get_many(&["b", "a"]).await, [Count::Exact(2), Count::Exact(1024)]);
    nothing_is_dirty(&lab).await;
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(1024), Some(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_one_process_reads_alone_counters_become_clean_as_well() {
    let lab = Lab::new().await;
    let mut command = program(&lab, &["run"]);
    command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
    let _daemon = Daemon::start(command);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    for n in 1..=20 {
        match counters.incr("a", 1).await {
            Ok(Count::Exact(value)) => assert_eq!(value, n),
            // On a loaded machine the lease may change hands meanwhile; then it is added, and known a little later.
            Ok(_) => eventually("the value", Count::Exact(n), async || counters.get("a").await).await,
            Err(not_added) => panic!("{not_added}"),
        }
        if n % 5 == 0 {
            is_clean(&lab, "a").await;
            lab.client().await.call(&["DEL", "counter:a"]).await;
        }
    }
    lab.await_value("a", 20).await;
    // A stranger's value goes here, too.
    lab.client().await.add("a", 7).await;
    lab.await_value("a", 27).await;
    eventually("the value", Count::Exact(27), async || counters.get("a").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_shards_have_their_own_index_and_gate() {
    let lab = Lab::new().await;
    let mut command = program(&lab, &["run"]);
    command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", "3");
    let _daemon = Daemon::start(command);
    let pipeline = Pipeline { shards: 3, ..pipeline() };
    let database = database_at(&lab.database, &pipeline);
    let counters =
        Counters::connect(&address(&lab.valkey.url()), &pipeline, database, options()).await.expect("connected");
    let ids: Vec<String> = (0..60).map(|n| format!("c{n}")).collect();
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    let all = |value| vec![Count::Exact(value); ids.len()];
    eventually("all counters are brought", all(0), async || counters.get_many(&names).await).await;
    let increments: Vec<(&str, i64)> = names.iter().map(|id| (*id, 2)).collect();
    assert!(counters.add_many(&increments).await.iter().all(|added| *added == Ok(Some(2))));
    for id in &ids {
        counters.settled(id, Duration::from_secs(20)).await.expect("settled");
        lab.client().await.call(&["DEL", &pipeline.counter_of(id)]).await;
    }
    assert_eq!(counters.get_many(&names).await, all(2));
    assert_eq!(lab.number("select count(*) from public.counters where value = 2").await, 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_that_is_sent_again_counts_once() {
    let lab = Lab::new().await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let counters = counters_at(&proxy.url(), &lab.database, options()).await;
    assert_eq!(counters.incr("a", 1).await, Ok(Count::Exact(1)));
    for n in 2..=6 {
        // It is done, and its answer is lost with the connection.
        let lost = proxy.trap(Way::ToServer, b"tidegate_1_incr", Then::LoseReply);
        assert_eq!(counters.incr("a", 1).await, Ok(Count::Exact(n)));
        within_limit("the loss", lost).await.expect("sprung");
    }
    lab.await_value("a", 6).await;
    assert_eq!(lab.client().await.call(&["XLEN", STREAM]).await.int(), Some(6));
    let taken = proxy.trap(Way::ToServer, b"tidegate_1_incr", Then::LoseReply);
    assert_eq!(counters.take("a", 4, 0).await, Ok(Taken::Yes(Some(2))));
    within_limit("the loss", taken).await.expect("sprung");
    assert_eq!(counters.take("a", 4, 0).await, Ok(Taken::No(2)));
    let many = proxy.trap(Way::ToServer, b"tidegate_1_incr_many", Then::LoseReply);
    let added = counters.add_many(&[("a", 1), ("b", 1)]).await;
    assert!(added.iter().all(Result::is_ok), "{added:?}");
    within_limit("the loss", many).await.expect("sprung");
    lab.await_value("b", 1).await;
    lab.await_value("a", 3).await;
    assert_eq!(lab.client().await.call(&["XLEN", STREAM]).await.int(), Some(9));
}

/// The first call of this function that a server has logged, as it was sent.
async fn first_call(lab: &Lab, function: &str) -> Vec<String> {
    let slow = lab.client().await.call(&["SLOWLOG", "GET", "-1"]).await.array();
    let mut calls = slow.into_iter().filter_map(|entry| {
        let Resp::Array(words) = entry.array().into_iter().nth(3)? else { return None };
        Some(words.iter().map(Resp::text).collect::<Vec<String>>())
    });
    calls.rfind(|words| words.get(1).is_some_and(|name| name == function)).expect("a call")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_late_on_a_dead_connection_is_the_same_operation() {
    let logs_all = ["--slowlog-log-slower-than", "0", "--slowlog-max-len", "100000"];
    let lab = Lab { valkey: valkey(&logs_all).await, ..Lab::new().await };
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let patient = CounterOptions { lease: Duration::from_secs(60), patience: Duration::from_secs(60), ..options() };
    let counters = counters_at(&proxy.url(), &lab.database, patient).await;
    lab.client().await.call(&["SLOWLOG", "RESET"]).await;
    // It is answered that the value is to be brought; that is lost, and from then on the value is being brought by nobody.
    let lost = proxy.trap(Way::ToServer, b"tidegate_1_incr", Then::LoseReply);
    let adding = tokio::spawn({
        let counters = counters.clone();
        async move { counters.incr("a", 1).await }
    });
    within_limit("the loss", lost).await.expect("sprung");
    eventually("a second try", true, async || {
        let slow = lab.client().await.call(&["SLOWLOG", "GET", "-1"]).await.array();
        slow.iter()
            .filter(|entry| format!("{entry:?}").contains(&format!("{:?}", Resp::Text(b"tidegate_1_incr".to_vec()))))
            .count()
            > 1
    })
    .await;
    let late = first_call(&lab, "tidegate_1_incr").await;
    let late: Vec<&str> = late.iter().map(String::as_str).collect();
    let mut client = lab.client().await;
    client.call(&["MULTI"]).await;
    // Somebody else has brought it, and what was sent first comes again.
    client.call(&["SET", "counter:a", "0", "PX", "600000"]).await;
    client.call(&late).await;
    let done = client.call(&["EXEC"]).await.array();
    assert_eq!(done[1], Resp::Array(vec![Resp::Int(1), Resp::Text(b"1".to_vec())]), "done");
    assert_eq!(within_limit("the increment", adding).await.expect("no panic"), Ok(Count::Exact(1)));
    lab.await_value("a", 1).await;
    assert_eq!(client.call(&["XLEN", STREAM]).await.int(), Some(1));
    // A take that was refused, and whose first try comes when there is enough.
    client.call(&["SLOWLOG", "RESET"]).await;
    let lost = proxy.trap(Way::ToServer, b"tidegate_1_incr", Then::LoseReply);
    assert_eq!(counters.take("a", 2, 0).await, Ok(Taken::No(1)));
    within_limit("the loss", lost).await.expect("sprung");
    let late = first_call(&lab, "tidegate_1_incr").await;
    let late: Vec<&str> = late.iter().map(String::as_str).collect();
    counters.add("a", 9).await.expect("accepted");
    assert_eq!(client.call(&late).await, Resp::Array(vec![Resp::Int(3), Resp::Text(b"10".to_vec())]), "seen");
    lab.await_value("a", 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_daemons_say_of_themselves_leaves_what_is_known_of_a_shard_alone() {
    let lab = Lab::new().await;
    let _first = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    counters.add("a", 1).await.expect("accepted");
    nothing_is_dirty(&lab).await;
    let known = async || {
        let fields = lab.client().await.call(&["HKEYS", STATE]).await.array();
        let mut fields: Vec<String> = fields.iter().map(Resp::text).collect();
        fields.sort();
        fields
    };
    let before = known().await;
    assert!(before.iter().any(|field| field.starts_with("lane:")), "{before:?}");
    // Each says how it is when it begins, and forgets whoever has long been silent.
    let _second = daemon(&lab);
    let said = "tidegate:presence:{flush:counters}:flush:counters:counters";
    eventually("who is there", Some(2), async || lab.client().await.call(&["HLEN", said]).await.int()).await;
    assert_eq!(known().await, before);
    assert_eq!(
        lab.client().await.call(&["PTTL", STATE]).await.int(),
        Some(-1),
        "it neither expires nor can it be evicted"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_exact_to_64_bits_and_a_floor_holds_against_many_takers() {
    let lab = Lab::new().await;
    lab.execute(&format!(
        "insert into public.counters values ('big', 9007199254740992, now()), ('most', {}, now())",
        i64::MAX
    ))
    .await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("big", 1).await, Ok(Count::Exact(9007199254740993)));
    assert_eq!(counters.incr("big", 2).await, Ok(Count::Exact(9007199254740995)));
    assert_eq!(counters.get("most").await, Count::Exact(i64::MAX));
    assert!(matches!(counters.incr("most", 1).await, Err(NotAdded::CounterRefused(_))));
    assert_eq!(counters.incr("most", -1).await, Ok(Count::Exact(i64::MAX - 1)));
    assert_eq!(counters.take("big", 2, 9007199254740994).await, Ok(Taken::No(9007199254740995)));
    assert_eq!(counters.incr("least", i64::MIN).await, Ok(Count::Exact(i64::MIN)));
    assert!(counters.take("least", 1, i64::MIN).await.is_err(), "below 64 bits");
    assert_eq!(counters.incr("stock", 100).await, Ok(Count::Exact(100)));
    let takers = (0..50).map(|_| {
        let counters = counters.clone();
        async move {
            let mut taken = 0;
            for _ in 0..4 {
                match counters.take("stock", 1, 0).await.expect("an answer") {
                    Taken::Yes(left) => {
                        assert!(left >= Some(0));
                        taken += 1;
                    }
                    Taken::No(left) => assert_eq!(left, 0),
                    Taken::Unknown(why) => panic!("{why}"),
                }
            }
            taken
        }
    });
    let taken: Vec<i32> = futures_util::future::join_all(takers).await;
    assert_eq!(taken.iter().sum::<i32>(), 100);
    lab.await_value("stock", 0).await;
    lab.await_value("most", i64::MAX - 1).await;
    lab.await_value("big", 9007199254740995).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_postgresql_away_increments_are_accepted_and_all_is_exact_when_it_is_back() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters values ('a', 10, now())").await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let through = lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string());
    let mut command = program(&lab, &["run"]);
    command.env("DATABASE_URL", &through);
    let _daemon = Daemon::start(command);
    is_managed(&lab).await;
    let brief = CounterOptions { patience: Duration::from_millis(50), ..options() };
    let counters = counters_at(&lab.valkey.url(), &through, brief).await;
    // Leaves PostgreSQL alone for as long as it is away here.
    let without =
        counters_at(&lab.valkey.url(), &through, CounterOptions { breaker: Duration::from_secs(3600), ..brief }).await;
    proxy.cut();
    assert_eq!(without.get("a").await, Count::Unknown(Why::PostgresDown));
    assert_eq!(without.incr("a", 1).await, Ok(Count::Unknown(Why::PostgresDown)));
    without.add("a", 1).await.expect("accepted");
    assert_eq!(without.take("a", 1, 0).await, Ok(Taken::Unknown(Why::PostgresDown)));
    // Nobody who failed keeps the lease.
    eventually("leases", 0, async || {
        lab.client().await.call(&["EXISTS", "tidegate:hydrate:counter:a"]).await.int().unwrap_or(-1)
    })
    .await;
    proxy.heal();
    // It never rests: there are always deltas on their way.
    let busy = counters.clone();
    let adding = tokio::spawn(async move {
        for _ in 0..300 {
            busy.add("a", 1).await.expect("accepted");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    eventually("an exact value", true, async || matches!(counters.get("a").await, Count::Exact(_))).await;
    within_limit("the producer", adding).await.expect("no panic");
    assert_eq!(counters.get("a").await, Count::Exact(312));
    lab.await_value("a", 312).await;
}

/// A worker dies when it is about to send these bytes to Valkey; `pending` entries are not acknowledged by then. The next one makes the counter clean.
pub(crate) async fn becomes_clean_after_a_death_before(bytes: &'static [u8], pending: i64) {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let mut command = program(&lab, &["run"]);
    command.env("VALKEY_URL", proxy.url());
    let mut dying = Daemon::start(command);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.get("a").await, Count::Exact(0));
    let held = proxy.trap(Way::ToServer, bytes, Then::Hold);
    assert_eq!(counters.incr("a", 5).await, Ok(Count::Exact(5)));
    within_limit("what it is about to send", held).await.expect("sprung");
    assert_eq!((lab.pending().await, lab.value("a").await), (pending, Some(5)), "committed");
    dying.kill().await;
    assert_eq!(lab.client().await.call(&["PTTL", "counter:a"]).await.int(), Some(-1), "dirty");
    let _next = daemon(&lab);
    is_clean(&lab, "a").await;
    assert_eq!(counters.get("a").await, Count::Exact(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_become_clean_although_their_worker_died_before_it_acknowledged() {
    becomes_clean_after_a_death_before(b"XACK", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_plain_producers_add_to_managed_counters_is_exact_at_rest() {
    let lab = Lab::new().await;
    let mut workers = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    let mut random = StdRng::seed_from_u64(7);
    let (mut client, mut total) = (lab.client().await, [0i64; 5]);
    for n in 0..400 {
        let (of, amount) = (random.random_range(0..5), random.random_range(-3..9));
        let id = format!("c{of}");
        total[of] += amount;
        match random.random_range(0..3) {
            0 => drop(client.add(&id, amount).await),
            1 => counters.add(&id, amount).await.expect("accepted"),
            _ => drop(counters.incr(&id, amount).await.expect("accepted")),
        }
        if random.random_bool(0.2) {
            client.call(&["DEL", &format!("counter:{id}")]).await;
        }
        if n % 100 == 99 {
            workers.kill().await;
            workers = daemon(&lab);
        }
    }
    for (n, total) in total.into_iter().enumerate() {
        let id = format!("c{n}");
        lab.await_value(&id, total).await;
        eventually(&id, Count::Exact(total), async || counters.get(&id).await).await;
    }
    nothing_is_dirty(&lab).await;
    lab.assert_settled().await;
    for (n, total) in total.into_iter().enumerate() {
        assert_eq!(counters.get(&format!("c{n}")).await, Count::Exact(total), "c{n} at rest");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_value_is_dropped_before_its_entry_is_acknowledged() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let mut command = program(&lab, &["run"]);
    command.env("VALKEY_URL", proxy.url());
    let mut dying = Daemon::start(command);
    is_managed(&lab).await;
    let held = proxy.trap(Way::ToServer, b"XACK", Then::Hold);
    // An older value than the table's: a plain producer began at zero again.
    lab.execute("insert into public.counters values ('a', 100, now())").await;
    lab.client().await.add("a", 1).await;
    within_limit("the acknowledgement", held).await.expect("sprung");
    assert_eq!(value(&lab, "a").await, None, "dropped when the acknowledgement was under way");
    dying.kill().await;
    assert_eq!(lab.value("a").await, Some(101));
    let _next = daemon(&lab);
    let counters = counters(&lab).await;
    eventually("the value", Count::Exact(101), async || counters.get("a").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_that_becomes_a_dead_letter_leaves_the_value_again() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("a", 50).await, Ok(Count::Exact(50)));
    counters.settled("a", Duration::from_secs(20)).await.expect("settled");
    assert_eq!(counters.incr("a", 60).await, Ok(Count::Exact(110)));
    counters.settled("a", Duration::from_secs(20)).await.expect("settled");
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 1);
    assert_eq!(counters.get("a").await, Count::Exact(50), "as in PostgreSQL");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_pipeline_with_a_backlog_is_adopted() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 10).await;
    lab.settle_everything().await;
    // Valkey knows nothing of what was there before, and of nine increments that are on their way.
    lab.execute("update public.counters set value = value + 1000 where id = 'a'").await;
    client.add_many("a", 9).await;
    client.add_many("b", 3).await;
    let mut daemon = daemon(&lab);
    daemon.wait_for("the counters of this stream were not managed until now").await;
    let counters = counters(&lab).await;
    lab.await_value("a", 1019).await;
    eventually("pending", 0, async || lab.pending().await).await;
    assert_eq!(value(&lab, "a").await, Some(19), "nothing is dropped without a word");
    client.call(&["DEL", "counter:c"]).await;
    assert!(matches!(counters.get("c").await, Count::Stored(0)), "not brought back yet");
    let (code, stdout, stderr) = output(&mut program(&lab, &["adopt"])).await;
    assert_eq!((code, value(&lab, "a").await), (0, Some(19)), "{stdout}{stderr}");
    assert!(stdout.contains("not managed until now") && stdout.contains("add --yes"), "{stdout}");
    let (code, stdout, stderr) = output(&mut program(&lab, &["adopt", "--yes"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    eventually("a", Count::Exact(1019), async || counters.get("a").await).await;
    eventually("b", Count::Exact(3), async || counters.get("b").await).await;
    assert_eq!(counters.incr("b", 1).await, Ok(Count::Exact(4)));
    let (code, stdout, _) = output(&mut program(&lab, &["adopt", "--yes"])).await;
    assert!(code == 0 && stdout.contains("managed already"), "{stdout}");
    let mut plain = lab.program(&["adopt", "--yes"]);
    let (code, _, stderr) = output(&mut plain).await;
    assert!(code == 78 && stderr.contains("write mode = \"managed\""), "{code} {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn from_a_postgresql_in_the_past_nothing_is_brought_back_before_the_replay() {
    let mut postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "past").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("a", 5).await, Ok(Count::Exact(5)));
    counters.settled("a", Duration::from_secs(20)).await.expect("settled");
    postgres.stop();
    copy(&postgres.data(), &postgres.data().with_extension("backup"));
    postgres.restart().await.expect("PostgreSQL comes back");
    counters.add("a", 7).await.expect("accepted");
    lab.await_value("a", 12).await;
    nothing_is_dirty(&lab).await;
    postgres.stop();
    copy(&postgres.data().with_extension("backup"), &postgres.data());
    postgres.restart().await.expect("PostgreSQL comes back");
    assert_eq!(lab.value("a").await, Some(5), "the past");
    lab.client().await.call(&["DEL", "counter:a"]).await;
    eventually("the refusal", Count::Unknown(Why::OtherPostgres), async || counters.get("a").await).await;
    let (code, stdout, stderr) = output(&mut program(&lab, &["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    eventually("a", Count::Exact(12), async || counters.get("a").await).await;
    assert_eq!(lab.value("a").await, Some(12));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_postgresql_is_refused_until_an_operator_says_that_it_is_the_same() {
    let lab = Lab::new().await;
    let mut first = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("a", 5).await, Ok(Count::Exact(5)));
    counters.settled("a", Duration::from_secs(20)).await.expect("settled");
    first.signal(Signal::TERM);
    assert!(first.exit().await.success());
    // As after the promotion of a standby: another timeline.
    lab.client().await.call(&["HSET", STATE, "lineage", "7000000000000000000/00000001/1"]).await;
    lab.client().await.call(&["DEL", "counter:a"]).await;
    assert_eq!(counters.get("a").await, Count::Unknown(Why::OtherPostgres));
    let mut daemon = daemon(&lab);
    daemon.wait_for("this is another PostgreSQL than before").await;
    let (code, _, stderr) = output(&mut program(&lab, &["adopt", "--yes"])).await;
    assert!(code == 78 && stderr.contains("--accept-postgres"), "{stderr}");
    let (code, stdout, stderr) = output(&mut program(&lab, &["adopt", "--yes", "--accept-postgres"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    eventually("a", Count::Exact(5), async || counters.get("a").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_valkey_lost_its_tail_its_values_are_dropped() {
    let mut lab = Lab::new().await;
    let mut daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    let ids: Vec<String> = (0..50).map(|n| format!("c{n}")).collect();
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    for id in &names {
        counters.incr(id, 1).await.expect("accepted");
    }
    nothing_is_dirty(&lab).await;
    lab.client().await.call(&["SAVE"]).await;
    for id in &names {
        counters.incr(id, 10).await.expect("accepted");
    }
    nothing_is_dirty(&lab).await;
    eventually("rows", 50, async || lab.number("select count(*) from public.counters where value = 11").await).await;
    daemon.forget();
    lab.valkey.kill();
    lab.valkey.restart().await.expect("Valkey comes back");
    let dropped = daemon.wait_for_event("values_dropped", |_| true).await;
    assert_eq!(dropped["why"], "Valkey lost entries");
    eventually("all are exact", vec![Count::Exact(11); 50], async || counters.get_many(&names).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_valkey_refuses_whole_and_drains_by_itself() {
    let lab = Lab { valkey: valkey(&["--maxmemory-policy", "volatile-lru"]).await, ..Lab::new().await };
    let proxy = Proxy::start(lab.postgres_port()).await;
    let through = lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string());
    let mut command = program(&lab, &["run"]);
    command.env("DATABASE_URL", &through).env("TIDEGATE__TRIM__RETENTION", "0s");
    let _daemon = Daemon::start(command);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    counters.add("warm", 1).await.expect("accepted");
    lab.await_value("warm", 1).await;
    proxy.cut();
    let mut client = lab.client().await;
    leave_memory(&mut client, 1 << 20).await;
    let (mut accepted, mut refused) = (vec![0i64; 2_000], 0);
    let mut random = StdRng::seed_from_u64(3);
    while refused < 200 {
        let picks: Vec<usize> = (0..50).map(|_| random.random_range(0..accepted.len())).collect();
        let increments: Vec<(String, i64)> = picks.iter().map(|n| (format!("c{n}"), 1)).collect();
        for (n, added) in picks.iter().zip(counters.add_many(&increments).await) {
            match added {
                Ok(_) => accepted[*n] += 1,
                Err(NotAdded::Unavailable(Fault::Valkey { code, .. })) if code == "OOM" => refused += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
        assert!(accepted.iter().sum::<i64>() < 60_000, "a full server refuses in the end");
    }
    assert!(accepted.iter().sum::<i64>() > 1_000, "{}", accepted.iter().sum::<i64>());
    proxy.heal();
    nothing_is_dirty(&lab).await;
    for (n, accepted) in accepted.iter().enumerate().filter(|(_, accepted)| **accepted > 0).take(100) {
        assert_eq!(lab.value(&format!("c{n}")).await, Some(*accepted), "c{n}");
    }
    let total: i64 = accepted.iter().sum();
    assert_eq!(lab.number("select sum(value)::bigint from public.counters").await, total + 1);
    eventually("room again", true, async || counters.add("warm", 1).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_that_has_the_functions_is_known_to_have_them() {
    let lab = Lab::new().await;
    let connection = Connection::open_unnamed(&address(&lab.valkey.url())).await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    lab.client().await.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    // A daemon that begins, or comes back, settles counters all the same: that is what makes room.
    functions::load(&connection).await.expect("there");
    lab.client().await.call(&["FUNCTION", "DELETE", functions::NAME]).await;
    let refused = functions::load(&connection).await;
    assert!(matches!(&refused, Err(Fault::Valkey { code, .. }) if code == "OOM"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_know_the_functions_is_told_them_and_nothing_is_lost() {
    let lab = Lab::new().await;
    let other = "#!lua name=tidegate_0\nredis.register_function('tidegate_0_incr', function() return {1} end)";
    assert!(matches!(lab.client().await.call(&["FUNCTION", "LOAD", other]).await, Resp::Text(_)));
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    for n in 1..=10 {
        // As on a node that has just joined.
        assert_eq!(lab.client().await.call(&["FUNCTION", "DELETE", "tidegate_1"]).await, Resp::Text(b"OK".to_vec()));
        counters.add("a", 1).await.expect("accepted");
        lab.await_value("a", n).await;
    }
    nothing_is_dirty(&lab).await;
    let answer = lab.client().await.call(&["FCALL", "tidegate_0_incr", "0"]).await;
    assert_eq!(answer, Resp::Array(vec![Resp::Int(1)]), "another version's functions are left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_nothing_is_brought_back_and_increments_are_kept() {
    let lab = Lab::new().await;
    let pipeline = pipeline();
    let only_adds =
        Counters::connect(&address(&lab.valkey.url()), &pipeline, NoTruth, options()).await.expect("connected");
    only_adds.add("a", 3).await.expect("accepted");
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("a", 4).await, Ok(Count::Unknown(Why::CatchingUp)));
    assert_eq!(counters.get("a").await, Count::Stored(0));
    let _daemon = daemon(&lab);
    eventually("a", Count::Exact(7), async || counters.get("a").await).await;
    assert_eq!(only_adds.get("a").await, Count::Exact(7), "what is present anybody reads");
}

#[tokio::test(flavor = "multi_thread")]
async fn verbs_show_warm_and_drop_counters() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters select 'c' || n, n, now() from generate_series(1, 300) n").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let run = async |arguments: &[&str]| output(&mut program(&lab, arguments)).await;
    let (code, stdout, stderr) = run(&["warm", "--top", "100"]).await;
    assert!(code == 0 && stdout.contains("100 of 100 counters are in place"), "{stdout}{stderr}");
    assert_eq!((value(&lab, "c300").await, value(&lab, "c200").await), (Some(300), None));
    let counters = counters(&lab).await;
    counters.incr("c300", 5).await.expect("accepted");
    counters.settled("c300", Duration::from_secs(20)).await.expect("settled");
    let (code, stdout, stderr) = run(&["counter", "show", "c300"]).await;
    assert!(code == 0 && stdout.contains("together                        305"), "{code} {stdout}{stderr}");
    lab.client().await.call(&["SET", "counter:c299", "1"]).await;
    let (code, stdout, _) = run(&["counter", "show", "c299"]).await;
    assert!(code == 3 && stdout.contains("the two differ"), "{code} {stdout}");
    let (code, stdout, stderr) = run(&["invalidate", "--counters", "counters", "--dry-run"]).await;
    assert!(code == 0 && stdout.contains("100 keys match"), "{stdout}{stderr}");
    let (code, stdout, stderr) = run(&["invalidate", "--counters", "counters"]).await;
    assert!(code == 0 && stdout.contains("100 keys were dropped"), "{stdout}{stderr}");
    assert_eq!(counters.get("c300").await, Count::Exact(305));
    let (code, stdout, stderr) = run(&["memory", "--observe", "1"]).await;
    assert!(
        code == 0 && stdout.contains("policy         noeviction") && stdout.contains("counter:*"),
        "{stdout}{stderr}"
    );
    for arguments in [&["invalidate"][..], &["warm"], &["invalidate", "a", "--pattern", "b"]] {
        assert_eq!(run(arguments).await.0, 2, "{arguments:?}");
    }
    let (code, _, stderr) = run(&["invalidate", "--counters", "orders"]).await;
    assert!(code == 78 && stderr.contains("there is no pipeline"), "{stderr}");
}

/// Lets Valkey have so many bytes more than it has now.
pub(crate) async fn leave_memory(client: &mut Client, bytes: u64) {
    let info = client.call(&["INFO", "memory"]).await.text();
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:")?.parse::<u64>().ok());
    let limit = (used.expect("a number") + bytes).to_string();
    client.call(&["CONFIG", "SET", "maxmemory", &limit]).await;
}

/// Seconds of a run under faults; more with TIDEGATE_CHAOS_SECONDS.
fn chaos() -> Duration {
    let set = std::env::var("TIDEGATE_CHAOS_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(set.unwrap_or(8))
}

#[tokio::test(flavor = "multi_thread")]
async fn under_eviction_kills_cuts_and_deletions_no_row_and_no_shown_value_is_wrong() {
    const COUNTERS: usize = 20_000;
    let lab = Lab { valkey: valkey(&["--maxmemory-policy", "volatile-lru"]).await, ..Lab::new().await };
    lab.execute(&format!(
        "insert into public.counters select 'c' || n, n % 100, now() from generate_series(0, {}) n",
        COUNTERS - 1
    ))
    .await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let through = lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string());
    let worker = || {
        let mut command = program(&lab, &["run"]);
        command
            .env("DATABASE_URL", &through)
            .env("TIDEGATE__TRIM__RETENTION", "0s")
            .env("TIDEGATE__COMPACT__MARGIN", "1s");
        command.env("TIDEGATE__LOG__LEVEL", "warn");
        Daemon::start(command)
    };
    let mut workers = [worker(), worker()];
    is_managed(&lab).await;
    leave_memory(&mut lab.client().await, 800_000).await;
    let accounts = Arc::new(Accounts::new((0..COUNTERS).map(|n| n as i64 % 100).collect()));
    let until = tokio::time::Instant::now() + chaos();
    let producers = (0..3u64).map(|n| {
        let (url, through, accounts) = (lab.valkey.url(), through.clone(), Arc::clone(&accounts));
        tokio::spawn(async move {
            let options = CounterOptions { patience: Duration::from_millis(200), ..options() };
            let counters = counters_at(&url, &through, options).await;
            let (mut random, mut refused) = (StdRng::seed_from_u64(n), 0);
            let mut answers = BTreeMap::<String, u32>::new();
            while tokio::time::Instant::now() < until {
                // A few are hot.
                let mut pick = || (random.random_range(0.0..1.0f64).powi(4) * COUNTERS as f64) as usize;
                let picks = [pick(), pick(), pick()];
                match random.random_range(0..6) {
                    0..2 => *answers.entry(accounts.get(&counters, picks[0]).await).or_default() += 1,
                    2 => refused += u32::from(!accounts.add(&counters, &mut random, &picks).await),
                    _ => refused += u32::from(!accounts.add(&counters, &mut random, &picks[..1]).await),
                }
            }
            (refused, answers)
        })
    });
    let producers: Vec<_> = producers.collect();
    let (mut random, mut client, mut kills, mut cuts, mut deleted) =
        (StdRng::seed_from_u64(11), lab.client().await, 0, 0, 0);
    let mut away = false;
    while tokio::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        match random.random_range(0..40) {
            0..2 => {
                let n = random.random_range(0..2);
                workers[n].kill().await;
                workers[n] = worker();
                kills += 1;
            }
            2..8 => {
                let list = client.call(&["CLIENT", "LIST"]).await.text();
                let ids: Vec<&str> = list
                    .lines()
                    .filter(|line| line.contains("name=tidegate"))
                    .filter_map(|line| line.split(' ').next()?.strip_prefix("id="))
                    .collect();
                if !ids.is_empty() {
                    client.call(&["CLIENT", "KILL", "ID", ids[random.random_range(0..ids.len())]]).await;
                    cuts += 1;
                }
            }
            8..25 => {
                let id = format!("counter:c{}", random.random_range(0..200));
                deleted += client.call(&["DEL", &id]).await.int().unwrap_or(0);
            }
            25 if !away => {
                proxy.cut();
                away = true;
            }
            25..30 if away => {
                proxy.heal();
                away = false;
            }
            _ => {}
        }
    }
    proxy.heal();
    let (mut refused, mut answers) = (0, BTreeMap::<String, u32>::new());
    for producer in producers {
        let (no, told) = within_limit("a producer", producer).await.expect("no panic");
        refused += no;
        told.into_iter().for_each(|(answer, count)| *answers.entry(answer).or_default() += count);
    }
    nothing_is_dirty(&lab).await;
    lab.assert_settled().await;
    let letters = lab.number("select count(*) from tidegate.dead_letters").await;
    let rows: Vec<(String, i64)> =
        sqlx::query_as("select id, value from public.counters").fetch_all(&mut lab.sql().await).await.expect("rows");
    let rows: BTreeMap<String, i64> = rows.into_iter().collect();
    let of = |n: usize| rows.get(&format!("c{n}")).copied();
    let wrong_rows: Vec<_> = (0..COUNTERS)
        .filter(|n| of(*n) != Some(accounts.least(*n)))
        .map(|n| format!("c{n}: {:?} instead of {}", of(n), accounts.least(n)))
        .collect();
    let (mut shown, mut wrong) = (0, Vec::new());
    for chunk in (0..COUNTERS).collect::<Vec<_>>().chunks(500) {
        let gets: Vec<[String; 2]> = chunk.iter().map(|n| ["GET".to_owned(), format!("counter:c{n}")]).collect();
        for (n, reply) in chunk.iter().zip(client.pipeline(&gets).await) {
            if let Resp::Text(text) = reply {
                shown += 1;
                if String::from_utf8_lossy(&text) != of(*n).unwrap_or_default().to_string() {
                    wrong.push(*n);
                }
            }
        }
    }
    let evicted = client.call(&["INFO", "stats"]).await.text();
    let evicted = evicted.lines().find_map(|line| line.strip_prefix("evicted_keys:")).unwrap_or_default().to_owned();
    let touched: Vec<usize> = (0..COUNTERS).filter(|n| accounts.least(*n) != accounts.initial(*n)).collect();
    eprintln!(
        "{kills} kills, {cuts} connections cut, {deleted} deleted, {evicted} evicted, {refused} refused, {letters} dead letters; {} counters touched, {shown} shown; reads {answers:?}",
        touched.len()
    );
    assert!(wrong_rows.is_empty() && wrong.is_empty(), "rows {wrong_rows:?}, values {wrong:?}");
    assert_eq!(letters, 0, "no entry kills its readers");
    // A run that was full, or without PostgreSQL, for long leaves no values behind. All that was touched is read, once more, from a client that knows nothing.
    let counters = counters(&lab).await;
    for some in touched.chunks(500) {
        let ids: Vec<String> = some.iter().map(|n| format!("c{n}")).collect();
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        let expected: Vec<Count> = some.iter().map(|n| Count::Exact(accounts.least(*n))).collect();
        eventually("what was touched", expected, async || counters.get_many(&names).await).await;
    }
    let exact = answers.get("Exact()").copied().unwrap_or(0);
    assert!(exact > 0 && !touched.is_empty() && kills + cuts > 0);
    assert_eq!(lab.group("name").await, Resp::Text(GROUP.into()));
}
