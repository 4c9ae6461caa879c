//! What commands print with `--output json` is what docs/schemas says.

use std::path::Path;

use serde_json::Value;

use crate::harness::{Daemon, Lab, eventually, output};

/// Whether a document is as its schema says.
pub(crate) fn assert_fits(name: &str, document: &Value) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/schemas/{name}.json"));
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(file).expect("the schema")).expect("JSON");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let faults: Vec<String> =
        validator.iter_errors(document).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
    assert!(faults.is_empty(), "{name}: {faults:?} in {document}");
}

/// Runs a command with `--output json`: its exit code, and the document, which has the schema of this name.
pub(crate) async fn document(lab: &Lab, name: &str, arguments: &[&str]) -> (i32, Value) {
    let (code, stdout, stderr) = output(lab.unhurried(lab.program(arguments)).args(["--output", "json"])).await;
    let document: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("no JSON: {code} {stdout} {stderr}"));
    assert_eq!(stdout.lines().count(), 1, "one document is one line");
    assert_fits(name, &document);
    (code, document)
}

#[tokio::test(flavor = "multi_thread")]
async fn data_goes_to_stdout_talk_to_stderr_and_a_pipe_gets_no_colours() {
    let lab = Lab::new().await;
    let (code, stdout, stderr) = output(&mut lab.program(&["status"])).await;
    assert_eq!(code, 4, "no daemon is at work: {stdout}{stderr}");
    assert!(stdout.starts_with("DEGRADED: ") && !stdout.contains('\x1b'), "{stdout}");
    assert_eq!(stderr, "");
    let (code, stdout, stderr) = output(&mut lab.program(&["status", "--pipeline", "none"])).await;
    assert_eq!((code, stdout.as_str()), (78, ""));
    assert_eq!(stderr, "tidegate status: there is no pipeline \"none\": name one of counters\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_verbs_of_managed_counters_print_documents_and_refuse_a_plain_pipeline() {
    let lab = Lab::new().await;
    let program = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed").args(["--output", "json"]);
        command
    };
    let printed = async |schema: &str, arguments: &[&str]| {
        let (code, stdout, stderr) = output(&mut program(arguments)).await;
        let document: Value =
            serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{arguments:?}: {stdout}{stderr}"));
        assert_fits(schema, &document);
        (code, document)
    };
    lab.client().await.add("a", 5).await;
    lab.settle_everything().await;
    let (code, would) = printed("adopt", &["adopt"]).await;
    assert_eq!((code, &would["dry_run"], &would["shards"][0]["was"]), (0, &true.into(), &"plain".into()), "{would}");
    let (code, done) = printed("adopt", &["adopt", "--yes"]).await;
    assert_eq!((code, &done["dry_run"]), (0, &false.into()), "{done}");
    let mut daemon = Daemon::start(program(&["run"]));
    daemon.wait_for_event("running", |_| true).await;
    let warmed = async || printed("warm", &["warm", "--top", "10"]).await;
    eventually("warm", (0, 1), async || {
        let (code, document) = warmed().await;
        (code, document["warm"].as_u64().unwrap_or(0))
    })
    .await;
    let (code, counter) = printed("counter", &["counter", "show", "a"]).await;
    assert_eq!((code, &counter["together"], &counter["valkey"]), (0, &"5".into(), &"5".into()), "{counter}");
    assert_eq!((&counter["agrees"], &counter["state"]), (&true.into(), &"clean".into()), "{counter}");
    let (code, memory) = printed("memory", &["memory", "--observe", "1"]).await;
    let primary = &memory["primaries"][0];
    assert_eq!(
        (code, &primary["max_bytes"], &primary["streams"][0]["dirty"]),
        (0, &Value::Null, &0.into()),
        "{memory}"
    );
    let (code, dropped) = printed("invalidate", &["invalidate", "--counters", "counters"]).await;
    assert_eq!((code, &dropped["keys"], &dropped["dry_run"]), (0, &1.into(), &false.into()), "{dropped}");
    for arguments in [&["adopt"][..], &["warm", "--top", "1"], &["invalidate", "--counters", "counters"]] {
        let (code, stdout, stderr) = output(&mut lab.program(arguments)).await;
        assert_eq!((code, stdout.as_str()), (78, ""), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with(&format!("tidegate {}: pipeline counters is plain", arguments[0])), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_closes_the_pipe_is_no_failure() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["check", "--print"]);
    command.stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("it runs");
    drop(child.stdout.take());
    let status = crate::harness::within_limit("the end", child.wait()).await.expect("waited for");
    assert_eq!(status.code(), Some(0));
}
