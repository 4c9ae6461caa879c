//! Negative controls: a promise is broken on purpose, and the tests that guard it must fail.
//!
//! Each runs the named tests of this very program twice, as it is and sabotaged; `make controls` shows how they failed. A control
//! that passes is a failed test. What each rule is for stands in docs/guarantees.md.

#![allow(clippy::print_stdout, reason = "how each was noticed is told")]

use tokio::process::Command;

use crate::harness::output;

/// How long a sabotaged test waits for what will not come, in seconds.
const LIMIT: &str = "12";

async fn control(promise: &str, tests: &[&str]) {
    let run = |promise: Option<&str>| {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg("--exact").args(tests).env("RUST_BACKTRACE", "0");
        if let Some(promise) = promise {
            command.env("TIDEGATE_SABOTAGE", promise).env("TIDEGATE_TEST_LIMIT", LIMIT);
        }
        command
    };
    let (code, stdout, stderr) = output(&mut run(None)).await;
    assert_eq!(code, 0, "as it is: {stdout}{stderr}");
    assert!(stdout.contains(&format!("{} passed", tests.len())), "{tests:?}: {stdout}");
    let (_, stdout, _) = output(&mut run(Some(promise))).await;
    for test in tests {
        assert!(stdout.contains(&format!("test {test} ... FAILED")), "{promise} was not noticed: {stdout}");
    }
    let how = stdout.lines().skip_while(|line| !line.contains("panicked at")).take(2).collect::<Vec<_>>().join(" ");
    println!("{promise}: {how}");
}

macro_rules! controls {
    ($($promise:ident: $($test:literal),+;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $promise() {
            control(stringify!($promise), &[$($test),+]).await;
        }
    )*};
}

controls! {
    ledger_off: "crash::killed_between_commit_and_ack", "outage::a_rewound_group_changes_nothing";
    ledger_apart: "crash::the_outcome_of_the_commit_is_unknown";
    ack_first: "crash::killed_after_the_read_and_before_anything_reached_postgresql";
    watermark: "crash::what_a_dead_worker_held_lands_after_newer_entries_of_a_peer";
    batch_id: "crash::of_a_batch_of_known_and_new_runs_only_the_new_ones_count";
    id_alone: "outage::other_content_under_used_ids_is_applied", "failover::two_primaries_alive_at_once_with_workers_on_both_sides";
    group_at_end: "outage::a_group_that_was_destroyed_is_created_again_at_the_start";
    deletes_consumers: "crash::what_a_dead_worker_held_lands_after_newer_entries_of_a_peer";
    ack_anywhere: "crash::an_acknowledgement_never_reaches_another_server";
    trims_blind: "trimming::another_group_that_is_behind_holds_the_trimmer_back";
    trims_without_groups: "trimming::nothing_is_trimmed_while_a_configured_group_is_missing";
    trims_unasked: "trimming::entries_that_the_ledger_does_not_know_are_never_cut";
    trims_while_failing: "trimming::retention_does_not_run_out_while_flushing_fails";
    zero_rows: "crash::of_a_batch_of_known_and_new_runs_only_the_new_ones_count";
    unsorted_keys: "crash::workers_that_write_the_same_rows_never_wait_for_each_other_in_a_circle";
    unsorted_locks: "crash::workers_that_write_the_same_rows_never_wait_for_each_other_in_a_circle";
    one_source: "outage::two_deployments_give_the_same_ids_and_both_count";
    rename_unseen: "verbs::a_renamed_pipeline_is_refused_until_its_ledger_is_carried_over";
    unknown_is_empty: "trimming::digests_of_an_unknown_version_cannot_judge_either";
    unnamed_conflict: "outage::without_the_ledgers_constraint_flushing_pauses_and_never_doubles";
    not_durable: "crash::a_flush_is_durable_whatever_the_role_or_database_has_set";
    not_distinct: "crash::the_same_entry_twice_in_one_batch_counts_once";
    sleeps_in_transaction: "crash::a_worker_stopped_inside_its_transaction_does_not_hold_up_its_peers";
    row_each: "crash::killed_after_the_read_and_before_anything_reached_postgresql";
    drops_unjudged: "trimming::an_entry_older_than_the_ledger_tells_is_kept_for_people_to_judge";
    buries_unjudged: "crash::a_zombie_older_than_the_ledger_tells_drops_what_somebody_has_settled";
    silent_while_waiting: "outage::postgresql_away_for_longer_than_dead_after_and_back";
    gone_unseen: "outage::entries_deleted_before_they_were_flushed_are_counted_as_lost";
    highest_only: "failover::a_failover_that_loses_the_tail_doubles_nothing_and_reports_what_was_lost";
    unbounded_ids: "outage::a_ledger_ahead_of_the_clock_never_shuts_the_stream";
    replay_keeps_connections: "replay::an_acknowledgement_from_before_the_restore_never_arrives_after_it";
    compacts_at_once: "trimming::rows_of_what_the_stream_still_holds_are_never_merged";
    own_tables_are_poison: "outage::what_its_own_tables_refuse_is_nobodys_dead_letter";
    partition_is_poison: "entries::a_missing_partition_is_no_poison";
    no_poison_limit: "entries::a_table_that_refuses_everything_halts_the_pipeline_and_buries_nothing";
}
