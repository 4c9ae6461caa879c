//! `tidegate pause`, `resume` and `wait`.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::admin::Admin;
use crate::contract::document;
use crate::harness::{Daemon, GROUP, Lab, STREAM, eventually, output};

async fn verb(lab: &Lab, schema: &str, arguments: &[&str]) -> (i32, Value) {
    document(lab, schema, arguments).await
}

/// Whether nothing is flushed while this is so: what was added stays behind, as the daemon shows by what it does next.
async fn assert_stands(lab: &Lab, key: &str, value: Option<i64>) {
    let (code, waited) = verb(lab, "wait", &["wait", "--timeout", "700ms"]).await;
    assert_eq!((code, &waited["done"]), (75, &false.into()), "{waited}");
    assert_eq!(lab.value(key).await, value);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_pipeline_reads_nothing_over_restarts_until_it_is_resumed() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    let (code, told) = verb(&lab, "pause", &["pause", "counters", "--reason", "a migration"]).await;
    let pipeline = &told["pipelines"][0];
    assert_eq!((code, &pipeline["paused"], &pipeline["was_paused"]), (0, &true.into(), &false.into()), "{told}");
    assert_eq!(pipeline["obeying"], pipeline["daemons"], "{told}");
    daemon.wait_for("paused: nothing is read").await;
    lab.client().await.add("a", 1).await;
    assert_stands(&lab, "a", Some(1)).await;
    // A stop while it is paused is a stop.
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    let mut daemon = lab.daemon();
    daemon.wait_for("running").await;
    assert_stands(&lab, "a", Some(1)).await;
    let (code, status) = verb(&lab, "status", &["status"]).await;
    let sentence = status["verdict"]["sentence"].as_str().expect("a sentence");
    assert_eq!(code, 4);
    assert!(
        sentence.contains("paused by an operator")
            && sentence.contains("a migration")
            && sentence.contains("tidegate resume counters"),
        "{sentence}"
    );
    let (code, told) = verb(&lab, "pause", &["resume", "--all"]).await;
    assert_eq!(
        (code, &told["pipelines"][0]["paused"], &told["pipelines"][0]["was_paused"]),
        (0, &false.into(), &true.into()),
        "{told}"
    );
    lab.await_value("a", 2).await;
    lab.assert_settled().await;
    let (_, stdout, _) = output(&mut lab.program(&["resume", "counters"])).await;
    assert_eq!(stdout, "counters: was not paused\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_ends_by_itself_when_its_time_is_over() {
    let lab = Lab::new().await;
    let _daemon = lab.daemon();
    let asked = Instant::now();
    let (code, told) = verb(&lab, "pause", &["pause", "--all", "--for", "3s"]).await;
    assert_eq!(code, 0, "{told}");
    let left = told["pipelines"][0]["left_seconds"].as_f64();
    assert!(asked.elapsed().as_secs() >= 3 || left.is_some_and(|left| left > 0.0 && left <= 3.0), "{told}");
    lab.client().await.add("a", 1).await;
    let (_, before) = verb(&lab, "wait", &["wait", "--timeout", "200ms"]).await;
    assert!(asked.elapsed().as_secs() >= 3 || before["done"] == false, "{before}");
    lab.await_value("a", 1).await;
    assert!(asked.elapsed().as_secs() >= 3, "it has flushed after {:?}", asked.elapsed());
    let (code, stdout, stderr) = output(&mut lab.program(&["pause", "counters", "--for", "0s"])).await;
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pipeline_is_paused_and_the_other_flows_and_reading_alone_is_paused_too() {
    let lab = Lab::new().await;
    lab.execute("create table public.others (like public.counters including all)").await;
    let configured = |arguments: &[&str]| {
        let mut command = lab.exclusive(arguments);
        command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
        command.env("TIDEGATE__PIPELINES__OTHERS__STREAM", "flush:others");
        command.env("TIDEGATE__PIPELINES__OTHERS__TABLE", "public.others");
        command
    };
    let mut daemon = Daemon::start(configured(&["run"]));
    daemon.wait_for("reading alone").await;
    let (code, stdout, stderr) = output(&mut configured(&["pause", "counters"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    lab.client().await.add("a", 1).await;
    lab.client().await.call(&["XADD", "flush:others", "*", "id", "b", "amount", "1"]).await;
    let others = || async { lab.number("select coalesce(sum(value), 0)::bigint from public.others").await };
    crate::harness::eventually("the other one", 1, others).await;
    let (code, _, stderr) = output(&mut configured(&["wait", "--pipeline", "counters", "--timeout", "10s"])).await;
    assert_eq!((code, lab.value("a").await), (75, None), "{stderr}");
    assert!(stderr.contains("waiting for counters: it is paused"), "{stderr}");
    assert_eq!(output(&mut configured(&["resume", "counters"])).await.0, 0);
    lab.await_value("a", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_barrier_returns_when_what_was_there_is_durable_although_more_comes() {
    let lab = Lab::new().await;
    // Nothing there at all.
    let (code, waited) = verb(&lab, "wait", &["wait"]).await;
    assert_eq!((code, &waited["done"]), (0, &true.into()), "{waited}");
    let mut client = lab.client().await;
    client.add_many("a", 500).await;
    let _daemon = lab.daemon();
    let (code, waited) = verb(&lab, "wait", &["wait"]).await;
    assert_eq!((code, &waited["done"], lab.value("a").await), (0, &true.into(), Some(500)), "{waited}");
    // Up to an id, with what follows it pending at somebody who never settles it.
    let last = client.add("a", 1).await;
    lab.await_value("a", 501).await;
    let (code, waited) = verb(&lab, "wait", &["wait", "--up-to", &last]).await;
    assert_eq!((code, &waited["streams"][0]["up_to"]), (0, &Value::from(last.as_str())), "{waited}");
    let (code, _, stderr) = output(&mut lab.program(&["wait", "--up-to", "yesterday"])).await;
    assert_eq!(code, 2, "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_barrier_does_not_take_what_is_pending_or_deleted_for_durable() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "somebody", "STREAMS", STREAM, ">"]).await;
    let (code, waited) = verb(&lab, "wait", &["wait", "--timeout", "100ms"]).await;
    assert_eq!((code, &waited["done"]), (75, &false.into()), "read, and not settled: {waited}");
    // The last entry was deleted: nobody will ever deliver it, and nobody waits for it.
    let last = client.add("b", 1).await;
    client.call(&["XDEL", STREAM, &last]).await;
    lab.settle_everything().await;
    let (code, waited) = verb(&lab, "wait", &["wait", "--timeout", "5s"]).await;
    assert_eq!((code, &waited["done"]), (0, &true.into()), "{waited}");
    assert!(waited["waited_ms"].as_u64().is_some_and(|ms| ms < Duration::from_secs(4).as_millis() as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_is_a_metric_so_that_no_alert_takes_it_for_a_fault() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("running", |_| true).await;
    let scrape = admin.scrape().await;
    let of = |name: &str| scrape.sum(name, &[("pipeline", "counters")]);
    assert_eq!((of("tidegate_paused"), of("tidegate_workers_failing")), (Some(0.0), Some(0.0)), "from the start");
    for (verb_line, expected) in [(&["pause", "counters"][..], 1.0), (&["resume", "counters"], 0.0)] {
        assert_eq!(verb(&lab, "pause", verb_line).await.0, 0);
        eventually("the metric", Some(expected), async || admin.scrape().await.sum("tidegate_paused", &[])).await;
    }
}
