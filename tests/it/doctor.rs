//! `tidegate doctor` and `tidegate explain`: each check finds what it is for on real servers that are in that state, its fix, followed, makes the
//! finding go away, and servers that are well are accused of nothing.
//!
//! Two states cannot be made with real servers here. The clock of a server alone cannot be set (D16): what three clocks say is judged by a
//! function without servers, and the test of a healthy installation compares real ones. PostgreSQL before 15 and Valkey before 8.0 are not among
//! the servers of these tests (D6): versions are judged by such a function, too, and a real Redis is met by `make redis-test`.

mod certificates;
mod postgres;
mod streams;
mod valkey;

use serde_json::Value;
use tidegate::ops::doctor::checks::CHECKS;
use tokio::process::Command;

use crate::contract::{assert_fits, document};
use crate::documents::documented;
use crate::harness::{Daemon, Lab, database, output};

/// Which tests show a check.
const SHOWN_BY: &[(&str, &[&str])] = &[
    (
        "D1",
        &[
            "what_valkey_may_evict_and_lose_is_found_and_each_command_corrects_it",
            "one_primary_of_several_is_found_by_its_address",
        ],
    ),
    ("D2", &["what_valkey_may_evict_and_lose_is_found_and_each_command_corrects_it"]),
    ("D3", &["a_primary_whose_writes_need_no_replica_is_found_and_one_that_refuses_writes_without"]),
    ("D4", &["the_default_user_is_found_and_the_documented_one_may_ask_enough"]),
    ("D5", &["connections_beyond_the_loopback_are_found_where_nothing_requires_encryption"]),
    (
        "D6",
        &[
            "a_server_is_judged_by_its_version",
            "what_is_older_than_what_is_tested_is_told_and_a_redis_that_is_tested_is_no_warning",
        ],
    ),
    (
        "D7",
        &[
            "a_group_that_is_missing_or_was_moved_past_the_oldest_entries_is_found",
            "a_group_that_was_moved_past_the_newest_of_many_entries_is_found",
        ],
    ),
    ("D8", &["what_a_consumer_that_has_gone_holds_is_found_until_a_daemon_takes_it"]),
    ("D9", &["an_entry_is_old_when_its_workers_death_does_not_explain_it"]),
    ("D10", &["what_was_cut_unread_is_found_and_a_number_that_valkey_cannot_tell_is_no_warning"]),
    ("D11", &["idle_time_outs_of_both_servers_are_found"]),
    ("D12", &["in_a_cluster_a_stream_without_a_hash_tag_is_found_and_each_stream_is_asked_where_it_is"]),
    ("D13", &["entries_that_cannot_be_applied_or_come_from_plain_producers_are_found"]),
    ("D14", &["a_ledger_without_its_constraint_is_found", "a_workers_role_that_lacks_a_right_is_found"]),
    (
        "D15",
        &[
            "an_autovacuum_that_is_off_or_held_up_is_found",
            "values_near_the_end_of_their_type_are_found",
            "entries_that_the_ledger_can_no_longer_judge_are_found",
        ],
    ),
    ("D16", &["clocks_that_differ_are_told_whichever_it_is_and_a_slow_answer_is_none"]),
    ("D17", &["another_configuration_than_the_registered_one_is_found"]),
    ("D18", &["a_pooler_is_found"]),
    ("D19", &["a_table_that_does_not_fit_or_refuses_rows_is_found"]),
    ("D20", &["a_table_that_does_not_fit_or_refuses_rows_is_found"]),
    ("D21", &["a_foreign_group_that_holds_back_trimming_is_found"]),
    (
        "D22",
        &[
            "a_primary_that_waits_for_no_standby_is_found_and_so_is_its_standby",
            "a_commit_that_waits_for_nobody_and_a_database_that_is_read_only_are_found",
        ],
    ),
    ("D23", &["open_letters_and_pauses_are_found_until_they_are_dealt_with"]),
    ("D24", &["open_letters_and_pauses_are_found_until_they_are_dealt_with"]),
    ("D25", &["a_memory_that_is_nearly_full_is_found_unless_something_may_be_evicted"]),
    ("D26", &["a_database_that_is_not_migrated_or_away_is_a_finding_and_the_rest_is_checked"]),
    ("D27", &["what_makes_updates_dear_is_found"]),
    ("D28", &["connections_that_are_nearly_used_up_are_found_at_both_servers"]),
    (
        "D29",
        &[
            "a_certificate_of_valkey_is_found_before_it_ends_and_when_no_connection_accepts_it",
            "a_certificate_of_postgresql_is_found_and_what_it_means_follows_from_sslmode",
            "of_a_chain_the_certificate_decides_that_ends_first_and_is_needed",
            "a_clients_certificate_is_found_and_whether_anybody_asks_for_it",
        ],
    ),
];

/// What this command finds.
async fn examine(command: &mut Command) -> Value {
    let (code, stdout, stderr) = output(command.args(["--output", "json"])).await;
    let found: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("no JSON: {code} {stdout} {stderr}"));
    assert_fits("doctor", &found);
    found
}

async fn doctor(lab: &Lab) -> Value {
    examine(&mut lab.program(&["doctor"])).await
}

/// The findings of a check.
fn of<'f>(found: &'f Value, id: &str) -> Vec<&'f Value> {
    found["findings"].as_array().expect("a list").iter().filter(|finding| finding["id"] == id).collect()
}

/// The fix of a finding of this severity whose evidence has these words; there must be one.
fn fix(found: &Value, id: &str, severity: &str, words: &str) -> String {
    let fits = |finding: &&&Value| {
        finding["severity"] == severity && finding["evidence"].as_str().is_some_and(|evidence| evidence.contains(words))
    };
    let finding = of(found, id).iter().find(fits).copied().cloned();
    let finding = finding.unwrap_or_else(|| panic!("no {severity} of {id} with {words:?}: {:#?}", of(found, id)));
    finding["fix"].as_str().unwrap_or_else(|| panic!("{id} says nothing to do: {finding}")).to_owned()
}

/// The check was made, and says that all is well.
fn assert_well(found: &Value, id: &str) {
    let findings = of(found, id);
    assert!(!findings.is_empty() && findings.iter().all(|finding| finding["severity"] == "ok"), "{findings:#?}");
}

/// Executes the statements of a fix, as psql does: each by itself.
async fn execute(lab: &Lab, fix: &str) {
    for statement in fix.split(';').filter(|statement| !statement.trim().is_empty()) {
        lab.execute(statement).await;
    }
}

#[test]
fn every_check_is_in_the_document_with_the_tests_that_show_it() {
    let mut table = String::from(
        "| check | looks at | at the worst | it says | if nobody acts | shown by |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for check in &CHECKS {
        let tests = SHOWN_BY.iter().find(|(id, _)| *id == check.id).map(|(_, tests)| *tests);
        let tests = tests.unwrap_or_else(|| panic!("no test shows {}: write one, and name it in SHOWN_BY", check.id));
        // That each of these is there is seen by the test of what documents name.
        let tests: Vec<String> = tests.iter().map(|test| format!("`{test}`")).collect();
        assert!(!tests.is_empty(), "no test shows {}", check.id);
        let worst = format!("{:?}", check.worst).to_lowercase();
        let (meaning, consequence) = (check.meaning.replace('|', "\\|"), check.consequence.replace('|', "\\|"));
        table.push_str(&format!(
            "| `tidegate explain {}` | {} | {worst} | {meaning} | {consequence} | {} |\n",
            check.id,
            check.title,
            tests.join(", ")
        ));
    }
    assert_eq!(SHOWN_BY.len(), CHECKS.len(), "SHOWN_BY names a check that is not there");
    documented("docs/doctor.md", "checks", &table);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_installation_has_no_error_and_says_what_could_be_safer() {
    let lab = Lab::new().await;
    let mut daemon = Daemon::start(lab.program_by_default(&["run"]));
    daemon.wait_for_event("running", |_| true).await;
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    lab.assert_settled().await;
    let (code, found) = document(&lab, "doctor", &["doctor"]).await;
    assert_eq!(code, 0, "{found}");
    fix(&found, "D2", "warning", "appendonly is no");
    fix(&found, "D4", "warning", "as the user default");
    fix(&found, "D13", "info", "have no field op");
    let told = ["D2", "D4", "D13"];
    // The server of the tests may be a Redis.
    for check in CHECKS.iter().filter(|check| !told.contains(&check.id) && check.id != "D6") {
        assert_well(&found, check.id);
    }
    assert_eq!(output(&mut lab.program(&["doctor", "--strict"])).await.0, 4);
    let (_, stdout, _) = output(&mut lab.program(&["doctor"])).await;
    assert!(stdout.starts_with("0 errors, ") && stdout.contains("fix: CONFIG SET appendonly yes"), "{stdout}");
    assert!(!stdout.contains("D1 "), "{stdout}");
    let (_, stdout, _) = output(&mut lab.program(&["doctor", "--all"])).await;
    for check in &CHECKS {
        assert!(stdout.lines().any(|line| line.starts_with(&format!("{:<4} ", check.id))), "{}: {stdout}", check.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_migrated_or_away_is_a_finding_and_the_rest_is_checked() {
    let lab = Lab::new().await;
    let unmigrated = Lab { database: database(false).await, ..lab };
    let (code, found) = document(&unmigrated, "doctor", &["doctor"]).await;
    assert_eq!(code, 4);
    assert_eq!(fix(&found, "D26", "error", "the database lacks"), "tidegate migrate");
    let nobody = crate::harness::free_port();
    let mut command = unmigrated.program(&["doctor", "--output", "json"]);
    command.env("DATABASE_URL", format!("postgres://me:hunter2@127.0.0.1:{nobody}/none"));
    let (code, stdout, stderr) = output(&mut command).await;
    let away: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(code, 69, "{away}");
    fix(&away, "D2", "warning", "appendonly");
    let unknown = of(&away, "D26")[0];
    assert!(unknown["severity"] == "unknown" && unknown["evidence"].to_string().contains("cannot reach"), "{unknown}");
    assert!(!format!("{stdout}{stderr}").contains("hunter2"));
    assert_eq!(output(&mut unmigrated.program(&["migrate"])).await.0, 0);
    assert_well(&doctor(&unmigrated).await, "D26");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_cannot_be_looked_at_is_no_stream_that_is_well() {
    let lab = Lab::new().await;
    lab.client().await.call(&["SET", crate::harness::STREAM, "text"]).await;
    let (code, found) = document(&lab, "doctor", &["doctor"]).await;
    let unknown = of(&found, "D7")[0];
    assert!(unknown["severity"] == "unknown" && unknown["evidence"].to_string().contains("WRONGTYPE"), "{unknown}");
    assert_eq!((code, of(&found, "D9")), (69, Vec::new()), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_explained_without_any_server() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["explain", "42P01", "--output", "json"]);
    command.env_remove("VALKEY_URL").env_remove("DATABASE_URL");
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stderr}");
    let told: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_fits("explain", &told);
    assert_eq!(told["said_by"], "PostgreSQL");
    let (code, _, stderr) = output(&mut lab.program(&["explain", "nonsense"])).await;
    assert_eq!(code, 2, "{stderr}");
}
