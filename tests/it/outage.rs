//! Servers that fail, come back, forget, or change under the daemon's feet.

use crate::harness::{Client, Daemon, GROUP, Lab, Resp, STREAM, eventually, valkey, within_limit};
use crate::proxy::{Proxy, Then, Way};

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_destroyed_is_created_again_at_the_start() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add_many("a", 20).await;
    lab.await_value("a", 20).await;
    client.call(&["XGROUP", "DESTROY", STREAM, GROUP]).await;
    client.add("a", 1).await;
    lab.await_value("a", 21).await;
    daemon.wait_for("redelivered entries were recognised").await;
    assert!(daemon.count("reading is interrupted") <= 2, "one incident, not a hot loop: {}", daemon.last_lines());
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_flushall_counting_goes_on_and_the_loss_is_reported() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add_many("a", 20).await;
    lab.await_value("a", 20).await;
    client.call(&["FLUSHALL"]).await;
    let lost = daemon.wait_for("entries that were flushed are gone from the stream").await;
    assert_eq!(lost["entries"], 20);
    client.add("a", 1).await;
    lab.await_value("a", 21).await;
    assert_eq!(lab.number("select coalesce(sum(lost), 0)::bigint from tidegate.ledger").await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewound_group_changes_nothing() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add_many("a", 500).await;
    lab.await_value("a", 500).await;
    for _ in 0..3 {
        daemon.forget();
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
        client.add("a", 1).await;
        daemon.wait_for("redelivered entries were recognised").await;
    }
    lab.await_value("a", 503).await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_ledgers_constraint_flushing_pauses_and_never_doubles() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add_many("a", 20).await;
    lab.await_value("a", 20).await;
    lab.execute("alter table tidegate.ledger drop constraint ledger_no_overlap").await;
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    client.add("a", 1).await;
    let line = daemon.wait_for("flushing is halted").await;
    assert!(line["fault"].as_str().is_some_and(|fault| fault.contains("42704")), "{line}");
    assert_eq!(lab.value("a").await, Some(20));
    lab.execute(
        "alter table tidegate.ledger add constraint ledger_no_overlap exclude using gist (lane with =, ids with &&)",
    )
    .await;
    lab.await_value("a", 21).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_own_tables_refuse_is_nobodys_dead_letter() {
    let lab = Lab::new().await;
    lab.execute("alter table tidegate.ledger add constraint never check (entries < 0)").await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    client.add("a", 1).await;
    daemon.wait_for("flushing is halted").await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
    lab.execute("alter table tidegate.ledger drop constraint never").await;
    lab.await_value("a", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deployments_give_the_same_ids_and_both_count() {
    let east = Lab::new().await;
    let west = Lab { database: east.database.clone(), ..Lab::new().await };
    let mut daemons = [(&east, "east"), (&west, "west")].map(|(lab, source)| {
        let mut command = lab.program(&["run"]);
        command.env("TIDEGATE__VALKEY__SOURCE", source);
        Daemon::start(command)
    });
    // Streams that hold just the same are taken for one at the start: here they come to do so later.
    for daemon in &mut daemons {
        daemon.wait_for_event("running", |_| true).await;
    }
    for lab in [&east, &west] {
        lab.client().await.call(&["XADD", STREAM, "1700000000000-0", "id", "a", "amount", "1"]).await;
    }
    east.await_value("a", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_table_halts_and_flushing_goes_on_by_itself() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    lab.execute("alter table public.counters rename to away").await;
    client.add("a", 1).await;
    daemon.wait_for("flushing is halted").await;
    lab.execute("alter table public.away rename to counters").await;
    daemon.wait_for("flushing goes on").await;
    lab.await_value("a", 2).await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_away_for_longer_than_dead_after_and_back() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    proxy.cut();
    let before = client.add("a", 1).await;
    daemon.wait_for("flushing is interrupted").await;
    // With a second batch its hands are full, and it no longer reads: that alone would be a sign of life.
    client.add("a", 1).await;
    eventually("pending", 2, async || lab.pending().await).await;
    // A peer, whose PostgreSQL is well, would take the entries of a silent consumer; this one shows signs of life.
    let mut peer = lab.daemon();
    peer.wait_for("running").await;
    let idle = async || match lab.client().await.call(&["XPENDING", STREAM, GROUP, "-", "+", "10"]).await {
        Resp::Array(rows) => rows.into_iter().next().map(|row| row.array()),
        other => panic!("{other:?}"),
    };
    let old_enough = async || idle().await.is_some_and(|row| row[2].int().is_some_and(|ms| ms > 2_500));
    eventually("the entry has been held for long", true, old_enough).await;
    let row = idle().await.expect("pending");
    assert_eq!((row[0].text(), row[3].int()), (before, Some(1)), "held by the one that read it, delivered once");
    proxy.heal();
    lab.await_value("a", 3).await;
    daemon.wait_for("flushing goes on").await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_type_in_the_streams_place_halts_reading_and_loses_nothing_else() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    daemon.wait_for("created the consumer group").await;
    let mut client = lab.client().await;
    client.call(&["DEL", STREAM]).await;
    client.call(&["SET", STREAM, "a string"]).await;
    daemon.wait_for("reading is halted").await;
    client.call(&["DEL", STREAM]).await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_was_killed_and_came_back_with_its_data_counts_on() {
    let mut lab = Lab::new().await;
    lab.valkey = valkey(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let mut daemon = lab.daemon();
    lab.client().await.add_many("a", 100).await;
    lab.await_value("a", 100).await;
    lab.valkey.kill();
    daemon.wait_for("reading is interrupted").await;
    lab.valkey.restart().await.expect("Valkey starts again");
    let loaded = async || lab.client().await.call(&["PING"]).await == Resp::Text(b"PONG".to_vec());
    eventually("its data is loaded", true, loaded).await;
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 101).await;
    lab.assert_settled().await;
    assert_eq!(daemon.count("entries that were flushed are gone"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_under_used_ids_is_applied() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(client.add("a", 1).await);
    }
    lab.await_value("a", 10).await;
    // Another primary minted the same ids for other entries: all at once, before the stream can be told to start above.
    let mut commands: Vec<Vec<&str>> = vec![vec!["MULTI"], vec!["DEL", STREAM]];
    commands.extend(ids.iter().map(|id| vec!["XADD", STREAM, id, "id", "b", "amount", "1"]));
    commands.push(vec!["EXEC"]);
    client.pipeline(&commands).await;
    lab.await_value("b", 10).await;
    daemon.wait_for("other content under used ids was applied").await;
    assert_eq!(lab.value("a").await, Some(10));
    // And is recognised when it comes again.
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    client.add("a", 1).await;
    lab.await_value("a", 11).await;
    assert_eq!(lab.value("b").await, Some(10));
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_behind_the_ledger_is_told_to_start_above_it() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    let last = client.add("a", 1).await;
    lab.await_value("a", 1).await;
    client.call(&["DEL", STREAM]).await;
    daemon.wait_for("raised the stream's last id").await;
    let info = client.call(&["XINFO", "STREAM", STREAM]).await.array();
    let at = info.iter().position(|field| *field == Resp::Text(b"last-generated-id".to_vec())).expect("known");
    assert_eq!(info[at + 1].text(), last);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_ahead_of_the_clock_never_shuts_the_stream() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    // An entry from a server whose clock was a year ahead.
    let far = format!("{}-0", 4_000_000_000_000u64);
    client.call(&["XADD", STREAM, &far, "id", "a", "amount", "1"]).await;
    let mut daemon = lab.daemon();
    lab.await_value("a", 1).await;
    client.call(&["DEL", STREAM]).await;
    daemon.wait_for("the stream is behind the ledger by more than its clock allows").await;
    client.add("a", 1).await;
    lab.await_value("a", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_valkey_is_given_up_and_asked_again() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", format!("valkey://127.0.0.1:{}", proxy.port()));
    command.env("TIDEGATE__VALKEY__COMMAND_TIMEOUT", "500ms");
    let mut daemon = crate::harness::Daemon::start(command);
    daemon.wait_for("created the consumer group").await;
    let silent = proxy.trap(Way::ToServer, b"XREADGROUP", Then::Hold);
    within_limit("the read", silent).await.expect("sprung");
    daemon.wait_for("reading is interrupted").await;
    proxy.heal();
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_deleted_before_they_were_flushed_are_counted_as_lost() {
    let lab = Lab::new().await;
    let mut client = Client::connect(lab.valkey.port()).await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    client.add("a", 1).await;
    let deleted = client.add("a", 1).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    client.call(&["XDEL", STREAM, &deleted]).await;
    let mut daemon = lab.daemon();
    let lost = daemon.wait_for("entries were deleted from the stream before they were flushed").await;
    assert_eq!((lost["entries"].as_u64(), lost["ids"].as_str()), (Some(1), Some(deleted.as_str())));
    lab.await_value("a", 1).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_entries_deleted_after_they_may_have_been_flushed_it_is_said_that_nobody_can_know() {
    let lab = Lab::new().await;
    let mut client = Client::connect(lab.valkey.port()).await;
    let ids = [client.add("a", 1).await, client.add("a", 1).await, client.add("a", 1).await];
    lab.settle_everything().await;
    // All three are taken as if they had not been flushed, and two of them are gone.
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    for id in &ids[1..] {
        client.call(&["XDEL", STREAM, id]).await;
    }
    let mut daemon = lab.daemon();
    let unknown = daemon.wait_for_event("lost_upstream", |event| event["flushed"] == "unknown").await;
    // The last one was flushed: a row ends there.
    assert_eq!((unknown["entries"].as_u64(), unknown["ids"].as_str()), (Some(1), Some(ids[1].as_str())), "{unknown}");
    lab.assert_settled().await;
    assert_eq!(daemon.count("entries were deleted from the stream before they were flushed"), 0);
    assert_eq!(lab.value("a").await, Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_swallows_postgresqls_answers() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    let sent = proxy.trap(Way::ToServer, b"swallowed", Then::HoldReply);
    client.add("swallowed", 1).await;
    within_limit("a flush", sent).await.expect("sprung");
    // It was committed, and nobody heard.
    lab.await_value("swallowed", 1).await;
    daemon.wait_for("flushing is interrupted").await;
    proxy.release(Way::ToClient);
    daemon.wait_for("redelivered entries were recognised").await;
    client.add("a", 1).await;
    lab.await_value("a", 2).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_that_break_off_in_the_middle_are_read_again() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    lab.client().await.add_many("a", 3_000).await;
    proxy.slow(1_000_000);
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    for _ in 0..3 {
        // Sprung while a reply with many entries is on its way, and cut right there.
        let under_way = proxy.trap(Way::ToClient, b"amount", Then::Hold);
        within_limit("a reply", under_way).await.expect("sprung");
        proxy.reset();
        proxy.release(Way::ToClient);
    }
    daemon.wait_for("reading is interrupted").await;
    proxy.heal();
    lab.await_value("a", 3_000).await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 3_000);
}
