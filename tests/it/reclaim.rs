//! What the dead leave behind: found at once where the server knows, by silence elsewhere, and whatever closes connections.

use tokio::process::Command;

use crate::harness::{Client, Daemon, GROUP, Lab, Resp, STREAM, eventually, valkey, within_limit};
use crate::proxy::{Proxy, Then, Way};

/// Longer than any test waits: who is found dead in spite of it was not found by silence.
const LONGER_THAN_THE_TEST: &str = "5m";

/// Less than a second, and enough for a session to begin.
const LOOKS_BETWEEN_RESETS: usize = 50;

/// A daemon to whom silence says nothing within the test.
fn deaf_to_silence(lab: &Lab) -> Command {
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__RECLAIM__DEAD_AFTER", LONGER_THAN_THE_TEST).env("TIDEGATE__COMPACT__MARGIN", "1h");
    command
}

/// A consumer that no connection stands for, with all there is in its hands.
async fn dead_consumer_takes_everything(client: &mut Client) {
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_held_is_taken_up_long_before_silence_would_tell() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut victim = deaf_to_silence(&lab);
    victim.env("DATABASE_URL", lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string()));
    let mut victim = Daemon::start(victim);
    victim.wait_for("created the consumer group").await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    let mut client = lab.client().await;
    client.add_many("marked", 100).await;
    within_limit("the flush", held).await.expect("sprung");
    let _peer = Daemon::start(deaf_to_silence(&lab));
    victim.kill().await;
    proxy.cut();
    client.add_many("a", 100).await;
    lab.await_value("marked", 100).await;
    lab.await_value("a", 100).await;
    lab.assert_settled().await;
    // Its name goes as well.
    eventually("consumers", 1, async || client.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await.array().len()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_server_may_not_be_asked_silence_tells() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["ACL", "SETUSER", "tide", "on", ">secret", "~*", "+@all", "-client|list", "-client|kill"]).await;
    let url = format!("valkey://tide:secret@127.0.0.1:{}", lab.valkey.port());
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut victim = lab.program(&["run"]);
    victim.env("VALKEY_URL", &url);
    victim.env("DATABASE_URL", lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string()));
    let mut victim = Daemon::start(victim);
    victim.wait_for("created the consumer group").await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    client.add_many("marked", 100).await;
    within_limit("the flush", held).await.expect("sprung");
    victim.kill().await;
    proxy.cut();
    let mut peer = lab.program(&["run"]);
    peer.env("VALKEY_URL", &url);
    let _peer = Daemon::start(peer);
    lab.await_value("marked", 100).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_closes_idle_connections_does_not_keep_the_dead_from_being_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 100).await;
    dead_consumer_takes_everything(&mut client).await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    // No session lives for as long as the dead are silent.
    let mut daemon = lab.program(&["run"]);
    daemon.env("VALKEY_URL", proxy.url()).env("TIDEGATE__RECLAIM__DEAD_AFTER", "3s");
    let _daemon = Daemon::start(daemon);
    let mut looks = 0;
    eventually("taken up between two resets", Some(100), async || {
        looks += 1;
        if looks % LOOKS_BETWEEN_RESETS == 0 {
            proxy.reset();
        }
        lab.value("a").await
    })
    .await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_drains_a_server_that_is_full_of_other_clients_data() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 1_000).await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    client.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert!(matches!(client.call(&["SET", "other", "data"]).await, Resp::Error(_)), "the server is full");
    let mut daemon = lab.daemon();
    lab.await_value("a", 1_000).await;
    lab.assert_settled().await;
    assert_eq!(daemon.count("reading is interrupted"), 0, "{}", daemon.last_lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_gives_the_same_numbers_to_other_connections_and_nobody_is_harmed() {
    let mut lab = Lab::new().await;
    lab.valkey = valkey(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let daemons = [lab.daemon(), lab.daemon()];
    for round in 1..=4 {
        lab.client().await.add_many("a", 100).await;
        lab.await_value("a", round * 100).await;
        lab.valkey.kill();
        lab.valkey.restart().await.expect("Valkey comes back");
    }
    lab.assert_settled().await;
    drop(daemons);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_claimed_and_does_not_fit_into_one_batch_is_taken_up_without_waiting_for_the_next_look() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let padding = "x".repeat(4_000);
    for _ in 0..100 {
        client.call(&["XADD", STREAM, "*", "id", "a", "amount", "1", "padding", &padding]).await;
    }
    // A consumer whose connection is gone holds everything.
    let info = client.call(&["INFO", "server"]).await.text();
    let run_id = info.lines().find_map(|line| line.strip_prefix("run_id:")).expect("told").trim();
    let gone = tidegate::model::names::consumer("gone", run_id, 1_000_000, 7);
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, &gone, "STREAMS", STREAM, ">"]).await;
    eventually("silent for long enough", true, async || {
        let consumers = client.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await.array();
        consumers.into_iter().all(|consumer| consumer.array()[5].int() > Some(100))
    })
    .await;
    // One look, and no other within the test.
    let mut daemon = deaf_to_silence(&lab);
    daemon.env("TIDEGATE__RECLAIM__SWEEP_EVERY", LONGER_THAN_THE_TEST).env("TIDEGATE__RECLAIM__GONE_AFTER", "100ms");
    daemon.env("TIDEGATE__BATCH__MAX_BYTES", "16KiB").env("TIDEGATE__BATCH__MAX_ENTRY_BYTES", "8KiB");
    daemon.env("TIDEGATE__DEAD_LETTERS__MAX_BYTES", "4KiB");
    let _daemon = Daemon::start(daemon);
    lab.await_value("a", 100).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_settles_while_it_is_claimed_is_not_taken_for_gone() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let ids = [client.add("a", 1).await, client.add("a", 1).await, client.add("a", 1).await];
    lab.settle_everything().await;
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let listed = proxy.trap(Way::ToServer, b"XCLAIM", Then::Hold);
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    within_limit("the claim", listed).await.expect("sprung");
    // The one in the middle of a row of the ledger: had it been deleted, nobody could know whether it was flushed.
    client.call(&["XACK", STREAM, GROUP, &ids[1]]).await;
    proxy.release(Way::ToServer);
    daemon.wait_for("redelivered entries were recognised").await;
    lab.assert_settled().await;
    client.add("a", 1).await;
    lab.await_value("a", 4).await;
    assert_eq!(daemon.count("entries were deleted from the stream"), 0, "{}", daemon.last_lines());
}
