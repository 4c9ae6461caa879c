//! `tidegate status`: the verdict, in good times and in outages.

use serde_json::Value;

use crate::contract::document;
use crate::harness::{GROUP, Lab, STREAM, database, eventually, free_port, output};
use crate::proxy::Proxy;

async fn status(lab: &Lab) -> (i32, Value) {
    document(lab, "status", &["status"]).await
}

fn reasons(status: &Value) -> Vec<String> {
    let reasons = status["reasons"].as_array().expect("a list");
    reasons.iter().map(|reason| reason["code"].as_str().expect("a code").to_owned()).collect()
}

/// Waits until the status has this code, or until it has it no longer.
async fn await_reason(lab: &Lab, code: &str, present: bool) -> Value {
    let last = std::sync::Mutex::new(Value::Null);
    eventually(code, present, async || {
        let found = status(lab).await.1;
        let has = reasons(&found).iter().any(|reason| reason == code);
        *last.lock().expect("unpoisoned") = found;
        has
    })
    .await;
    last.into_inner().expect("unpoisoned")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_flushes_is_well_and_shows_what_it_has_done() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    lab.client().await.add_many("a", 50).await;
    lab.await_value("a", 50).await;
    let found = await_reason(&lab, "no_daemon", false).await;
    eventually("pending", 0, async || lab.pending().await).await;
    // The daemon says anew what it has done, every few seconds.
    eventually("applied", 50, async || {
        status(&lab).await.1["pipelines"][0]["streams"][0]["processes"][0]["applied"].as_u64().unwrap_or(0)
    })
    .await;
    let (code, now) = status(&lab).await;
    assert_eq!((code, &now["verdict"]["state"], &now["verdict"]["flushing"]), (0, &"ok".into(), &true.into()), "{now}");
    assert_eq!(now["verdict"]["sentence"], "OK: flushing; nothing waits");
    let stream = &now["pipelines"][0]["streams"][0];
    assert_eq!(
        (&stream["backlog"], &stream["length"], &stream["dead_letters"]),
        (&0.into(), &50.into(), &0.into()),
        "{stream}"
    );
    assert_eq!(stream["ledger_entries"], 50);
    assert_eq!(stream["processes"][0]["state"], "flowing", "{found}");
    assert!(stream["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    if std::env::var("TIDEGATE_TEST_DELIVERY").is_err() {
        assert_eq!(stream["consumers"][0]["alive"], true);
    }
    // Who leaves says so, and is not missed for longer.
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.exit().await.success());
    let (code, now) = status(&lab).await;
    assert_eq!((code, reasons(&now)), (4, vec!["no_daemon".to_owned()]), "{now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_there_yet_is_told_and_no_failure() {
    let lab = Lab::new().await;
    let (code, now) = status(&lab).await;
    assert_eq!((code, reasons(&now)), (4, vec!["no_daemon".to_owned()]), "{now}");
    let stream = &now["pipelines"][0]["streams"][0];
    assert_eq!(
        (&stream["exists"], &stream["group_exists"], &stream["backlog"]),
        (&false.into(), &false.into(), &0.into())
    );
    // Entries without a group are all behind.
    lab.client().await.add_many("a", 7).await;
    let (_, now) = status(&lab).await;
    let stream = &now["pipelines"][0]["streams"][0];
    assert_eq!(
        (&stream["exists"], &stream["group_exists"], &stream["backlog"]),
        (&true.into(), &false.into(), &7.into())
    );
    assert!(now["verdict"]["sentence"].as_str().is_some_and(|s| s.contains("7 entries behind")), "{now}");
    let unmigrated = Lab { database: database(false).await, ..lab };
    let (code, now) = status(&unmigrated).await;
    assert_eq!(code, 4);
    assert!(reasons(&now).contains(&"not_migrated".to_owned()), "{now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backlog_is_right_where_the_server_cannot_tell_it() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut ids = Vec::new();
    for n in 0..20 {
        ids.push(client.add(&format!("k{n}"), 1).await);
    }
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "c", "COUNT", "5", "STREAMS", STREAM, ">"]).await;
    client.call(&["XACK", STREAM, GROUP, &ids[0]]).await;
    // In the middle of what is not read: from here on the server does not know the lag.
    client.call(&["XDEL", STREAM, &ids[10]]).await;
    assert_eq!(lab.group("lag").await, crate::harness::Resp::Nil, "this server cannot tell");
    let (_, now) = status(&lab).await;
    let stream = &now["pipelines"][0]["streams"][0];
    assert_eq!(
        (&stream["undelivered"], &stream["pending"], &stream["backlog"]),
        (&14.into(), &4.into(), &18.into()),
        "{stream}"
    );
    assert_eq!(stream["backlog_is_exact"], true);
    // After a trim in front of it.
    client.call(&["XTRIM", STREAM, "MINID", &ids[7]]).await;
    let (_, now) = status(&lab).await;
    assert_eq!(now["pipelines"][0]["streams"][0]["undelivered"], 12, "{now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_postgresql_is_told_with_what_waits_and_why() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    proxy.cut();
    lab.client().await.add_many("a", 30).await;
    daemon.wait_for("flushing is interrupted").await;
    // Seen through PostgreSQL's own door, which is open: the daemon alone knows.
    let now = await_reason(&lab, "interrupted", true).await;
    let sentence = now["verdict"]["sentence"].as_str().expect("a sentence").to_owned();
    assert!(sentence.starts_with("DEGRADED: not flushing; ") && sentence.contains("behind, the oldest"), "{sentence}");
    assert!(sentence.contains("Why: counters interrupted for") && sentence.contains("Next: "), "{sentence}");
    // And seen by somebody who cannot reach it either.
    let mut command = lab.program(&["status", "--output", "json"]);
    command.env("DATABASE_URL", lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string()));
    let (code, stdout, _) = output(&mut command).await;
    let now: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(
        (code, &now["postgres"]["reachable"], &now["valkey"]["reachable"]),
        (4, &false.into(), &true.into()),
        "{now}"
    );
    assert!(reasons(&now).contains(&"postgres_unavailable".to_owned()), "{now}");
    assert!(now["verdict"]["at_risk"].as_u64().is_some_and(|entries| entries >= 30), "{now}");
    proxy.heal();
    lab.await_value("a", 31).await;
    await_reason(&lab, "interrupted", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_valkey_is_told_with_what_postgresql_knows() {
    let lab = Lab::new().await;
    lab.client().await.add("a", 1).await;
    lab.settle_everything().await;
    let nobody = free_port();
    let mut command = lab.program(&["status", "--output", "json"]);
    command.env("VALKEY_URL", format!("valkey://127.0.0.1:{nobody}"));
    let (code, stdout, _) = output(&mut command).await;
    let now: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, &now["valkey"]["reachable"]), (4, &false.into()), "{now}");
    let sentence = now["verdict"]["sentence"].as_str().expect("a sentence");
    assert!(sentence.contains("the last flush was") && sentence.contains("cannot reach Valkey"), "{sentence}");
    assert_eq!(now["pipelines"][0]["streams"][0]["ledger_entries"], 1, "{now}");
    assert_eq!(now["verdict"]["at_risk"], Value::Null);
    // Nobody there at all: 69, and the words all the same.
    command.env("DATABASE_URL", format!("postgres://postgres@127.0.0.1:{nobody}/none"));
    let (code, stdout, _) = output(&mut command).await;
    let now: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, &now["verdict"]["state"]), (69, &"down".into()), "{now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_pipeline_says_why_and_what_to_do() {
    let lab = Lab::new().await;
    let _daemon = lab.daemon();
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    lab.execute("alter table public.counters rename to elsewhere").await;
    lab.client().await.add("a", 1).await;
    let now = await_reason(&lab, "halted", true).await;
    let sentence = now["verdict"]["sentence"].as_str().expect("a sentence");
    assert!(
        sentence.contains("halted for") && sentence.contains("42P01") && sentence.contains("tidegate migrate"),
        "{sentence}"
    );
    lab.execute("alter table public.elsewhere rename to counters").await;
    lab.await_value("a", 2).await;
    await_reason(&lab, "halted", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_may_not_say_how_it_is_flushes_all_the_same() {
    let lab = Lab::new().await;
    let rules = ["ACL", "SETUSER", "mute", "on", ">secret", "resetkeys", "~flush:*", "~tidegate:lease:*", "+@all"];
    lab.client().await.call(&rules).await;
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", lab.valkey.url().replace("valkey://", "valkey://mute:secret@"));
    let mut daemon = crate::harness::Daemon::start(command);
    daemon.wait_for("this process cannot say how it is").await;
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    assert_eq!(daemon.count("this process cannot say how it is"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_was_killed_is_seen_no_more_at_once() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    daemon.wait_for("created the consumer group").await;
    await_reason(&lab, "no_daemon", false).await;
    daemon.kill().await;
    await_reason(&lab, "no_daemon", true).await;
    let (_, now) = status(&lab).await;
    assert_eq!(now["pipelines"][0]["streams"][0]["processes"], serde_json::json!([]), "{now}");
}
