//! Workers that die, stall, or cannot know: exactly once all the same.

use rustix::process::Signal;

use crate::harness::{Client, Daemon, GROUP, Lab, Resp, STREAM, eventually, valkey, within_limit};
use crate::proxy::{Proxy, Then, Way};

async fn postgres_proxy(lab: &Lab) -> Proxy {
    Proxy::start(lab.postgres_port()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_after_the_read_and_before_anything_reached_postgresql() {
    let lab = Lab::new().await;
    let proxy = postgres_proxy(&lab).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    daemon.wait_for("created the consumer group").await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    lab.client().await.add_many("marked", 100).await;
    within_limit("the flush", held).await.expect("sprung");
    daemon.kill().await;
    proxy.cut();
    assert!(lab.pending().await > 0, "the entries had been read");
    assert_eq!(lab.value("marked").await, None, "nothing had been flushed");
    lab.settle_everything().await;
    assert_eq!(lab.value("marked").await, Some(100));
    lab.assert_settled().await;
    let rows = lab.number("select count(*) from tidegate.ledger").await;
    assert!(rows <= 5, "neighbours share a row: {rows} rows for 100 entries");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_commit_and_ack() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let held = proxy.trap(Way::ToServer, b"XACK", Then::Hold);
    lab.client().await.add_many("a", 100).await;
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    within_limit("the acknowledgement", held).await.expect("sprung");
    daemon.kill().await;
    proxy.cut();
    let flushed = lab.value("a").await.expect("something had been flushed");
    assert!(lab.pending().await >= flushed, "nothing had been acknowledged");
    let mut second = lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(100));
    assert_eq!(second.sum("redelivered entries were recognised", "entries") as i64, flushed);
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_worker_held_lands_after_newer_entries_of_a_peer() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    client.add_many("older", 10).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    let _peer = lab.daemon();
    client.add_many("newer", 10).await;
    lab.await_value("newer", 10).await;
    lab.await_value("older", 10).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_batch_of_known_and_new_runs_only_the_new_ones_count() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 100).await;
    let short_runs = || {
        let mut command = lab.program(&["run", "--until-empty"]);
        command.env("TIDEGATE__BATCH__READ_COUNT", "10");
        Daemon::start(command)
    };
    assert!(short_runs().exit().await.success());
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    client.add_many("a", 100).await;
    assert!(short_runs().exit().await.success());
    assert_eq!(lab.value("a").await, Some(200));
    assert_eq!(lab.in_ledger().await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_write_the_same_rows_never_wait_for_each_other_in_a_circle() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let counters: Vec<String> = (0..300).map(|n| format!("c{n}")).collect();
    let commands: Vec<[&str; 7]> =
        counters.iter().map(|counter| ["XADD", STREAM, "*", "id", counter, "amount", "1"]).collect();
    for _ in 0..40 {
        client.pipeline(&commands).await;
    }
    let mut command = lab.unhurried(lab.program(&["run", "--until-empty"]));
    command.env("TIDEGATE__RUN__WORKERS", "8").env("TIDEGATE__BATCH__READ_COUNT", "100");
    command.env("TIDEGATE__BATCH__MAX_ENTRIES", "900");
    let mut daemon = Daemon::start(command);
    // Everything comes again while it is flushed: the ledger's rows are locked by several, too.
    for _ in 0..3 {
        daemon.wait_for("flushed").await;
        daemon.forget();
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    }
    assert!(daemon.exit().await.success());
    assert_eq!(daemon.count("flushing is interrupted"), 0, "{}", daemon.last_lines());
    let wrong = "select count(*) from public.counters where value <> 40";
    assert_eq!((lab.number(wrong).await, lab.in_ledger().await), (0, 12_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outcome_of_the_commit_is_unknown() {
    let lab = Lab::new().await;
    let proxy = postgres_proxy(&lab).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    daemon.wait_for("created the consumer group").await;
    let lost = proxy.trap(Way::ToServer, b"marked", Then::LoseReply);
    lab.client().await.add("marked", 7).await;
    within_limit("the lost answer", lost).await.expect("sprung");
    daemon.wait_for("flushing is interrupted").await;
    daemon.wait_for("redelivered entries were recognised").await;
    assert_eq!(lab.value("marked").await, Some(7));
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_wakes_up_when_a_peer_has_done_its_work() {
    let lab = Lab::new().await;
    let proxy = postgres_proxy(&lab).await;
    let mut zombie = lab.daemon_through(None, Some(proxy.port()));
    zombie.wait_for("created the consumer group").await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    lab.client().await.add_many("marked", 50).await;
    within_limit("the flush", held).await.expect("sprung");
    zombie.signal(Signal::STOP);

    let _peer = lab.daemon();
    lab.await_value("marked", 50).await;
    eventually("pending", 0, async || lab.pending().await).await;

    // Its statement reaches PostgreSQL now, and is refused.
    zombie.signal(Signal::CONT);
    proxy.release(Way::ToServer);
    zombie.wait_for("redelivered entries were recognised").await;
    lab.client().await.add("marked", 1).await;
    lab.await_value("marked", 51).await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_stopped_inside_its_transaction_does_not_hold_up_its_peers() {
    let lab = Lab::new().await;
    lab.client().await.add_many("a", 10).await;
    lab.settle_everything().await;
    // Everything again: the first read is refused, and the careful transaction follows.
    lab.client().await.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    let proxy = postgres_proxy(&lab).await;
    let held = proxy.trap(Way::ToServer, b"COMMIT", Then::Hold);
    let mut stopped = lab.daemon_through(None, Some(proxy.port()));
    stopped.wait_for("running").await;
    // It has locked the ledger's rows, and its COMMIT never arrives.
    within_limit("the careful transaction", held).await.expect("sprung");
    stopped.signal(Signal::STOP);
    let _peer = lab.daemon();
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 11).await;
    // The peer takes over what the stopped one held, and needs the same rows.
    eventually("pending", 0, async || lab.pending().await).await;
    proxy.release(Way::ToServer);
    stopped.signal(Signal::CONT);
    lab.assert_settled().await;
    assert_eq!(lab.value("a").await, Some(11));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_never_reaches_another_server() {
    let lab = Lab::new().await;
    let other = valkey(&[]).await;
    let (valkey, postgres) = (Proxy::start(lab.valkey.port()).await, postgres_proxy(&lab).await);
    let mut daemon = lab.daemon_through(Some(valkey.port()), Some(postgres.port()));
    daemon.wait_for("created the consumer group").await;
    let held = postgres.trap(Way::ToServer, b"marked", Then::Hold);
    let id = lab.client().await.add("marked", 5).await;
    within_limit("the flush", held).await.expect("sprung");

    // On the other server the same id is another entry, pending for somebody who is alive and has not flushed it yet.
    let mut elsewhere = Client::connect(other.port()).await;
    elsewhere.call(&["XADD", STREAM, &id, "id", "other", "amount", "9"]).await;
    elsewhere.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    elsewhere.call(&["XREADGROUP", "GROUP", GROUP, "somebody", "STREAMS", STREAM, ">"]).await;
    valkey.retarget(other.port());
    valkey.reset();
    // Not before it is on the other server: an acknowledgement tried while the connection breaks fails by itself.
    let is_there = async || elsewhere.call(&["CLIENT", "LIST"]).await.text().contains("name=tidegate:");
    eventually("connected to the other server", true, is_there).await;
    postgres.release(Way::ToServer);
    lab.await_value("marked", 5).await;
    daemon.wait_for("the connection changed: acknowledgement dropped").await;
    // Whoever holds it dies; its entry is claimed and, being other content under a used id, applied.
    lab.await_value("other", 9).await;
    assert_eq!(lab.value("marked").await, Some(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_entry_twice_in_one_batch_counts_once() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("again", 3_000).await;
    // One entry a read, all of them for one batch, and the group is rewound again and again between two reads.
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__BATCH__READ_COUNT", "1").env("TIDEGATE__RUN__WORKERS", "1");
    let mut daemon = Daemon::start(command);
    daemon.wait_for("created the consumer group").await;
    for _ in 0..500 {
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    }
    lab.settle_everything().await;
    assert_eq!(lab.value("again").await, Some(3_000));
    assert_eq!(lab.in_ledger().await, 3_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_killed_at_random_under_a_foreign_producer() {
    let lab = Lab::new().await;
    let mut daemons = [lab.daemon(), lab.daemon()];
    let mut client = lab.client().await;
    // Killed by the count of what was produced, not by the clock; each at another point of its work.
    for round in 0..12usize {
        for n in 0..7 {
            client.add_many(&format!("c{}", (round + n) % 5), 137).await;
        }
        let victim = &mut daemons[round % 2];
        victim.kill().await;
        *victim = lab.daemon();
        victim.wait_for("running").await;
    }
    lab.settle_everything().await;
    for n in 0..5 {
        let counter = format!("c{n}");
        let live: i64 = client.call(&["GET", &format!("counter:{counter}")]).await.text().parse().expect("a number");
        assert_eq!(lab.value(&counter).await, Some(live), "{counter}");
    }
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 12 * 7 * 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_settles_what_is_held_and_leaves_no_trace() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    daemon.wait_for("created the consumer group").await;
    for _ in 0..5 {
        client.add_many("a", 2_000).await;
    }
    daemon.signal(Signal::TERM);
    let status = daemon.exit().await;
    assert!(status.success(), "{status}: {}", daemon.last_lines());
    assert_eq!(daemon.wait_for("stopped").await["phase"], "settled");
    assert_eq!(lab.pending().await, 0, "everything that was read is settled{}", daemon.last_lines());
    let consumers = client.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await;
    assert_eq!(consumers, Resp::Array(vec![]), "and the consumer has left");
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(10_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_leaves_pending_what_cannot_be_settled() {
    let lab = Lab::new().await;
    let proxy = postgres_proxy(&lab).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    daemon.wait_for("created the consumer group").await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    lab.client().await.add("marked", 1).await;
    within_limit("the flush", held).await.expect("sprung");
    daemon.signal(Signal::TERM);
    daemon.wait_for("stopping").await;
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().await.code(), Some(75));
    assert_eq!(daemon.wait_for("stopped").await["phase"], "left pending");
    lab.settle_everything().await;
    assert_eq!(lab.value("marked").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_was_lost_on_the_way_is_not_lost() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    daemon.wait_for("created the consumer group").await;
    for n in 1..=5 {
        // The reply that carries this entry is cut off; under the same consumer's name it is found again.
        let lost = proxy.trap(Way::ToClient, format!("lost{n}").as_bytes(), Then::Hold);
        lab.client().await.add(&format!("lost{n}"), n).await;
        within_limit("the reply", lost).await.expect("sprung");
        proxy.reset();
        proxy.heal();
        lab.await_value(&format!("lost{n}"), n).await;
    }
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_do_not_pile_up_over_many_restarts() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for n in 0..15 {
        client.add("a", 1).await;
        let mut daemon = lab.daemon();
        daemon.wait_for("running").await;
        if n % 3 == 0 {
            daemon.kill().await;
        } else {
            daemon.signal(Signal::TERM);
            daemon.exit().await;
        }
    }
    let _daemon: Daemon = lab.daemon();
    // Whoever has gone and holds nothing is removed.
    eventually("consumers", 1, async || {
        match lab.client().await.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await {
            Resp::Array(consumers) => consumers.len(),
            // Nobody has read yet.
            _ => 0,
        }
    })
    .await;
    lab.await_value("a", 15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_older_than_the_ledger_tells_drops_what_somebody_has_settled() {
    let lab = Lab::new().await;
    let proxy = postgres_proxy(&lab).await;
    let mut zombie = lab.daemon_through(None, Some(proxy.port()));
    zombie.wait_for("created the consumer group").await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    lab.client().await.add("marked", 5).await;
    within_limit("the flush", held).await.expect("sprung");
    zombie.signal(Signal::STOP);
    let _peer = lab.daemon();
    lab.await_value("marked", 5).await;
    eventually("pending", 0, async || lab.pending().await).await;
    // It slept so long that the row was compacted.
    lab.execute("update tidegate.ledger set digests = null, digest_version = null").await;
    zombie.signal(Signal::CONT);
    proxy.release(Way::ToServer);
    zombie.wait_for("entries older than the ledger tells, settled by somebody, were dropped").await;
    assert_eq!(lab.value("marked").await, Some(5));
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_workers_that_get_everything_again_neither_deadlock_nor_double() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut command = lab.unhurried(lab.program(&["run"]));
    command.env("TIDEGATE__RUN__WORKERS", "6").env("TIDEGATE__BATCH__READ_COUNT", "37");
    let mut daemon = Daemon::start(command);
    for round in 1..=4 {
        for counter in ["a", "b", "c"] {
            client.add_many(counter, 400).await;
        }
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
        client.add("last", 1).await;
        lab.await_value("last", round).await;
    }
    daemon.wait_for("redelivered entries were recognised").await;
    lab.settle_everything().await;
    for counter in ["a", "b", "c"] {
        assert_eq!(lab.value(counter).await, Some(1_600), "{counter}");
    }
    assert_eq!(daemon.count("flushing is"), 0, "{}", daemon.last_lines());
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 4_804);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_is_durable_whatever_the_role_or_database_has_set() {
    let lab = Lab::new().await;
    let name = lab.database.rsplit('/').next().expect("a name");
    // A deferred trigger runs at COMMIT, and sees what COMMIT will do.
    lab.execute(&format!(
        "alter database {name} set synchronous_commit = off;
         create table public.seen (setting text);
         create function public.look() returns trigger language plpgsql as
             $$ begin insert into public.seen values (current_setting('synchronous_commit')); return null; end $$;
         create constraint trigger look after insert or update on public.counters
             deferrable initially deferred for each row execute function public.look()"
    ))
    .await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.settle_everything().await;
    // Once more by the careful way.
    client.add("a", 1).await;
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    lab.settle_everything().await;
    let seen: Vec<String> =
        sqlx::query_scalar("select setting from public.seen").fetch_all(&mut lab.sql().await).await.expect("readable");
    assert_eq!(seen, ["on", "on"]);
    assert_eq!(lab.value("a").await, Some(2));
}
