//! What the daemon tells of itself: events that programs read, and lines that people read.

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Daemon, Lab, eventually};
use crate::proxy::Proxy;

fn number(event: &Value, field: &str) -> u64 {
    event[field].as_u64().unwrap_or_else(|| panic!("{field} in {event}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_event_of_a_run_has_the_final_counts() {
    let lab = Lab::new().await;
    lab.client().await.add_many("a", 5_000).await;
    let mut daemon = Daemon::start(lab.program(&["run", "--until-empty"]));
    let event = daemon.wait_for_event("metrics", |_| true).await;
    assert_eq!(
        (&event["pipeline"], &event["stream"], &event["table"]),
        (&"counters".into(), &"flush:counters".into(), &"public.counters".into(),)
    );
    let of = |field| number(&event, field);
    assert_eq!((of("applied"), of("recognised"), of("buried"), of("lost_unflushed")), (5_000, 0, 0, 0), "{event}");
    assert_eq!((of("undelivered"), of("pending"), of("age_ms")), (0, 0, 0), "{event}");
    assert!((1..=of("flushes")).contains(&of("rows")), "{event}");
    assert!(daemon.exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgresql_is_away_the_backlog_and_its_age_are_told() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    proxy.cut();
    eventually("sessions", 0, async || lab.sessions().await).await;
    client.add_many("a", 10).await;
    // Not only with the last counts: again and again.
    let stuck = |event: &Value| event["failing_workers"] == 1 && event["age_ms"].as_u64() > Some(11_000);
    let event = daemon.wait_for_event("metrics", stuck).await;
    assert_eq!(number(&event, "undelivered") + number(&event, "pending"), 10, "{event}");
    proxy.heal();
    lab.await_value("a", 11).await;
    daemon.signal(Signal::TERM);
    let event = daemon.wait_for_event("metrics", |event| event["applied"] == 11).await;
    assert_eq!((number(&event, "pending"), number(&event, "failing_workers")), (0, 0), "{event}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_valkey_cannot_be_asked_the_last_known_backlog_is_told_with_its_age() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    proxy.cut();
    // Not only with the last counts: again and again.
    let event = daemon.wait_for_event("metrics", |event| event["backlog_read_ms_ago"].as_u64() > Some(15_000)).await;
    assert_eq!(event["applied"], 1, "{event}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_every_worker_meets_is_told_once_with_the_pipeline_the_stream_and_the_table() {
    let lab = Lab::new().await;
    let (valkey, postgres) = (Proxy::start(lab.valkey.port()).await, Proxy::start(lab.postgres_port()).await);
    let mut command = lab.program(&["run"]);
    command
        .env("TIDEGATE__RUN__WORKERS", "4")
        .env("TIDEGATE__BATCH__MAX_ENTRIES", "10")
        .env("TIDEGATE__BATCH__READ_COUNT", "10");
    command.env("VALKEY_URL", valkey.url());
    command.env("DATABASE_URL", lab.database.replace(&lab.postgres_port().to_string(), &postgres.port().to_string()));
    let mut daemon = Daemon::start(command);
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;

    // Four workers, each with a batch that it cannot flush.
    postgres.cut();
    client.add_many("a", 1_000).await;
    let line = daemon.wait_for_event("interrupted", |_| true).await;
    let of = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        [of("pipeline"), of("stream"), of("table")],
        ["counters", "flush:counters", "public.counters"],
        "{line}"
    );
    daemon.wait_for_event("metrics", |event| event["failing_workers"] == 4).await;
    assert_eq!(daemon.count("flushing is interrupted"), 1, "{}", daemon.last_lines());
    postgres.heal();
    lab.await_value("a", 1_001).await;

    valkey.cut();
    daemon.wait_for("reading is interrupted").await;
    daemon.wait_for_event("metrics", |event| event["backlog_read_ms_ago"].as_u64() > Some(3_000)).await;
    assert_eq!(daemon.count("reading is interrupted"), 1, "{}", daemon.last_lines());
    valkey.heal();
    let resumed = |event: &Value| event["message"] == "reading goes on";
    daemon.wait_for_event("resumed", resumed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_says_which_servers_it_uses_and_no_password() {
    let lab = Lab::new().await;
    lab.client().await.call(&["ACL", "SETUSER", "tide", "on", ">hunter2", "~*", "+@all"]).await;
    let mut command = lab.program(&["run", "--until-empty"]);
    command.env("VALKEY_URL", lab.valkey.url().replace("valkey://", "valkey://tide:hunter2@"));
    let mut daemon = Daemon::start(command);
    let line = daemon.wait_for_event("running", |_| true).await;
    assert!(line["valkey"].as_str().is_some_and(|url| url.contains(&lab.valkey.port().to_string())), "{line}");
    assert!(line["postgres"].as_str().is_some_and(|url| url.contains(&lab.postgres_port().to_string())), "{line}");
    assert!(daemon.exit().await.success());
    assert!(!daemon.last_lines().contains("hunter2"));
}
