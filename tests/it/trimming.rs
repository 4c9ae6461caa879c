//! What leaves the stream, what must not, and what becomes of the ledger behind it.

use crate::harness::{Client, Daemon, GROUP, Lab, STREAM, eventually, output};

/// A daemon that keeps nothing it need not keep.
fn daemon_without_retention(lab: &Lab) -> Daemon {
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__COMPACT__MARGIN", "1s");
    Daemon::start(command)
}

async fn length(client: &mut Client) -> i64 {
    client.call(&["XLEN", STREAM]).await.int().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn settled_entries_leave_the_stream_after_the_retention_and_not_before() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 3_000).await;
    let keeping = lab.settle_everything().await;
    drop(keeping);
    assert_eq!(length(&mut client).await, 3_000, "an hour of retention by default");
    let _daemon = daemon_without_retention(&lab);
    // The last one delivered stays: it is the line itself.
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
    client.add("a", 1).await;
    lab.await_value("a", 3_001).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_group_that_is_behind_holds_the_trimmer_back() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, "somebody-else", "0", "MKSTREAM"]).await;
    client.add_many("a", 10).await;
    let reading = ["XREADGROUP", "GROUP", "somebody-else", "c", "COUNT", "4", "STREAMS", STREAM, ">"];
    client.call(&reading).await;
    let mut daemon = daemon_without_retention(&lab);
    lab.await_value("a", 10).await;
    // It holds four and has not seen six: nothing may go. The trimmer has looked, and says whom it waits for.
    let held = daemon.wait_for("a group that no pipeline of this configuration reads with").await;
    assert_eq!(held["group"], "somebody-else");
    assert_eq!(length(&mut client).await, 10);
    client.call(&["XGROUP", "DESTROY", STREAM, "somebody-else"]).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_trimmed_while_a_configured_group_is_missing() {
    let lab = Lab::new().await;
    lab.execute("create table public.second (id text primary key, value bigint not null, updated_at timestamptz)")
        .await;
    let mut client = lab.client().await;
    client.add_many("a", 10).await;
    lab.settle_everything().await;
    // A second pipeline reads the same stream, and its group cannot be created: its Valkey user may not.
    let allowed = ["~*", "&*", "+@all", "-xgroup|create"];
    let user = [&["ACL", "SETUSER", "limited", "on", ">secret"], &allowed[..]].concat();
    client.call(&user).await;
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", lab.valkey.url().replace("valkey://", "valkey://limited:secret@"));
    command.env("TIDEGATE__TRIM__RETENTION", "0s");
    command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
    command.env("TIDEGATE__PIPELINES__SECOND__STREAM", STREAM);
    command.env("TIDEGATE__PIPELINES__SECOND__TABLE", "public.second");
    let mut daemon = Daemon::start(command);
    let alarm = daemon.wait_for("a configured group is missing: the stream is not trimmed").await;
    assert_eq!(alarm["group"], "tidegate:second");
    assert_eq!(length(&mut client).await, 10);
    client.call(&["ACL", "SETUSER", "limited", "+xgroup|create"]).await;
    eventually("second", 10, async || lab.number("select sum(value)::bigint from public.second").await).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
    assert_eq!(lab.value("a").await, Some(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_the_ledger_does_not_know_are_never_cut() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    // Somebody read them, deleted the consumer with its marks, and nobody will ever flush them.
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    client.add_many("a", 5).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "deleted", "STREAMS", STREAM, ">"]).await;
    client.call(&["XGROUP", "DELCONSUMER", STREAM, GROUP, "deleted"]).await;
    let mut command = lab.program(&["run"]);
    // It looks when "b" has landed: before that one of them would be the line itself, and it says it once.
    command.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__TRIM__EVERY", "2s");
    let mut daemon = Daemon::start(command);
    client.add("b", 1).await;
    lab.await_value("b", 1).await;
    let alarm = daemon.wait_for("entries that nobody has pending are not in the ledger").await;
    assert_eq!(alarm["entries"], 5);
    assert_eq!(length(&mut client).await, 6);
    // Read again from the start they land, and the way is free.
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    client.add("b", 1).await;
    lab.await_value("a", 5).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
}

/// From a worker of another kind: docs/migrating.md, with its commands.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_worker_had_settled_is_not_counted_again_and_holds_up_no_trimming() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, "old-group", "0", "MKSTREAM"]).await;
    client.add_many("a", 9).await;
    let last = client.add("a", 1).await;
    client.call(&["XREADGROUP", "GROUP", "old-group", "old", "NOACK", "STREAMS", STREAM, ">"]).await;
    lab.execute("insert into public.counters (id, value) values ('a', 10)").await;
    // It has stopped, and producers go on.
    client.add_many("a", 5).await;
    let (ms, sequence) = last.split_once('-').expect("an id");
    let behind = format!("{ms}-{}", sequence.parse::<u64>().expect("a number") + 1);
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, &last]).await;
    client.call(&["XTRIM", STREAM, "MINID", &behind]).await;
    client.call(&["XGROUP", "DESTROY", STREAM, "old-group"]).await;
    let mut daemon = daemon_without_retention(&lab);
    lab.await_value("a", 15).await;
    assert_eq!(lab.in_ledger().await, 5);
    let (code, stdout, stderr) = output(&mut lab.program(&["audit", "--full"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
    for alarm in ["entries that nobody has pending are not in the ledger", "lost"] {
        assert_eq!(daemon.count(alarm), 0, "{}", daemon.last_lines());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_shrinks_behind_the_stream_and_still_knows_what_it_held() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let _daemon = daemon_without_retention(&lab);
    // One row for each: they are added one by one, each settled before the next.
    for n in 1..=120 {
        client.add("a", 1).await;
        lab.await_value("a", n).await;
    }
    // Merged rows that reach up to the stream's last entry cannot lose their digests before there are entries behind them.
    let (mut n, compacted) = (120, "select count(*) from tidegate.ledger where digests is null");
    let has_compacted = async || {
        n += 1;
        client.add("a", 1).await;
        lab.await_value("a", n).await;
        lab.number(compacted).await == 1
    };
    eventually("a compacted row", true, has_compacted).await;
    assert_eq!(lab.in_ledger().await, n, "no entry is forgotten");
    eventually("few rows", true, async || lab.number("select count(*) from tidegate.ledger").await <= 21).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_older_than_the_ledger_tells_is_kept_for_people_to_judge() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for _ in 0..3 {
        client.add("a", 1).await;
    }
    lab.settle_everything().await;
    // As if compacted long ago, and then redelivered.
    lab.execute("update tidegate.ledger set digests = null, digest_version = null").await;
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(3), "nothing is applied that may have been");
    let kept = "select count(*) from tidegate.dead_letters where reason = 'cannot_be_judged'";
    assert_eq!(lab.number(kept).await, 3);
    assert_eq!(lab.pending().await, 0);
    // Settled like that, they do not stand in the trimmer's way.
    let _daemon = daemon_without_retention(&lab);
    client.add("a", 1).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_of_an_unknown_version_cannot_judge_either() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.settle_everything().await;
    lab.execute("update tidegate.ledger set digest_version = 99").await;
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(1));
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_does_not_run_out_while_flushing_fails() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 5).await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__TRIM__RETENTION", "6s");
    let mut daemon = Daemon::start(command);
    lab.await_value("a", 5).await;
    lab.execute("alter table public.counters rename to away").await;
    let last = client.add("a", 1).await;
    daemon.wait_for("flushing is halted").await;
    let added: u64 = last.split('-').next().and_then(|ms| ms.parse().ok()).expect("an id");
    let age = async || {
        let seconds: u64 = lab.client().await.call(&["TIME"]).await.array()[0].text().parse().expect("seconds");
        seconds * 1000 > added + 7_500
    };
    eventually("older than the retention", true, age).await;
    assert_eq!(length(&mut client).await, 6, "whoever repairs it may need them");
    lab.execute("alter table public.away rename to counters").await;
    lab.await_value("a", 6).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_what_the_stream_still_holds_keep_their_digests() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__COMPACT__MARGIN", "1s");
    let daemon = Daemon::start(command);
    for n in 1..=120 {
        client.add("a", 1).await;
        lab.await_value("a", n).await;
    }
    // All are older than the margin now, and several looks have passed.
    let young = "select count(*) from tidegate.ledger where flushed_at > now() - interval '2 seconds'";
    eventually("young rows", 0, async || lab.number(young).await).await;
    drop(daemon);
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    lab.settle_everything().await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0, "everything can still be judged");
    assert_eq!(lab.value("a").await, Some(120));
}

/// Adds entries one by one, each settled before the next: a ledger row for each.
async fn add_one_by_one(lab: &Lab, client: &mut Client, count: i64) {
    for n in 1..=count {
        client.add("a", 1).await;
        lab.await_value("a", n).await;
    }
}

const ROWS: &str = "select count(*) from tidegate.ledger";

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_small_flushes_become_few_and_still_recognise_everything() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    add_one_by_one(&lab, &mut client, 300).await;
    eventually("few rows", true, async || lab.number(ROWS).await <= 32).await;
    assert_eq!(lab.in_ledger().await, 300, "no entry is forgotten");
    assert_eq!(lab.number("select count(*) from tidegate.ledger where digests is null").await, 0, "nor any digest");
    for round in 1..=3 {
        daemon.forget();
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
        client.add("b", 1).await;
        daemon.wait_for("redelivered entries were recognised").await;
        lab.await_value("b", round).await;
        lab.await_no_lag().await;
    }
    assert_eq!(lab.value("a").await, Some(300));
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_in_a_gap_that_a_merged_row_covers_is_applied_once() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    add_one_by_one(&lab, &mut client, 5).await;
    // Somebody else reads an entry in the middle and deletes his consumer with the mark: nobody flushes it.
    daemon.kill().await;
    client.add("gap", 1).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "deleted", "STREAMS", STREAM, ">"]).await;
    client.call(&["XGROUP", "DELCONSUMER", STREAM, GROUP, "deleted"]).await;
    let mut daemon = lab.daemon();
    for n in 6..=10 {
        client.add("a", 1).await;
        lab.await_value("a", n).await;
    }
    eventually("one row over the gap", true, async || lab.number(ROWS).await <= 6).await;
    assert_eq!(lab.value("gap").await, None);
    for _ in 0..2 {
        daemon.forget();
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
        client.add("b", 1).await;
        daemon.wait_for("redelivered entries were recognised").await;
        lab.await_value("gap", 1).await;
        lab.await_no_lag().await;
    }
    assert_eq!(lab.value("a").await, Some(10), "what was merged is recognised");
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn merging_beside_flushes_of_everything_again_neither_doubles_nor_deadlocks() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let short_batches = || {
        let mut command = lab.program(&["run"]);
        command.env("TIDEGATE__RUN__WORKERS", "3").env("TIDEGATE__BATCH__MAX_ENTRIES", "40");
        command.env("TIDEGATE__BATCH__READ_COUNT", "10").env("TIDEGATE__COMPACT__EVERY", "20ms");
        Daemon::start(command)
    };
    let _daemons = [short_batches(), short_batches()];
    for round in 1..=8 {
        client.add_many("a", 500).await;
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
        lab.await_value("a", 500 * round).await;
    }
    client.add("a", 1).await;
    lab.await_value("a", 4_001).await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, 4_001);
    assert_eq!(lab.number("select deadlocks from pg_stat_database where datname = current_database()").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_of_an_unknown_version_are_not_merged_with_others() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    add_one_by_one(&lab, &mut client, 3).await;
    daemon.kill().await;
    lab.execute("update tidegate.ledger set digest_version = 99").await;
    let _daemon = lab.daemon();
    for n in 4..=20 {
        client.add("a", 1).await;
        lab.await_value("a", n).await;
    }
    eventually("the others merged", true, async || lab.number(ROWS).await <= 12).await;
    assert_eq!(lab.number("select count(*) from tidegate.ledger where digest_version = 99").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_nobody_reads_with_is_named_when_it_holds_back_trimming() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, "tidegate:old name", "0", "MKSTREAM"]).await;
    client.add_many("a", 5).await;
    let mut daemon = daemon_without_retention(&lab);
    let alarm = daemon.wait_for("a group that no pipeline of this configuration reads with").await;
    assert_eq!(alarm["group"], "tidegate:old name");
    assert_eq!(length(&mut client).await, 5);
    client.call(&["XGROUP", "DESTROY", STREAM, "tidegate:old name"]).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
}
