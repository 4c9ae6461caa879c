//! `tidegate doctor` and `tidegate explain`.

use serde_json::Value;

use crate::contract::document;
use crate::harness::{GROUP, Lab, STREAM, database, output};

async fn doctor(lab: &Lab) -> (i32, Value) {
    document(lab, "doctor", &["doctor"]).await
}

/// The findings of this check that are not well: severity and evidence.
fn of(found: &Value, id: &str) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let findings = found["findings"].as_array().expect("a list").iter();
    findings
        .filter(|finding| finding["id"] == id && finding["severity"] != "ok")
        .map(|finding| {
            (text(&finding["severity"]), format!("{} {}", text(&finding["evidence"]), text(&finding["fix"])))
        })
        .collect()
}

fn has(found: &Value, id: &str, severity: &str, words: &str) -> bool {
    of(found, id).iter().any(|(found, text)| found == severity && text.contains(words))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_installation_has_no_error_and_says_what_could_be_safer() {
    let lab = Lab::new().await;
    lab.client().await.add("a", 1).await;
    lab.settle_everything().await;
    let (code, found) = doctor(&lab).await;
    assert_eq!(code, 0, "{found}");
    assert!(has(&found, "D2", "warning", "CONFIG SET appendonly yes"), "{found}");
    assert!(has(&found, "D4", "warning", "docs/permissions.md"), "{found}");
    assert!(has(&found, "D13", "info", "unique for each increment"), "{found}");
    for id in ["D1", "D7", "D14", "D17", "D19", "D26", "D16"] {
        assert_eq!(of(&found, id), [], "{found}");
    }
    assert_eq!(output(&mut lab.program(&["doctor", "--strict"])).await.0, 4);
    let (_, stdout, _) = output(&mut lab.program(&["doctor"])).await;
    assert!(stdout.starts_with("0 errors, ") && stdout.contains("fix: CONFIG SET appendonly yes"), "{stdout}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_is_found_with_its_remedy() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "timeout", "5"]).await;
    let first = client.add("a", 1).await;
    client.add("b", 1).await;
    // Created past what nobody has read.
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "$"]).await;
    client.call(&["XGROUP", "CREATE", STREAM, "tidegate:old", "0"]).await;
    client.call(&["XADD", STREAM, "*", "id", "c"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "gone", "STREAMS", STREAM, ">"]).await;
    lab.execute(
        "alter table tidegate.ledger drop constraint ledger_no_overlap;
         alter table public.counters add constraint positive check (value >= 0);
         insert into public.counters values ('full', 9223372036854775800);
         alter table public.counters alter column updated_at type text",
    )
    .await;
    let mut command = lab.program(&["doctor", "--output", "json"]);
    let (code, stdout, _) = output(command.env("TIDEGATE__TRIM__RETENTION", "0s")).await;
    let found: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(code, 4, "{found}");
    for (id, severity, words) in [
        ("D1", "error", "CONFIG SET maxmemory-policy noeviction"),
        ("D7", "error", &*format!("tidegate replay --pipeline counters --since {first}")),
        ("D11", "warning", "closes connections that are idle for 5 s"),
        ("D13", "warning", "cannot be applied: the field with the amount is missing"),
        ("D14", "error", "add constraint ledger_no_overlap exclude using gist"),
        ("D19", "error", "alter column updated_at type timestamptz"),
        ("D21", "warning", "tidegate group repair --group tidegate:old"),
    ] {
        assert!(has(&found, id, severity, words), "{id} {words}: {found}");
    }
    lab.execute("alter table public.counters alter column updated_at type timestamptz using now()").await;
    let (_, found) = doctor(&lab).await;
    assert!(!has(&found, "D13", "warning", "plain producers"), "the pipeline is plain: {found}");
    let mut command = lab.program(&["doctor", "--output", "json"]);
    let (_, stdout, _) = output(command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed")).await;
    let managed: Value = serde_json::from_str(&stdout).expect("JSON");
    assert!(has(&managed, "D13", "warning", "3 of the last 3 entries"), "{managed}");
    assert!(has(&managed, "D13", "warning", "came from plain producers"), "{managed}");
    assert!(has(&found, "D20", "warning", "positive"), "{found}");
    assert!(has(&found, "D15", "warning", "near the end of bigint"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_migrated_or_away_is_a_finding_and_the_rest_is_checked() {
    let lab = Lab::new().await;
    let unmigrated = Lab { database: database(false).await, ..lab };
    let (code, found) = doctor(&unmigrated).await;
    assert_eq!(code, 4);
    assert!(has(&found, "D26", "error", "tidegate migrate"), "{found}");
    let nobody = crate::harness::free_port().await;
    let mut command = unmigrated.program(&["doctor", "--output", "json"]);
    command.env("DATABASE_URL", format!("postgres://me:hunter2@127.0.0.1:{nobody}/none"));
    let (code, stdout, stderr) = output(&mut command).await;
    let found: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(code, 69, "{found}");
    assert!(has(&found, "D2", "warning", "appendonly") && has(&found, "D26", "unknown", "cannot reach"), "{found}");
    assert!(!format!("{stdout}{stderr}").contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_explained_without_any_server() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["explain", "42P01", "--output", "json"]);
    command.env_remove("VALKEY_URL").env_remove("DATABASE_URL");
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stderr}");
    let told: Value = serde_json::from_str(&stdout).expect("JSON");
    crate::contract::assert_fits("explain", &told);
    assert_eq!(told["said_by"], "PostgreSQL");
    let (code, _, stderr) = output(&mut lab.program(&["explain", "nonsense"])).await;
    assert_eq!(code, 2, "{stderr}");
}
