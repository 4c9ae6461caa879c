//! `tidegate pending`, `tap`, `trim --dry-run` and `group`.

use serde_json::Value;

use crate::contract::{assert_fits, document};
use crate::harness::{GROUP, Lab, Resp, STREAM, output};

#[tokio::test(flavor = "multi_thread")]
async fn who_holds_what_is_told_and_for_how_long() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 5).await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "evil\x1b[31m", "COUNT", "3", "STREAMS", STREAM, ">"]).await;
    let (code, pending) = document(&lab, "pending", &["pending", "--entries"]).await;
    let stream = &pending["streams"][0];
    assert_eq!((code, &stream["entries"], &stream["consumers"][0]["entries"]), (0, &3.into(), &3.into()), "{pending}");
    assert_eq!(stream["list"].as_array().map(Vec::len), Some(3));
    assert_eq!((&stream["list"][0]["deliveries"], &stream["list"][0]["id"]), (&1.into(), &stream["oldest"]));
    let (_, stdout, _) = output(&mut lab.program(&["pending", "--entries", "--limit", "1"])).await;
    assert!(stdout.contains("evil\\u{1b}[31m") && !stdout.contains('\x1b'), "{stdout}");
    let (_, pending) = document(&lab, "pending", &["pending", "--entries", "--consumer", "nobody"]).await;
    assert_eq!(pending["streams"][0]["list"].as_array().map(Vec::len), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_go_by_are_shown_escaped_or_redacted_and_taken_from_nobody() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XADD", STREAM, "*", "id", "s\x1b[2Jecret", "amount", "5"]).await;
    client.call(&["XADD", STREAM, "*", "id", "b", "amount", "many"]).await;
    let tap = ["tap", "--after", "0-0", "--limit", "2"];
    let (code, stdout, stderr) = output(&mut lab.program(&tap)).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("id=s\\u{1b}[2Jecret  amount=5\n") && !stdout.contains('\x1b'), "{stdout}");
    assert!(stdout.contains("CANNOT BE APPLIED: the amount is not a whole decimal number"), "{stdout}");
    let (_, stdout, _) = output(lab.program(&tap).args(["--redact", "--output", "json"])).await;
    assert!(!stdout.contains("ecret"), "{stdout}");
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    lines.iter().for_each(|line| assert_fits("tap", line));
    assert_eq!(
        (lines.len(), &lines[0]["fields"][0]["bytes"], &lines[0]["fields"][0]["value"]),
        (2, &10.into(), &Value::Null)
    );
    let (_, stdout, _) = output(&mut lab.program(&["tap", "--after", "0-0", "--bad", "--limit", "1"])).await;
    assert!(stdout.contains("id=b") && stdout.lines().count() == 1, "{stdout}");
    // Faster than it may be shown: what is left out is counted.
    client.add_many("fast", 300).await;
    let (code, stdout, stderr) =
        output(lab.program(&["tap", "--after", "0-0", "--rate", "5", "--limit", "6"]).args(["--output", "json"])).await;
    assert_eq!(code, 0, "{stderr}");
    let last: Value = serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["skipped"], 302 - 5 - 5, "{last}");
    assert!(matches!(client.call(&["XINFO", "GROUPS", STREAM]).await, Resp::Array(groups) if groups.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_trimmed_is_told_and_what_holds_it_back() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let trim = async |retention: &str| {
        let mut command = lab.program(&["trim", "--dry-run", "--output", "json"]);
        let (code, stdout, stderr) = output(command.env("TIDEGATE__TRIM__RETENTION", retention)).await;
        assert_eq!(code, 0, "{stderr}");
        let told: Value = serde_json::from_str(&stdout).expect("JSON");
        assert_fits("trim", &told);
        told["streams"][0].clone()
    };
    assert!(trim("1h").await["held_by"].to_string().contains("no stream"));
    client.add_many("a", 30).await;
    lab.settle_everything().await;
    assert_eq!(trim("1h").await["entries"], 0, "younger than the retention");
    // All but the last one, at which the group stands.
    let told = trim("0s").await;
    assert_eq!((&told["entries"], &told["unknown"], &told["held_by"]), (&29.into(), &0.into(), &Value::Null), "{told}");
    // An entry that somebody acknowledged by hand.
    let id = client.add("b", 1).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "somebody", "STREAMS", STREAM, ">"]).await;
    client.call(&["XACK", STREAM, GROUP, &id]).await;
    client.add("c", 1).await;
    lab.settle_everything().await;
    let told = trim("0s").await;
    assert_eq!(told["unknown"], 1, "{told}");
    assert!(told["held_by"].to_string().contains(&format!("tidegate replay --since {id}")), "{told}");
    client.call(&["XGROUP", "CREATE", STREAM, "foreign", "0"]).await;
    assert!(trim("0s").await["held_by"].to_string().contains("foreign"));
    assert_eq!(output(&mut lab.program(&["trim"])).await.0, 2, "--dry-run must be said");
    assert_eq!(client.call(&["XLEN", STREAM]).await.int(), Some(32), "nothing was changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rename_leaves_behind_is_put_away_and_nothing_else() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 3).await;
    lab.settle_everything().await;
    let renamed = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE__PIPELINES__TOTALS__STREAM", STREAM);
        command.env("TIDEGATE__PIPELINES__TOTALS__TABLE", "public.counters");
        command
    };
    let (code, stdout, _) = output(&mut renamed(&["migrate", "--rename-pipeline", "counters=totals"])).await;
    assert!(code == 0 && stdout.contains("`tidegate group repair`"), "{stdout}");
    let repair = ["group", "repair", "--yes"];
    let (code, _, stderr) = output(&mut renamed(&repair)).await;
    assert_eq!(code, 75, "{stderr}");
    assert!(stderr.contains("start the daemon first"), "{stderr}");
    assert_eq!(output(&mut renamed(&["run", "--until-empty"])).await.0, 0);
    client.call(&["XGROUP", "CREATE", STREAM, "foreign", "0"]).await;
    let groups = async || {
        let (_, stdout, _) = output(renamed(&["group", "list"]).args(["--output", "json"])).await;
        let told: Value = serde_json::from_str(&stdout).expect("JSON");
        assert_fits("group-list", &told);
        let told = told["groups"].as_array().expect("a list").clone();
        told.into_iter().map(|g| format!("{} {}", g["group"], g["whose"]).replace('"', "")).collect::<Vec<_>>()
    };
    let mut before = groups().await;
    before.sort();
    assert_eq!(before, ["foreign foreign", "tidegate:counters left_behind", "tidegate:totals configured"]);
    let (code, stdout, stderr) = output(&mut renamed(&["group", "repair", "--dry-run"])).await;
    assert!(code == 0 && stdout.contains("1 group would be destroyed"), "{stdout}{stderr}");
    assert_eq!(output(&mut renamed(&["group", "repair"])).await.0, 2, "nobody was asked");
    assert_eq!(groups().await.len(), 3);
    let (code, stdout, stderr) = output(renamed(&repair).args(["--output", "json"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert_fits("group-repair", &serde_json::from_str(&stdout).expect("JSON"));
    let mut after = groups().await;
    after.sort();
    assert_eq!(after, ["foreign foreign", "tidegate:totals configured"]);
    let (code, _, stderr) = output(renamed(&repair).args(["--group", "tidegate:totals"])).await;
    assert_eq!(code, 65, "{stderr}");
    assert_eq!(output(renamed(&repair).args(["--group", "foreign"])).await.0, 0);
    assert_eq!(groups().await, ["tidegate:totals configured"]);
    assert_eq!(output(renamed(&repair).args(["--group", "gone"])).await.0, 65);
    assert_eq!(lab.value("a").await, Some(3));
}
