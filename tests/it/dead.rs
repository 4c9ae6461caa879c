//! `tidegate dead`: letters seen, applied again, given up; each counts once.

use serde_json::Value;

use crate::contract::{assert_fits, document};
use crate::harness::{Lab, STREAM, output};

const OPEN: &str = "select count(*) from tidegate.dead_letters where resolved_at is null";

/// A lab whose table has refused three increments of `refused` by a constraint, and buried one without a number.
async fn lab_with_letters() -> Lab {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut client = lab.client().await;
    client.add("good", 5).await;
    for amount in [100, 200, 300] {
        client.add("refused", amount).await;
    }
    client.call(&["XADD", STREAM, "*", "id", "bad", "amount", "1.5", "note", "\x1b[31mred"]).await;
    lab.settle_everything().await;
    assert_eq!((lab.number(OPEN).await, lab.value("good").await, lab.value("refused").await), (4, Some(5), None));
    lab
}

async fn dead(lab: &Lab, arguments: &[&str]) -> (i32, String, String) {
    output(&mut lab.program(&[&["dead"], arguments].concat())).await
}

async fn redrive(lab: &Lab, arguments: &[&str]) -> (i32, Value) {
    document(lab, "dead-redrive", &[&["dead", "redrive"], arguments].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_counted_listed_and_shown_with_every_byte() {
    let lab = lab_with_letters().await;
    let (code, list) = document(&lab, "dead-list", &["dead", "list"]).await;
    assert_eq!((code, &list["total"]), (0, &4.into()));
    assert_eq!(list["by_reason"], serde_json::json!({"bad_amount": 1, "refused_by_table": 3}));
    let (code, stdout, _) = dead(&lab, &["list", "--reason", "bad_amount"]).await;
    assert_eq!(code, 0);
    assert!(stdout.starts_with("1 dead letter: 1 bad_amount\n"), "{stdout}");
    assert!(stdout.contains("note=\\u{1b}[31mred") && !stdout.contains('\x1b'), "escaped: {stdout}");
    for (filter, expected) in [
        (&["--key", "refused"][..], 3),
        (&["--key", "nobody"], 0),
        (&["--since", "1h"], 4),
        (&["--until", "1h"], 0),
        (&["--pipeline", "other"], 0),
        (&["--stream", STREAM], 4),
        (&["--state", "resolved"], 0),
        (&["--state", "all", "--limit", "1"], 4),
    ] {
        let (_, list) = document(&lab, "dead-list", &[&["dead", "list"], filter].concat()).await;
        assert_eq!(list["total"], expected, "{filter:?}");
    }
    let letter = list["letters"].as_array().expect("a list").iter().find(|l| l["reason"] == "refused_by_table");
    let name = letter.expect("one")["letter"].as_str().expect("a name").to_owned();
    let (code, shown) = document(&lab, "dead-show", &["dead", "show", &name]).await;
    let shown = &shown["letters"][0];
    assert_eq!((code, &shown["code"], &shown["resolved_at"]), (0, &"23514".into(), &Value::Null), "{shown}");
    assert!(shown["detail"].as_str().is_some_and(|detail| detail.contains("\"small\"")), "{shown}");
    assert_eq!(shown["fields"][0], serde_json::json!({"name": {"text": "id"}, "value": {"text": "refused"}}));
    let (code, _, stderr) = dead(&lab, &["show", "1-1"]).await;
    assert_eq!(code, 65, "{stderr}");
    let (code, _, stderr) = dead(&lab, &["show", "'; drop table x"]).await;
    assert_eq!(code, 2, "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_applied_again_after_the_table_was_corrected_and_a_replay_counts_none_twice() {
    let lab = lab_with_letters().await;
    // Nothing has been corrected: it says why, and changes nothing.
    let (code, tried) = redrive(&lab, &["--all", "--yes"]).await;
    assert_eq!((code, &tried["redriven"]), (65, &0.into()), "{tried}");
    let refused = tried["refused"].as_array().expect("a list");
    let why: Vec<&str> = refused.iter().filter_map(|r| r["why"].as_str()).collect();
    assert_eq!(why.iter().filter(|why| why.contains("\"small\"")).count(), 3, "{why:?}");
    assert_eq!(why.iter().filter(|why| why.contains("bad_amount")).count(), 1, "{why:?}");
    assert_eq!((lab.number(OPEN).await, lab.value("refused").await), (4, None));

    lab.execute("alter table public.counters drop constraint small").await;
    let (code, tried) = redrive(&lab, &["--key", "refused", "--dry-run"]).await;
    assert_eq!((code, &tried["redriven"], &tried["dry_run"]), (0, &3.into(), &true.into()), "{tried}");
    assert_eq!((lab.number(OPEN).await, lab.value("refused").await), (4, None), "rolled back");
    let (code, done) = redrive(&lab, &["--all", "--yes"]).await;
    assert_eq!((code, &done["redriven"]), (65, &3.into()), "the fourth can never be applied: {done}");
    assert_eq!((lab.number(OPEN).await, lab.value("refused").await), (1, Some(600)));

    let (code, stdout, stderr) = output(&mut lab.program(&["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains(" 5  the ledger has"), "{stdout}");
    lab.settle_everything().await;
    assert_eq!((lab.value("refused").await, lab.value("good").await), (Some(600), Some(5)));
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 4, "tombstones stay");
    // Again: there is nothing left to do.
    let (code, done) = redrive(&lab, &["--key", "refused", "--yes"]).await;
    assert_eq!((code, &done["redriven"]), (0, &0.into()), "{done}");
    assert_eq!(lab.value("refused").await, Some(600));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_operators_at_once_count_each_letter_once_beside_a_daemon_that_flushes() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut client = lab.client().await;
    for n in 0..12 {
        client.add(&format!("k{}", n % 4), 100).await;
        client.add_many("good", 5).await;
    }
    lab.settle_everything().await;
    let open = lab.number(OPEN).await;
    assert_eq!(open, 12);
    lab.execute("alter table public.counters drop constraint small").await;
    let _daemon = lab.daemon();
    let start = || async { redrive(&lab, &["--all", "--yes"]).await };
    let (a, b, c, ()) = tokio::join!(start(), start(), start(), async {
        let mut client = lab.client().await;
        for n in 0..40 {
            client.add(&format!("k{}", n % 4), 1).await;
        }
    });
    for (code, account) in [&a, &b, &c] {
        assert_eq!(*code, 0, "{account}");
    }
    let redriven: i64 = [a, b, c].iter().filter_map(|(_, account)| account["redriven"].as_i64()).sum();
    assert_eq!(redriven, open);
    for key in 0..4 {
        lab.await_value(&format!("k{key}"), 310).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_lands_after_the_mapping_was_corrected() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XADD", STREAM, "*", "page", "a", "amount", "3"]).await;
    lab.settle_everything().await;
    assert_eq!(lab.number(OPEN).await, 1);
    let corrected = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE__PIPELINES__COUNTERS__KEY_FIELD", "page");
        command
    };
    // The daemon has not started with it yet: whose columns are right is not for this command to say.
    let redrive = ["dead", "redrive", "--all", "--yes"];
    let (code, _, stderr) = output(&mut corrected(&redrive)).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("Start the daemon with this configuration first"), "{stderr}");
    assert_eq!(output(&mut corrected(&["run", "--until-empty"])).await.0, 0);
    let (code, stdout, stderr) = output(&mut corrected(&redrive)).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!((lab.value("a").await, lab.number(OPEN).await), (Some(3), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_nothing_is_done_unless_it_was_agreed_to() {
    let lab = lab_with_letters().await;
    lab.execute("alter table public.counters drop constraint small").await;
    let (code, _, stderr) = dead(&lab, &["redrive"]).await;
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("--all"), "{stderr}");
    for action in ["redrive", "discard"] {
        let (code, stdout, stderr) = dead(&lab, &[action, "--all"]).await;
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(
            stderr.contains("4 dead letters: 1 bad_amount, 3 refused_by_table") && stderr.contains("add --yes"),
            "{stderr}"
        );
    }
    assert_eq!(lab.number(OPEN).await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_discarded_stays_and_can_be_opened_again() {
    let lab = lab_with_letters().await;
    let (code, found) = document(&lab, "dead-mark", &["dead", "discard", "--reason", "bad_amount", "--dry-run"]).await;
    assert_eq!((code, &found["letters"], lab.number(OPEN).await), (0, &1.into(), 4));
    let because = ["dead", "discard", "--reason", "bad_amount", "--yes", "--because", "a broken producer"];
    let (code, found) = document(&lab, "dead-mark", &because).await;
    assert_eq!((code, &found["letters"], lab.number(OPEN).await), (0, &1.into(), 3));
    let undo = found["undo"].as_str().expect("a command");
    let (_, list) = document(&lab, "dead-list", &["dead", "list", "--state", "discarded"]).await;
    assert!(list["letters"][0]["resolution"].as_str().is_some_and(|r| r.ends_with(": a broken producer")), "{list}");
    // What it says undoes it.
    let words: Vec<&str> = undo.split(' ').skip(1).collect();
    let (code, _, stderr) = output(&mut lab.program(&words)).await;
    assert_eq!((code, lab.number(OPEN).await), (0, 4), "{stderr}");
    // What was redriven cannot be opened again.
    lab.execute("alter table public.counters drop constraint small").await;
    redrive(&lab, &["--key", "refused", "--yes"]).await;
    let (_, found) = document(&lab, "dead-mark", &["dead", "reopen", "--all", "--yes"]).await;
    assert_eq!((&found["letters"], lab.number(OPEN).await), (&0.into(), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_have_been_applied_before_is_left_alone_by_every_filter() {
    let lab = lab_with_letters().await;
    lab.execute("alter table public.counters drop constraint small").await;
    lab.execute("update tidegate.dead_letters set reason = 'cannot_be_judged' where reason = 'refused_by_table'").await;
    let (code, account) = redrive(&lab, &["--key", "refused", "--yes"]).await;
    assert_eq!((code, &account["redriven"], &account["doubtful"]), (0, &0.into(), &3.into()), "{account}");
    let (_, list) = document(&lab, "dead-list", &["dead", "list", "--key", "refused"]).await;
    let one = list["letters"][0]["letter"].as_str().expect("a name");
    let (code, account) = redrive(&lab, &[one, "--accept-doubt", "--yes"]).await;
    assert_eq!((code, &account["redriven"]), (0, &1.into()), "{account}");
    let (code, _, stderr) = dead(&lab, &["redrive", "--all", "--accept-doubt", "--yes"]).await;
    assert_eq!(code, 2, "only where they are named: {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_was_shortened_or_changed_is_never_applied() {
    let lab = Lab::new().await;
    let huge = "x".repeat(5_000);
    lab.client().await.call(&["XADD", STREAM, "*", "id", "a", "amount", "7", "padding", &huge]).await;
    lab.client().await.call(&["XADD", STREAM, "*", "id", "b", "amount", "7", "padding", &huge]).await;
    let mut command = lab.program(&["run", "--until-empty"]);
    command.env("TIDEGATE__DEAD_LETTERS__MAX_BYTES", "1KiB").env("TIDEGATE__BATCH__MAX_ENTRY_BYTES", "2KiB");
    assert_eq!(output(&mut command).await.0, 65);
    lab.execute("update tidegate.dead_letters set shortened = false where fields[2] = 'b'").await;
    let (code, account) = redrive(&lab, &["--all", "--yes"]).await;
    assert_eq!((code, &account["redriven"]), (65, &0.into()), "{account}");
    let why = account["refused"].to_string();
    assert!(why.contains("only the beginning of its fields") && why.contains("not have its digest"), "{why}");
    assert_eq!((lab.value("a").await, lab.value("b").await), (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_that_dies_or_loses_its_answer_counts_once_when_it_is_repeated() {
    let lab = lab_with_letters().await;
    lab.execute("alter table public.counters drop constraint small").await;
    let proxy = crate::proxy::Proxy::start(lab.postgres_port()).await;
    // The answer to COMMIT is lost.
    let lost = proxy.trap(crate::proxy::Way::ToServer, b"COMMIT", crate::proxy::Then::Hold);
    let mut command = lab.program(&["dead", "redrive", "--key", "refused", "--yes"]);
    command.env("DATABASE_URL", lab.database.replace(&lab.postgres_port().to_string(), &proxy.port().to_string()));
    let mut child = command.spawn().expect("it runs");
    crate::harness::within_limit("COMMIT", lost).await.expect("sprung");
    child.kill().await.expect("killed");
    proxy.release(crate::proxy::Way::ToServer);
    let (code, stdout, stderr) = dead(&lab, &["redrive", "--key", "refused", "--yes", "--output", "json"]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_fits("dead-redrive", &serde_json::from_str(&stdout).expect("JSON"));
    assert_eq!((lab.value("refused").await, lab.number(OPEN).await), (Some(600), 1));
}
