//! Values brought back: from which PostgreSQL, from which snapshot of it, and what is left where something dies or refuses in between.

use std::time::Duration;

use tidegate::client::truth::NoTruth;
use tidegate::client::{Count, CounterOptions, Counters, Why};
use tidegate::functions;
use tidegate::ops::sandbox::Postgres;
use tidegate::valkey::Connection;

use crate::harness::{Lab, Resp, STREAM, eventually, output, standby_of, within_limit};
use crate::managed::{
    INDEX, STATE, address, becomes_clean_after_a_death_before, counters, counters_at, daemon, is_clean, is_managed,
    options, pipeline, program, value,
};
use crate::proxy::{Proxy, Then, Way};

/// Nobody's lease ends while something is held up on purpose.
fn unhurried() -> CounterOptions {
    CounterOptions { lease: Duration::from_secs(120), patience: Duration::from_secs(120), ..options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_added_while_a_value_is_brought_is_judged_in_the_snapshot_that_the_value_is_from() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters values ('a', 1000, now())").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let slow = counters_at(&proxy.url(), &lab.database, unhurried()).await;
    let held = proxy.trap(Way::ToServer, b"tidegate_1_install", Then::Hold);
    let bringing = tokio::spawn({
        let slow = slow.clone();
        async move { slow.get("a").await }
    });
    // It has read 1000, and others go on: what they add is flushed before the value is in place.
    within_limit("the value", held).await.expect("sprung");
    let quick = counters(&lab).await;
    for _ in 0..3 {
        quick.add("a", 7).await.expect("accepted");
    }
    lab.await_value("a", 1021).await;
    proxy.release(Way::ToServer);
    assert_eq!(within_limit("the value", bringing).await.expect("no panic"), Count::Exact(1021));
    assert_eq!(quick.incr("a", 1).await, Ok(Count::Exact(1022)));
    lab.await_value("a", 1022).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_become_clean_although_everybody_died_between_the_acknowledgement_and_the_sweep() {
    // The only command of a daemon that names the counter is the one that makes it clean.
    becomes_clean_after_a_death_before(b"counter:a", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_a_plain_producer_has_made_is_not_added_to() {
    let lab = Lab::new().await;
    lab.execute("insert into public.counters values ('a', 1000, now())").await;
    let _daemon = daemon(&lab);
    is_managed(&lab).await;
    let (counters, mut client) = (counters(&lab).await, lab.client().await);
    // The first half of what it does: the value was absent, and begins at zero.
    client.call(&["INCRBY", "counter:a", "1"]).await;
    let told = counters.incr("a", 1).await.expect("accepted");
    assert!(!matches!(told, Count::Exact(value) if value != 1001), "{told:?}");
    eventually("the value", Count::Exact(1001), async || counters.get("a").await).await;
    client.call(&["XADD", STREAM, "*", "id", "a", "amount", "1"]).await;
    lab.await_value("a", 1002).await;
    eventually("the value", Count::Exact(1002), async || counters.get("a").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_refuses_leaves_the_counters_as_they_were() {
    let lab = Lab::new().await;
    let connection = Connection::open_unnamed(&address(&lab.valkey.url())).await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    let url = address(&lab.valkey.url());
    let counters = Counters::connect(&url, &pipeline(), NoTruth, options()).await.expect("connected");
    let mut client = lab.client().await;
    client.call(&["SET", STREAM, "no stream"]).await;
    client.call(&["SET", "counter:a", "5", "PX", "600000"]).await;
    assert!(counters.add("a", 2).await.is_err());
    assert!(counters.add("b", 2).await.is_err());
    assert!(counters.add_many(&[("a", 1), ("b", 1), ("a", i64::MIN)]).await.iter().all(Result::is_err));
    assert_eq!((value(&lab, "a").await, value(&lab, "b").await), (Some(5), None));
    assert_eq!(client.call(&["EXISTS", INDEX, STATE]).await.int(), Some(0));
    assert!(client.call(&["PTTL", "counter:a"]).await.int() > Some(0), "still clean");
    client.call(&["DEL", STREAM]).await;
    let added = counters.add_many(&[("a", 1), ("b", 1)]).await;
    assert_eq!(added, [Ok(Some(6)), Ok(None)]);
    assert_eq!(client.call(&["XLEN", STREAM]).await, Resp::Int(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_never_read_and_a_promoted_one_only_behind_a_replay() {
    let mut primary = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&primary, "here").await;
    let mut standby = standby_of(&mut primary, &[]).await;
    let there = Lab { database: standby.url("here"), ..Lab::new().await };

    let mut first = daemon(&lab);
    is_managed(&lab).await;
    let counters = counters(&lab).await;
    assert_eq!(counters.incr("a", 5).await, Ok(Count::Exact(5)));
    counters.settled("a", Duration::from_secs(20)).await.expect("settled");
    there.await_value("a", 5).await;
    lab.client().await.call(&["DEL", "counter:a"]).await;
    let of_standby = counters_at(&lab.valkey.url(), &there.database, options()).await;
    assert_eq!(of_standby.get("a").await, Count::Unknown(Why::PostgresDown), "it may be behind");
    assert_eq!(counters.get("a").await, Count::Exact(5));

    // What is flushed last never reaches it.
    standby.stop();
    counters.add("a", 7).await.expect("accepted");
    lab.await_value("a", 12).await;
    is_clean(&lab, "a").await;
    first.kill().await;
    primary.stop();
    standby.restart().await.expect("a standby");
    there.execute("select pg_promote()").await;
    assert_eq!(there.value("a").await, Some(5), "the past");
    lab.client().await.call(&["DEL", "counter:a"]).await;
    let lab = Lab { database: there.database.clone(), ..lab };
    eventually("the refusal", Count::Unknown(Why::OtherPostgres), async || of_standby.get("a").await).await;
    let mut next = daemon(&lab);
    next.wait_for("this is another PostgreSQL than before").await;
    let (code, stdout, stderr) = output(&mut program(&lab, &["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    eventually("a", Count::Exact(12), async || of_standby.get("a").await).await;
    assert_eq!(lab.value("a").await, Some(12));
}
