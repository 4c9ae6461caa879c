//! One process reads a stream alone: by a lease, without marks in Valkey, and exactly once all the same.

use rustix::process::Signal;

use crate::harness::{Daemon, GROUP, Lab, Resp, STREAM, eventually, output, within_limit};
use crate::proxy::{Proxy, Then, Way};

/// What the key of the lease is called.
const LEASE: &str = "tidegate:lease:{flush:counters}:flush:counters:counters";

fn daemon(lab: &Lab) -> Daemon {
    Daemon::start(lab.exclusive(&["run"]))
}

/// A daemon whose Valkey, PostgreSQL, or both, lie behind a proxy.
fn daemon_through(lab: &Lab, valkey: Option<&Proxy>, postgres: Option<&Proxy>) -> Daemon {
    let mut command = lab.exclusive(&["run"]);
    // Nobody but the reader looks at the group.
    command.env("TIDEGATE__TRIM__EVERY", "1h").env("TIDEGATE__COMPACT__EVERY", "1h");
    lab.start_through(command, valkey.map(Proxy::port), postgres.map(Proxy::port))
}

/// The program as a member of the group, or as a file says.
fn as_configured(lab: &Lab, arguments: &[&str]) -> tokio::process::Command {
    let mut command = lab.program(arguments);
    command.env_remove("TIDEGATE__PIPELINES__COUNTERS__DELIVERY");
    command
}

/// How often the server has executed a command.
async fn calls(lab: &Lab, command: &str) -> u64 {
    let stats = lab.client().await.call(&["INFO", "commandstats"]).await.text();
    let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    line.and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_in_valkey_for_each_entry_and_the_lag_is_true_to_the_end() {
    let lab = Lab::new().await;
    let mut daemon = daemon(&lab);
    daemon.wait_for_event("reads_alone", |_| true).await;
    let mut client = lab.client().await;
    client.add_many("a", 5_000).await;
    lab.await_value("a", 5_000).await;
    lab.await_no_lag().await;
    assert_eq!(lab.group("entries-read").await, Resp::Int(5_000));
    assert_eq!(lab.group("pending").await, Resp::Int(0));
    assert_eq!(calls(&lab, "xack").await, 0);
    // One that was deleted before anybody read it counts as read behind the last one.
    let doomed = client.add("doomed", 1).await;
    client.call(&["XDEL", STREAM, &doomed]).await;
    client.add("a", 1).await;
    lab.await_value("a", 5_001).await;
    lab.await_no_lag().await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_groups_position_is_what_is_committed() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut daemon = daemon_through(&lab, None, Some(&proxy));
    daemon.wait_for_event("reads_alone", |_| true).await;
    let mut client = lab.client().await;
    let first = client.add("first", 1).await;
    lab.await_value("first", 1).await;
    lab.await_no_lag().await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    client.add("marked", 1).await;
    within_limit("the flush", held).await.expect("sprung");
    // It has read it, and looks at the position again and again.
    let looks = calls(&lab, "xinfo|groups").await;
    eventually("looks", true, async || calls(&lab, "xinfo|groups").await > looks + 3).await;
    assert_eq!(lab.group("last-delivered-id").await, Resp::Text(first.into()));
    assert_eq!(lab.group("lag").await, Resp::Int(1));
    proxy.release(Way::ToServer);
    lab.await_value("marked", 1).await;
    lab.await_no_lag().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_settled_behind_something_that_is_not_moves_nothing() {
    let lab = Lab::new().await;
    let mut command = lab.exclusive(&["run"]);
    command.env("TIDEGATE__RUN__WORKERS", "2").env("TIDEGATE__POSTGRES__LOCK_TIMEOUT", "100ms");
    command.env("TIDEGATE__TRIM__EVERY", "1h").env("TIDEGATE__COMPACT__EVERY", "1h");
    let mut daemon = Daemon::start(command);
    daemon.wait_for_event("reads_alone", |_| true).await;
    let mut client = lab.client().await;
    client.add("held", 1).await;
    let before = client.add("first", 1).await;
    lab.await_value("first", 1).await;
    lab.await_no_lag().await;
    // Somebody else has the row of the one, and nobody that of the other.
    let mut sql = lab.sql().await;
    let mut hold = sqlx::Connection::begin(&mut sql).await.expect("begun");
    sqlx::query("select from public.counters where id = 'held' for update").execute(&mut *hold).await.expect("held");
    client.add("held", 1).await;
    daemon.wait_for("flushing is interrupted").await;
    client.add("second", 1).await;
    lab.await_value("second", 1).await;
    let looks = calls(&lab, "xinfo|groups").await;
    eventually("looks", true, async || calls(&lab, "xinfo|groups").await > looks + 3).await;
    assert_eq!(lab.group("last-delivered-id").await, Resp::Text(before.into()));
    // Who comes next begins before both.
    daemon.kill().await;
    hold.rollback().await.expect("let go");
    let mut second = Daemon::start(lab.exclusive(&["run", "--until-empty"]));
    assert!(second.exit().await.success());
    assert_eq!((lab.value("held").await, lab.value("second").await), (Some(2), Some(1)));
    assert_eq!(lab.in_ledger().await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_commit_and_the_move_of_the_position() {
    let lab = Lab::new().await;
    let (valkey, postgres) = (Proxy::start(lab.valkey.port()).await, Proxy::start(lab.postgres_port()).await);
    let mut daemon = daemon_through(&lab, Some(&valkey), Some(&postgres));
    daemon.wait_for_event("reads_alone", |_| true).await;
    let flush = postgres.trap(Way::ToServer, b"marked", Then::Hold);
    lab.client().await.add_many("marked", 100).await;
    within_limit("the flush", flush).await.expect("sprung");
    // From here on nothing reaches Valkey: the position is not moved.
    let script = valkey.trap(Way::ToServer, b"XGROUP", Then::Hold);
    within_limit("a look at the position", script).await.expect("sprung");
    postgres.release(Way::ToServer);
    eventually("flushed", true, async || lab.value("marked").await.is_some()).await;
    daemon.kill().await;
    valkey.cut();
    // What it had sent to PostgreSQL may still be carried out.
    eventually("its sessions end", 0, async || lab.sessions().await).await;
    let flushed = lab.in_ledger().await;
    let mut second = Daemon::start(lab.exclusive(&["run", "--until-empty"]));
    assert!(second.exit().await.success());
    assert_eq!(second.sum("redelivered entries were recognised", "entries") as i64, flushed);
    assert_eq!(lab.value("marked").await, Some(100));
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_hands_the_stream_over_at_once() {
    let lab = Lab::new().await;
    let start = || {
        let mut command = lab.exclusive(&["run"]);
        // Nobody could wait for it to run out.
        command.env("TIDEGATE__EXCLUSIVE__LEASE", "5m");
        Daemon::start(command)
    };
    let mut first = start();
    first.wait_for_event("reads_alone", |_| true).await;
    let mut second = start();
    second.wait_for_event("lease_waits", |_| true).await;
    let mut client = lab.client().await;
    client.add_many("a", 1_000).await;
    second.signal(Signal::STOP);
    first.signal(Signal::TERM);
    assert!(first.exit().await.success());
    assert_eq!(client.call(&["EXISTS", LEASE]).await, Resp::Int(0));
    let Resp::Array(consumers) = client.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await else { panic!("no group") };
    assert!(consumers.len() <= 1, "the first one is still in the group: {consumers:?}");
    second.signal(Signal::CONT);
    second.wait_for_event("reads_alone", |_| true).await;
    client.add("a", 1).await;
    lab.await_value("a", 1_001).await;
    // All that the first one settled it has moved over: nothing comes again.
    assert_eq!(second.count("redelivered entries were recognised"), 0);
    assert_eq!(lab.in_ledger().await, 1_001);
}

#[tokio::test(flavor = "multi_thread")]
async fn until_empty_waits_for_as_long_as_the_one_who_reads_alone_gets_on() {
    let lab = Lab::new().await;
    for statement in [
        "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.3); return null; end $$",
        "create trigger slow after insert on public.counters execute function slow()",
    ] {
        lab.execute(statement).await;
    }
    let mut command = lab.unhurried(lab.exclusive(&["run"]));
    command
        .env("TIDEGATE__BATCH__MAX_ENTRIES", "10")
        .env("TIDEGATE__BATCH__READ_COUNT", "10")
        .env("TIDEGATE__EXCLUSIVE__LEASE", "5m");
    let mut reader = Daemon::start(command);
    reader.wait_for_event("reads_alone", |_| true).await;
    let mut client = lab.client().await;
    client.add_many("a", 200).await;
    let standing_by = ["run", "--until-empty", "--timeout", "4s"];
    let began = std::time::Instant::now();
    let (code, _, stderr) = output(&mut lab.exclusive(&standing_by)).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.value("a").await, Some(200));
    assert!(began.elapsed() > std::time::Duration::from_secs(5), "the table was too fast to show anything");
    // And no longer: entries that come all the time are no progress.
    reader.signal(Signal::STOP);
    let adding = tokio::spawn(async move {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(20));
        loop {
            tick.tick().await;
            client.add("a", 1).await;
        }
    });
    let (code, _, stderr) = output(&mut lab.exclusive(&standing_by)).await;
    adding.abort();
    reader.signal(Signal::CONT);
    assert_eq!(code, 75, "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_reader_is_killed_another_one_takes_over_when_the_lease_runs_out() {
    let lab = Lab::new().await;
    let mut first = daemon(&lab);
    first.wait_for_event("reads_alone", |_| true).await;
    let mut second = daemon(&lab);
    second.wait_for_event("lease_waits", |_| true).await;
    let mut client = lab.client().await;
    client.add_many("a", 1_000).await;
    lab.await_value("a", 1_000).await;
    first.kill().await;
    client.add_many("a", 1_000).await;
    second.wait_for_event("lease_held", |_| true).await;
    lab.await_value("a", 2_000).await;
    lab.await_no_lag().await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 2_000);
    // It reads as a member of the group until it is sure that no entry kills its readers, then alone again.
    second.wait_for_event("reads_alone", |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_that_wakes_up_with_another_in_its_place_doubles_nothing_and_moves_nothing() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut first = daemon_through(&lab, None, Some(&proxy));
    first.wait_for_event("reads_alone", |_| true).await;
    let held = proxy.trap(Way::ToServer, b"marked", Then::Hold);
    let mut client = lab.client().await;
    client.add_many("marked", 50).await;
    within_limit("the flush", held).await.expect("sprung");
    first.signal(Signal::STOP);
    let mut second = Daemon::start(lab.unhurried(lab.exclusive(&["run"])));
    lab.await_value("marked", 50).await;
    lab.await_no_lag().await;
    let position = lab.group("last-delivered-id").await;
    first.signal(Signal::CONT);
    proxy.release(Way::ToServer);
    first.wait_for("redelivered entries were recognised").await;
    first.wait_for_event("displaced", |_| true).await;
    assert_eq!(lab.group("last-delivered-id").await, position);
    client.add("marked", 1).await;
    lab.await_value("marked", 51).await;
    assert_eq!((lab.in_ledger().await, second.count("flushing is")), (51, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_both_believe_to_hold_the_lease_double_nothing() {
    let lab = Lab::new().await;
    let daemon = || Daemon::start(lab.unhurried(lab.exclusive(&["run"])));
    let mut daemons = [daemon(), daemon()];
    let mut client = lab.client().await;
    for round in 1..=20 {
        // The one loses it without knowing, the other takes it at once.
        client.call(&["DEL", LEASE]).await;
        client.add_many("a", 500).await;
        lab.await_value("a", 500 * round).await;
    }
    lab.await_no_lag().await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 10_000);
    for daemon in &mut daemons {
        assert_eq!(daemon.count("flushing is"), 0, "{}", daemon.last_lines());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_rewound_or_destroyed_is_read_again_and_nothing_counts_twice() {
    let lab = Lab::new().await;
    let mut daemon = daemon(&lab);
    let mut client = lab.client().await;
    client.add_many("a", 500).await;
    for round in 1..=3 {
        lab.await_value("a", 499 + round).await;
        lab.await_no_lag().await;
        daemon.forget();
        let (command, name) = if round == 2 { ("DESTROY", GROUP) } else { ("SETID", GROUP) };
        let end: &[&str] = if round == 2 { &[] } else { &["0"] };
        client.call(&[&["XGROUP", command, STREAM, name], end].concat()).await;
        // Nothing is added: it is found by looking.
        daemon.wait_for("redelivered entries were recognised").await;
        client.add("a", 1).await;
    }
    lab.await_value("a", 503).await;
    lab.await_no_lag().await;
    assert_eq!(lab.in_ledger().await, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_turns_from_one_way_to_the_other_and_back_while_it_runs() {
    let lab = Lab::new().await;
    let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
    let configure = |delivery: &str| {
        let text = format!("[pipelines.counters]\ndelivery = {delivery:?}\n");
        std::fs::write(file.path(), text).expect("written");
    };
    configure("group");
    let path = file.path().to_str().expect("text").to_owned();
    let mut daemon = Daemon::start(as_configured(&lab, &["run", "--config", &path]));
    // A SIGHUP before it listens for one would end it.
    daemon.wait_for("running").await;
    let mut client = lab.client().await;
    let mut total = 0;
    for delivery in ["exclusive", "group", "exclusive", "group"] {
        client.add_many("a", 3_000).await;
        total += 3_000;
        configure(delivery);
        daemon.forget();
        daemon.signal(Signal::HUP);
        client.add_many("a", 3_000).await;
        total += 3_000;
        daemon.wait_for_event("reloaded", |_| true).await;
        if delivery == "exclusive" {
            daemon.wait_for_event("reads_alone", |_| true).await;
        }
        lab.await_value("a", total).await;
    }
    lab.assert_settled().await;
    lab.await_no_lag().await;
    assert_eq!(lab.in_ledger().await, total);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_member_of_the_group_held_is_settled_before_anything_is_read_alone() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    client.add_many("older", 10).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    client.add_many("newer", 10).await;
    let mut daemon = daemon(&lab);
    lab.await_value("newer", 10).await;
    daemon.wait_for_event("reads_alone", |_| true).await;
    assert_eq!(lab.value("older").await, Some(10));
    assert_eq!(lab.pending().await, 0);
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_of_both_ways_on_one_stream_are_exact_and_the_last_one_reads_alone() {
    let lab = Lab::new().await;
    let mut member = Daemon::start(as_configured(&lab, &["run"]));
    member.wait_for("created the consumer group").await;
    let consumers = async || lab.client().await.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await.array().len();
    eventually("it reads", 1, consumers).await;
    let mut alone = daemon(&lab);
    alone.wait_for_event("lease_held", |_| true).await;
    let mut client = lab.client().await;
    client.add_many("a", 5_000).await;
    lab.await_value("a", 5_000).await;
    assert_eq!(alone.count("reading alone, from"), 0, "while another consumer is at work");
    member.signal(Signal::TERM);
    assert!(member.exit().await.success());
    alone.wait_for_event("reads_alone", |_| true).await;
    client.add_many("a", 5_000).await;
    // A member joins while one reads alone.
    let mut member = Daemon::start(as_configured(&lab, &["run"]));
    member.wait_for("running").await;
    for round in 1..=20 {
        client.add_many("a", 200).await;
        lab.await_value("a", 10_000 + 200 * round).await;
    }
    alone.wait_for_event("displaced", |_| true).await;
    lab.assert_settled().await;
    lab.await_no_lag().await;
    assert_eq!(lab.in_ledger().await, 14_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_kills_whoever_reads_it_is_found_and_buried() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let start = || {
        let mut command = lab.exclusive(&["run"]);
        command.env("VALKEY_URL", proxy.url()).env("TIDEGATE__RECLAIM__MAX_DELIVERIES", "6");
        Daemon::start(command)
    };
    let mut client = lab.client().await;
    let mut daemon = start();
    daemon.wait_for_event("reads_alone", |_| true).await;
    // Once by the one that reads alone, once as fresh, then by those that claim it.
    for life in 0..7 {
        let read = proxy.trap(Way::ToClient, b"deadly", Then::Hold);
        if life == 0 {
            // No counter of this name, which whoever looks at keys would meet as well.
            client.call(&["XADD", STREAM, "*", "id", "deadly", "amount", "1"]).await;
            client.add("good", 1).await;
        } else {
            daemon = start();
        }
        within_limit("the entry", read).await.expect("sprung");
        daemon.kill().await;
        proxy.cut();
        proxy.heal();
        // For as long as it may be alive, others are cautious anyhow.
        eventually("its consumer is gone", true, async || idle_consumers(&lab).await).await;
    }
    let mut daemon = start();
    let buried = "select count(*) from tidegate.dead_letters where reason = 'kills_the_process'";
    eventually("buried", 1, async || lab.number(buried).await).await;
    lab.await_value("good", 1).await;
    assert_eq!(lab.value("deadly").await, None);
    daemon.wait_for_event("reads_alone", |_| true).await;
    client.add("good", 1).await;
    lab.await_value("good", 2).await;
}

/// Whether all consumers have been silent for longer than `reclaim.gone_after`.
async fn idle_consumers(lab: &Lab) -> bool {
    let consumers = lab.client().await.call(&["XINFO", "CONSUMERS", STREAM, GROUP]).await.array();
    let idle = |fields: Vec<Resp>| {
        let at = fields.iter().position(|name| *name == Resp::Text("idle".into()))?;
        fields[at + 1].int()
    };
    consumers.into_iter().map(Resp::array).all(|fields| idle(fields).is_some_and(|ms| ms > 700))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_keeps_nobody_from_reading_alone() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 1_000).await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let mut daemon = daemon(&lab);
    daemon.wait_for_event("reads_alone", |_| true).await;
    lab.await_value("a", 1_000).await;
    lab.await_no_lag().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_refuses_an_entry_gets_all_others_and_the_position_goes_on() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut command = lab.exclusive(&["run"]);
    command.env("TIDEGATE__RUN__WORKERS", "2");
    let _daemon = Daemon::start(command);
    let mut client = lab.client().await;
    for round in 0..50 {
        client.add("good", 1).await;
        client.add(if round == 20 { "bad" } else { "fine" }, if round == 20 { 1_000 } else { 1 }).await;
    }
    lab.await_value("good", 50).await;
    lab.await_value("fine", 49).await;
    eventually("buried", 1, async || lab.number("select count(*) from tidegate.dead_letters").await).await;
    lab.await_no_lag().await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_from_now_on_brings_again_what_was_settled_and_not_moved_over() {
    let lab = Lab::new().await;
    let (valkey, postgres) = (Proxy::start(lab.valkey.port()).await, Proxy::start(lab.postgres_port()).await);
    let mut reader = daemon_through(&lab, Some(&valkey), Some(&postgres));
    reader.wait_for_event("reads_alone", |_| true).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    lab.await_no_lag().await;
    let flush = postgres.trap(Way::ToServer, b"marked", Then::Hold);
    client.add("marked", 1).await;
    within_limit("the flush", flush).await.expect("sprung");
    // The move of the position will wait in the network.
    let script = valkey.trap(Way::ToServer, b"XGROUP", Then::Hold);
    within_limit("a look at the position", script).await.expect("sprung");
    postgres.release(Way::ToServer);
    lab.await_value("marked", 1).await;
    // PostgreSQL is as it was before.
    lab.execute("delete from public.counters where id = 'marked'; delete from tidegate.ledger where upper(ids) > (select min(upper(ids)) from tidegate.ledger)").await;
    let mut replay = lab.exclusive(&["replay", "--since", "0s", "--yes"]);
    let (code, stdout, stderr) = output(&mut replay).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    valkey.release(Way::ToServer);
    lab.await_value("marked", 1).await;
    lab.await_no_lag().await;
    assert_eq!((lab.value("a").await, lab.in_ledger().await), (Some(1), 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_one_flush_at_a_time_batches_land_in_the_order_of_the_stream() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint covered check (value >= 0)").await;
    let mut client = lab.client().await;
    // Each withdrawal is covered by what was paid in before it, and by nothing else.
    let pair = |n: usize| {
        let amount = (n % 7 + 1).to_string();
        [["+", &amount].concat(), ["-", &amount].concat()]
    };
    let commands: Vec<[String; 7]> = (0..3_000)
        .flat_map(pair)
        .map(|amount| {
            ["XADD", STREAM, "*", "id", "balance", "amount", amount.trim_start_matches('+')].map(str::to_owned)
        })
        .collect();
    client.pipeline(&commands).await;
    let mut command = lab.exclusive(&["run", "--until-empty"]);
    command.env("TIDEGATE__RUN__WORKERS", "1").env("TIDEGATE__BATCH__READ_COUNT", "7");
    command.env("TIDEGATE__BATCH__MAX_ENTRIES", "21");
    let mut daemon = Daemon::start(command);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
    assert_eq!((lab.value("balance").await, lab.in_ledger().await), (Some(0), 6_000));
}
