//! What the doctor says of streams, groups, consumers and entries.

use super::{assert_well, doctor, examine, execute, fix, of};
use crate::harness::{Daemon, GROUP, Lab, Resp, STREAM, eventually, output};

/// Types a fix that is a command of Tidegate's.
async fn type_in(lab: &Lab, fix: &str) {
    let words: Vec<&str> = fix.strip_prefix("tidegate ").expect("a command").split(' ').collect();
    let (code, stdout, stderr) = output(&mut lab.program(&words)).await;
    assert_eq!(code, 0, "{fix}: {stdout}{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_missing_or_was_moved_past_the_oldest_entries_is_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let first = client.add("a", 1).await;
    client.add("b", 1).await;
    let told = fix(&doctor(&lab).await, "D7", "warning", "has entries, and no group tidegate:counters");
    assert!(told.starts_with("start `tidegate run`"), "{told}");
    // As another program may create it: past what nobody has read.
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "$"]).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, None);
    let told =
        fix(&doctor(&lab).await, "D7", "error", &format!("2 entries of {STREAM} lie before the group's position"));
    assert_eq!(told, format!("tidegate replay --pipeline counters --since {first} --yes"));
    type_in(&lab, &told).await;
    lab.settle_everything().await;
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(1), Some(1)));
    assert_well(&doctor(&lab).await, "D7");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_moved_past_the_newest_of_many_entries_is_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 5_000).await;
    lab.settle_everything().await;
    assert_well(&doctor(&lab).await, "D7");
    let skipped = client.add("b", 7).await;
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "$"]).await;
    let told = fix(&doctor(&lab).await, "D7", "error", &format!("1 entry of {STREAM} lie"));
    assert!(told.contains(&format!("--since {skipped}")), "{told}");
    type_in(&lab, &told).await;
    lab.settle_everything().await;
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(5_000), Some(7)));
    assert_well(&doctor(&lab).await, "D7");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_consumer_that_has_gone_holds_is_found_until_a_daemon_takes_it() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    let mut daemon = lab.daemon();
    lab.await_value("a", 1).await;
    // It is killed with an entry in its hands.
    let mut lock = lab.sql().await;
    sqlx::raw_sql("begin; lock table public.counters in access exclusive mode")
        .execute(&mut lock)
        .await
        .expect("locked");
    client.add("a", 1).await;
    eventually("it is in its hands", 1, async || lab.pending().await).await;
    assert_well(&doctor(&lab).await, "D8");
    daemon.kill().await;
    let gone = async || of(&doctor(&lab).await, "D8").iter().any(|finding| finding["severity"] == "warning");
    eventually("its connection has gone", true, gone).await;
    let words = format!("1 entry of {STREAM} held by 1 consumer");
    let told = fix(&doctor(&lab).await, "D8", "warning", &words);
    assert!(told.starts_with("start a daemon"), "{told}");
    sqlx::raw_sql("rollback").execute(&mut lock).await.expect("unlocked");

    // A daemon that waits for ten minutes before it takes anything over has not had the time, for a doctor of the same configuration.
    let patient = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        for key in ["RECLAIM__GONE_AFTER", "RECLAIM__DEAD_AFTER", "COMPACT__MARGIN"] {
            command.env(format!("TIDEGATE__{key}"), "10m");
        }
        command
    };
    let mut waiting = Daemon::start(patient(&["run"]));
    let is_overdue = async || {
        let found = doctor(&lab).await;
        let told = of(&found, "D8").iter().filter_map(|finding| finding["evidence"].as_str()).collect::<String>();
        told.contains(&words) && told.contains("no running daemon has taken them over")
    };
    eventually("one of another configuration should have taken it over", true, is_overdue).await;
    let told = fix(&doctor(&lab).await, "D8", "warning", &words);
    assert!(told.starts_with("see `tidegate status` and the daemon's log"), "{told}");
    let found = examine(&mut patient(&["doctor"])).await;
    assert_well(&found, "D8");
    assert_eq!(lab.pending().await, 1, "it is still held");
    waiting.kill().await;
    let is_alone = async || {
        let found = examine(&mut patient(&["doctor"])).await;
        of(&found, "D8").iter().any(|finding| finding["evidence"].to_string().contains("and no daemon runs"))
    };
    eventually("its connections have gone", true, is_alone).await;

    let _daemon = lab.daemon();
    lab.await_value("a", 2).await;
    lab.assert_settled().await;
    assert_well(&doctor(&lab).await, "D8");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_is_old_when_its_workers_death_does_not_explain_it() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let seconds: u64 = client.call(&["TIME"]).await.array()[0].text().parse().expect("seconds");
    let id = format!("{}-0", (seconds - 600) * 1_000);
    client.call(&["XADD", STREAM, &id, "id", "a", "amount", "1"]).await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    let told = fix(&doctor(&lab).await, "D9", "warning", "more than 2.1s is not explained");
    assert!(told.contains("tidegate status"), "{told}");
    // Ten minutes are not long where a worker may be silent for a quarter of an hour, or a lease may last so long.
    let diagnose = async |delivery: &str, dead_after: &str, lease: &str| {
        let mut command = lab.program(&["doctor"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", delivery).env("TIDEGATE__EXCLUSIVE__LEASE", lease);
        examine(command.env("TIDEGATE__RECLAIM__DEAD_AFTER", dead_after)).await
    };
    assert_well(&diagnose("group", "15m", "2s").await, "D9");
    assert_well(&diagnose("exclusive", "15m", "2s").await, "D9");
    fix(&diagnose("group", "4m", "5m").await, "D9", "warning", "more than 4m01s");
    fix(&diagnose("exclusive", "4m", "5m").await, "D9", "warning", "more than 5m01s");
    lab.settle_everything().await;
    assert_well(&doctor(&lab).await, "D9");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_cut_unread_is_found_and_a_number_that_valkey_cannot_tell_is_no_warning() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 10).await;
    lab.settle_everything().await;
    assert_well(&doctor(&lab).await, "D10");
    // As a producer does it with MAXLEN, while no daemon runs.
    client.add_many("a", 10).await;
    let keep = ["XADD", STREAM, "MAXLEN", "4", "*", "id", "a", "amount", "1"];
    assert!(matches!(client.call(&keep).await, Resp::Text(_)));
    let told = fix(&doctor(&lab).await, "D10", "warning", &format!("7 entries of {STREAM} cut from the stream"));
    assert!(told.contains("no MAXLEN") && told.contains("tidegate audit --full"), "{told}");
    let (code, stdout, _) = output(&mut lab.program(&["audit", "--full"])).await;
    assert_eq!(code, 3, "{stdout}");
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(14));
    // Valkey 8 goes on counting what is gone, 9 does not.
    let told = of(&doctor(&lab).await, "D10").iter().find_map(|finding| finding["fix"].as_str().map(str::to_owned));
    if let Some(command) = told.as_deref().and_then(|told| told.split("done: ").nth(1)) {
        client.call(&command.split(' ').collect::<Vec<_>>()).await;
    }
    assert_well(&doctor(&lab).await, "D10");
    // All of it, too.
    client.add_many("a", 3).await;
    client.call(&["XTRIM", STREAM, "MAXLEN", "0"]).await;
    let told = fix(&doctor(&lab).await, "D10", "warning", &format!("3 entries of {STREAM} cut from the stream"));
    let command = told.split("done: ").nth(1).expect("a command");
    client.call(&command.split(' ').collect::<Vec<_>>()).await;
    assert_well(&doctor(&lab).await, "D10");
    client.add("a", 1).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(15));
    assert_well(&doctor(&lab).await, "D10");

    // What is deleted between others makes Valkey give up counting, and Tidegate counts by itself.
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 5).await;
    lab.settle_everything().await;
    client.add("a", 1).await;
    let deleted = client.add("a", 1).await;
    client.add("a", 1).await;
    client.call(&["XDEL", STREAM, &deleted]).await;
    let told = fix(&doctor(&lab).await, "D10", "info", "cannot tell how many entries");
    assert!(told.starts_with("nothing: "), "{told}");
    lab.settle_everything().await;
    assert_well(&doctor(&lab).await, "D10");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_cannot_be_applied_or_come_from_plain_producers_are_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    client.call(&["XADD", STREAM, "*", "id", "c", "op", "1"]).await;
    let found = doctor(&lab).await;
    fix(&found, "D13", "warning", "cannot be applied: the field with the amount is missing");
    let told = fix(&found, "D13", "info", "1 of the last 2 entries");
    assert!(told.contains("unique for each increment"), "{told}");
    assert!(!found.to_string().contains("plain producers"), "the pipeline is plain: {found}");
    let mut command = lab.program(&["doctor"]);
    let managed = examine(command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed")).await;
    let told = fix(&managed, "D13", "warning", "2 of the last 2 entries");
    assert!(told.contains("docs/functions.md"), "{told}");
    // A producer that does as it says.
    client.call(&["DEL", STREAM]).await;
    let lines = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(lines.path(), "a 5\nb 1\n").expect("written");
    let (code, _, stderr) = output(&mut lab.program(&["produce", lines.path().to_str().expect("text")])).await;
    assert_eq!(code, 0, "{stderr}");
    assert_well(&doctor(&lab).await, "D13");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_the_ledger_can_no_longer_judge_are_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 3).await;
    lab.settle_everything().await;
    // As if they had left the stream, and its digests the ledger, before Valkey was restored from an old copy.
    lab.execute("update tidegate.ledger set digests = null, digest_version = null").await;
    let last = client.add("a", 1).await;
    lab.settle_everything().await;
    let told = fix(&doctor(&lab).await, "D15", "warning", "3 entries in");
    let (code, stdout, stderr) = output(&mut lab.program(&["audit", "--full"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let command = told.split("then: ").nth(1).expect("a command");
    client.call(&command.split(' ').collect::<Vec<_>>()).await;
    assert_well(&doctor(&lab).await, "D15");
    assert_eq!(client.call(&["XRANGE", STREAM, "-", "+"]).await.array().len(), 1, "{last} stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_group_that_holds_back_trimming_is_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XADD", STREAM, "1-0", "id", "a", "amount", "1"]).await;
    client.call(&["XGROUP", "CREATE", STREAM, "tidegate:old", "0"]).await;
    lab.settle_everything().await;
    let told = fix(&doctor(&lab).await, "D21", "warning", "group tidegate:old of");
    let command = told.split('`').nth(1).expect("a command");
    type_in(&lab, &format!("{command} --yes")).await;
    assert_well(&doctor(&lab).await, "D21");
    // One that reads is none of that, and neither is one that has nothing to read.
    client.call(&["XGROUP", "CREATE", STREAM, "foreign", "$"]).await;
    client.add("a", 1).await;
    assert_well(&doctor(&lab).await, "D21");
}

#[tokio::test(flavor = "multi_thread")]
async fn open_letters_and_pauses_are_found_until_they_are_dealt_with() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut client = lab.client().await;
    client.add("a", 100).await;
    client.add("b", 1).await;
    lab.settle_everything().await;
    let found = doctor(&lab).await;
    let told = fix(&found, "D23", "warning", "1 dead letter is open");
    assert_well(&found, "D24");
    lab.execute("alter table public.counters drop constraint small").await;
    for command in told.split('`').filter(|part| part.starts_with("tidegate ")) {
        let command = if command.contains("redrive") { format!("{command} --yes") } else { command.to_owned() };
        type_in(&lab, &command).await;
    }
    assert_eq!(lab.value("a").await, Some(100));
    assert_well(&doctor(&lab).await, "D23");

    type_in(&lab, "tidegate pause counters").await;
    let told = fix(&doctor(&lab).await, "D24", "warning", "paused for ");
    type_in(&lab, &told).await;
    assert_well(&doctor(&lab).await, "D24");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_configuration_than_the_registered_one_is_found() {
    let lab = Lab::new().await;
    lab.client().await.add("a", 1).await;
    let found = doctor(&lab).await;
    assert!(of(&found, "D17")[0]["evidence"].to_string().contains("is not registered yet"), "{found}");
    lab.settle_everything().await;
    assert!(of(&doctor(&lab).await, "D17")[0]["evidence"].to_string().contains("registered as it is configured"));
    execute(&lab, "alter table public.counters add column other bigint not null default 0").await;
    let mut command = lab.program(&["doctor"]);
    let found = examine(command.env("TIDEGATE__PIPELINES__COUNTERS__VALUE_COLUMN", "other")).await;
    let told = fix(&found, "D17", "error", "registered with table public.counters");
    assert!(told.starts_with("give all daemons the same configuration"), "{told}");
    assert_well(&doctor(&lab).await, "D17");
    // The table was renamed: the other way that it names.
    lab.execute("alter table public.counters rename to visits").await;
    let renamed = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE__PIPELINES__COUNTERS__TABLE", "public.visits");
        command
    };
    let told =
        fix(&examine(&mut renamed(&["doctor"])).await, "D17", "error", "this configuration has table public.visits");
    assert!(told.contains("`tidegate migrate --retarget`"), "{told}");
    let (code, stdout, stderr) = output(&mut renamed(&["migrate", "--retarget", "counters"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_well(&examine(&mut renamed(&["doctor"])).await, "D17");
    let (code, _, stderr) = output(&mut renamed(&["run", "--until-empty"])).await;
    assert_eq!(code, 0, "{stderr}");
}
