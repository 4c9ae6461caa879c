//! PostgreSQL in the past, and the way back.

use tidegate::ops::sandbox::Postgres;

use crate::harness::{Daemon, GROUP, Lab, STREAM, copy, eventually, output, within_limit};
use crate::proxy::{Proxy, Then, Way};

/// A lab whose PostgreSQL can be sent back in time.
async fn lab() -> (Lab, Postgres) {
    let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "past").await;
    (lab, postgres)
}

async fn back_up(postgres: &mut Postgres) {
    postgres.stop();
    copy(&postgres.data(), &postgres.data().with_extension("backup"));
    postgres.restart().await.expect("PostgreSQL comes back");
}

async fn restore(postgres: &mut Postgres) {
    postgres.stop();
    copy(&postgres.data().with_extension("backup"), &postgres.data());
    postgres.restart().await.expect("PostgreSQL comes back");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_to_the_past_a_replay_is_exact_again() {
    let (lab, mut postgres) = lab().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add_many("a", 300).await;
    client.call(&["XADD", STREAM, "*", "id", "a", "amount", "bad"]).await;
    lab.await_value("a", 300).await;
    back_up(&mut postgres).await;
    client.add_many("a", 200).await;
    client.add_many("b", 50).await;
    client.call(&["XADD", STREAM, "*", "id", "b", "amount", "bad"]).await;
    lab.await_value("a", 500).await;
    lab.await_value("b", 50).await;
    eventually("pending", 0, async || lab.pending().await).await;
    restore(&mut postgres).await;
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(300), None), "the past");
    // Life goes on meanwhile.
    client.add("a", 1).await;
    lab.await_value("a", 301).await;
    eventually("pending", 0, async || lab.pending().await).await;

    let (code, stdout, stderr) = output(&mut lab.program(&["replay", "--since", "1h"])).await;
    assert_eq!(code, 0, "{stderr}");
    for line in
        ["553 entries", "302  the ledger has", "251  the ledger lacks: applied", "nothing was changed; add --yes"]
    {
        assert!(stdout.contains(line), "no {line:?} in {stdout}");
    }
    assert_eq!(lab.value("b").await, None);
    daemon.forget();
    let (code, stdout, stderr) = output(&mut lab.program(&["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("rewound"), "{stdout}");
    lab.await_value("a", 501).await;
    lab.await_value("b", 50).await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 553);
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 2);
}

/// A database that was backed up, and then one entry whose acknowledgement is held back in the network.
async fn lab_with_an_acknowledgement_held_back() -> (Lab, Postgres, Proxy, Daemon) {
    let (lab, mut postgres) = lab().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    back_up(&mut postgres).await;
    let held = proxy.trap(Way::ToServer, b"XACK", Then::Hold);
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    daemon.wait_for("created the consumer group").await;
    lab.client().await.add("a", 1).await;
    within_limit("the acknowledgement", held).await.expect("sprung");
    (lab, postgres, proxy, daemon)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_from_before_the_restore_never_arrives_after_it() {
    let (lab, mut postgres, proxy, _daemon) = lab_with_an_acknowledgement_held_back().await;
    restore(&mut postgres).await;
    let (code, _, stderr) = output(&mut lab.program(&["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stderr}");
    // Whoever gets it now dies before it is flushed.
    let mut client = lab.client().await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dies", "STREAMS", STREAM, ">"]).await;
    proxy.release(Way::ToServer);
    lab.await_value("a", 1).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_of_a_consumer_that_was_removed_never_arrives_after_the_restore() {
    let (lab, mut postgres, proxy, _daemon) = lab_with_an_acknowledgement_held_back().await;
    let mut client = lab.client().await;
    // A peer has settled what it held, and removed it after a long silence.
    for consumer in client.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await.array() {
        let name = consumer.array()[1].text();
        client.call(&["XGROUP", "DELCONSUMER", STREAM, GROUP, &name]).await;
    }
    restore(&mut postgres).await;
    let (code, stdout, stderr) = output(&mut lab.program(&["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("connections of workers were closed") && !stdout.contains("rewound; 0 "), "{stdout}");
    // Whoever gets it now dies before it is flushed.
    client.call(&["XREADGROUP", "GROUP", GROUP, "dies", "STREAMS", STREAM, ">"]).await;
    proxy.release(Way::ToServer);
    lab.await_value("a", 1).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_is_refused_politely_where_the_stream_does_not_reach() {
    let lab = Lab::new().await;
    let replay = async |arguments: &[&str]| output(&mut lab.program(&[&["replay"], arguments].concat())).await;
    let (code, _, stderr) = replay(&["--since", "30m"]).await;
    assert_eq!(code, 65, "{stderr}");
    assert!(stderr.contains("there is no stream"), "{stderr}");

    let mut client = lab.client().await;
    client.add_many("a", 100).await;
    lab.settle_everything().await;
    let (code, _, stderr) = replay(&["--since", "99999999999999-0"]).await;
    assert_eq!(code, 65);
    assert!(stderr.contains("nothing has been delivered since"), "{stderr}");
    client.call(&["XTRIM", STREAM, "MAXLEN", "40"]).await;
    let (code, _, stderr) = replay(&["--since", "2h", "--yes"]).await;
    assert_eq!(code, 65);
    assert!(stderr.contains("the stream does not reach back to"), "{stderr}");
    // What it says helps.
    let first = stderr.split("it holds ").nth(1).and_then(|rest| rest.split(' ').next()).expect("an id").to_owned();
    let (code, stdout, stderr) = replay(&["--since", &first]).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("40 entries"), "{stdout}");
    let (code, _, stderr) = replay(&["--since", "1m", "--pipeline", "other"]).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("name one of counters"), "{stderr}");
    let (code, _, stderr) = replay(&["--since", "yesterday"]).await;
    assert_eq!(code, 2);
    assert!(stderr.contains("is no moment"), "{stderr}");
}
