//! What leaves the stream, what must not, and what becomes of the ledger behind it.

use crate::harness::{Client, Daemon, GROUP, Lab, STREAM, eventually};

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
    // It holds four and has not seen six: nothing may go. The trimmer has looked when the next entry is settled too.
    daemon.wait_for("flushed").await;
    client.add("b", 1).await;
    lab.await_value("b", 1).await;
    assert_eq!(length(&mut client).await, 11);
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
    let mut daemon = daemon_without_retention(&lab);
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
    let compacted = "select count(*) from tidegate.ledger where digests is null";
    eventually("compacted rows", 1, async || lab.number(compacted).await).await;
    assert_eq!(lab.in_ledger().await, 120, "no entry is forgotten");
    // A hundred rows at least were merged.
    assert!(lab.number("select count(*) from tidegate.ledger").await <= 21);
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
    command.env("TIDEGATE__TRIM__RETENTION", "2s");
    let mut daemon = Daemon::start(command);
    lab.await_value("a", 5).await;
    lab.execute("alter table public.counters rename to away").await;
    let last = client.add("a", 1).await;
    daemon.wait_for("flushing is halted").await;
    let added: u64 = last.split('-').next().and_then(|ms| ms.parse().ok()).expect("an id");
    let age = async || {
        let seconds: u64 = lab.client().await.call(&["TIME"]).await.array()[0].text().parse().expect("seconds");
        seconds * 1000 > added + 3_500
    };
    eventually("older than the retention", true, age).await;
    assert_eq!(length(&mut client).await, 6, "whoever repairs it may need them");
    lab.execute("alter table public.away rename to counters").await;
    lab.await_value("a", 6).await;
    eventually("entries left", 1, async || length(&mut lab.client().await).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_what_the_stream_still_holds_are_never_merged() {
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
