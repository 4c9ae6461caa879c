//! A task that panics: the program has a bug, and nobody may have to notice by what is missing. `make panics` builds the program with failpoints for it.

use serde_json::Value;
use tokio::process::Command;

use crate::admin::Admin;
use crate::harness::{Client, Daemon, GROUP, Lab, STREAM, eventually};

/// So many increments each time.
const ENTRIES: usize = 60;

/// A daemon that panics at this point so many times, in whatever task comes there.
fn panicking(mut command: Command, point: &str, times: u32) -> Daemon {
    command.env("TIDEGATE_FAILPOINT", point).env("TIDEGATE_FAILPOINT_PANICS", times.to_string());
    command.env("TIDEGATE__BATCH__MAX_ENTRIES", "20").env("TIDEGATE__BATCH__READ_COUNT", "20");
    Daemon::start(command)
}

async fn told(daemon: &mut Daemon, event: &str) -> Value {
    daemon.wait_for_event(event, |_| true).await
}

/// Every increment so far is in its row, once, and nothing is pending; the daemon is the one that was started, and stops well.
async fn all_landed_and_it_still_works(lab: &Lab, mut daemon: Daemon, point: &str) {
    let panicked = told(&mut daemon, "panicked").await;
    assert!(panicked["at"].as_str().is_some_and(|at| at.starts_with("src/failpoint.rs:")), "{point}: {panicked}");
    let died = told(&mut daemon, "task_died").await;
    assert!(died["deaths"].as_u64().is_some_and(|deaths| deaths <= 3), "{point}: {died}");
    lab.await_value("a", ENTRIES as i64).await;
    let counted = Admin::of(&mut daemon).await.scrape().await.sum("tidegate_panics_total", &[]);
    assert!(counted >= Some(1.0), "{point}: {counted:?}");
    // Behind the last panic it works like any other.
    lab.client().await.add_many("a", ENTRIES).await;
    lab.await_value("a", 2 * ENTRIES as i64).await;
    lab.assert_settled().await;
    daemon.signal(rustix::process::Signal::TERM);
    let status = daemon.exit().await;
    assert_eq!(status.code(), Some(0), "{point}: {}", daemon.last_lines());
    assert_eq!(lab.value("a").await, Some(2 * ENTRIES as i64), "{point}");
}

async fn group_at_the_start(client: &mut Client) {
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_a_worker_panics_it_is_started_again_and_everything_counts_once() {
    for point in ["read.sent", "flush.parsed", "flush.sent", "flush.committed", "ack.sent", "ack.chunk"] {
        let lab = Lab::new().await;
        lab.client().await.add_many("a", ENTRIES).await;
        let daemon = panicking(lab.program(&["run"]), point, 3);
        all_landed_and_it_still_works(&lab, daemon, point).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_inside_a_transaction_leaves_nothing_of_it() {
    for point in ["careful.begun", "careful.judged", "careful.upserted", "careful.commit"] {
        let lab = Lab::new().await;
        let mut client = lab.client().await;
        client.add_many("a", ENTRIES).await;
        // What is reclaimed is judged entry by entry, in a transaction of several statements.
        group_at_the_start(&mut client).await;
        client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
        let daemon = panicking(lab.program(&["run"]), point, 3);
        all_landed_and_it_still_works(&lab, daemon, point).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_who_reads_alone_panics_it_begins_again_and_everything_counts_once() {
    // The keeper of the leases, the holder, a settler, and who moves the position.
    for point in ["lease.taken", "alone.begins", "alone.read", "flush.committed", "position.sent", "position.moved"] {
        let lab = Lab::new().await;
        group_at_the_start(&mut lab.client().await).await;
        lab.client().await.add_many("a", ENTRIES).await;
        let daemon = panicking(lab.exclusive(&["run"]), point, 3);
        all_landed_and_it_still_works(&lab, daemon, point).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caretaker_that_panics_is_started_again_and_the_stream_is_trimmed() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__TRIM__RETENTION", "0s");
    lab.client().await.add_many("a", ENTRIES).await;
    let mut daemon = panicking(command, "trim.raised", 3);
    let died = daemon.wait_for_event("task_died", |event| event["deaths"] == 3).await;
    assert_eq!(died["task"], format!("caretaker of {STREAM}"));
    lab.await_value("a", ENTRIES as i64).await;
    let mut client = lab.client().await;
    eventually("trimmed", true, async || client.call(&["XLEN", STREAM]).await.int() <= Some(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_panics_always_ends_the_process_and_another_one_settles_what_it_held() {
    for (point, command) in
        [("read.sent", Lab::program as fn(&Lab, &[&str]) -> Command), ("lease.taken", Lab::exclusive)]
    {
        let lab = Lab::new().await;
        group_at_the_start(&mut lab.client().await).await;
        lab.client().await.add_many("a", ENTRIES).await;
        let mut daemon = panicking(command(&lab, &["run"]), point, u32::MAX);
        daemon.wait_for_event("task_died", |event| event["deaths"] == 10).await;
        let status = daemon.exit().await;
        assert_eq!(status.code(), Some(1), "{point}: {}", daemon.last_lines());
        daemon.wait_for("a task died too often in a row").await;
        assert_eq!(lab.value("a").await, None, "{point}");
        lab.settle_everything().await;
        assert_eq!(lab.value("a").await, Some(ENTRIES as i64), "{point}");
        lab.assert_settled().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workers_of_one_pipeline_that_die_take_the_process_with_them_although_another_pipeline_is_well() {
    let lab = Lab::new().await;
    lab.execute("create table public.others (like public.counters including all)").await;
    let mut command = lab.program(&["run"]);
    for (key, value) in [("STREAM", "flush:others"), ("TABLE", "public.others"), ("COUNTER_PREFIX", "other:")] {
        command.env(format!("TIDEGATE__PIPELINES__OTHERS__{key}"), value);
    }
    command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
    // Only the pipeline that has fresh entries comes to the point.
    let mut daemon = panicking(command, "flush.parsed", u32::MAX);
    let mut client = lab.client().await;
    let producing = async {
        loop {
            client.add("a", 1).await;
        }
    };
    tokio::select! {
        _ = daemon.wait_for_event("task_died", |event| event["deaths"] == 10) => {}
        () = producing => {}
    }
    let status = daemon.exit().await;
    assert_eq!(status.code(), Some(1), "{}", daemon.last_lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_daemons_own_task_ends_it_with_a_line_and_a_code() {
    let lab = Lab::new().await;
    lab.client().await.add_many("a", ENTRIES).await;
    let mut daemon = panicking(lab.program(&["run"]), "presence.said", 1);
    let status = daemon.exit().await;
    assert_eq!(status.code(), Some(1), "{}", daemon.last_lines());
    assert_eq!(told(&mut daemon, "panicked").await["thread"], "main");
    let lines = daemon.all_lines();
    assert!(lines.iter().any(|line| line.contains("tidegate run: it panicked, which is a bug")), "{lines:?}");
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(ENTRIES as i64));
}
