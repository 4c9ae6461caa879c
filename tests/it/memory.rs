//! What a worker holds is bounded by its settings, whatever the entries are like.

use rustix::process::Signal;

use crate::harness::{Daemon, GROUP, Lab, STREAM, eventually};

/// Each of them alone is larger than what a worker may hold.
const HUGE: usize = 64 << 20;
/// Within the limit for an entry, and far more in one reply than a batch may hold.
const LARGE: usize = 200 << 10;
/// What the program takes by itself beside its code, its telemetry among it, four batches of 1 MiB, two entries of 256 KiB on the wire, and what the allocator keeps.
const MEBIBYTES: u64 = 40;

/// A stream of 210 MB: huge entries, large ones and small ones.
async fn fill(lab: &Lab) {
    let mut client = lab.client().await;
    let (huge, large) = (vec![b'x'; HUGE], vec![b'x'; LARGE]);
    for _ in 0..2 {
        client.add("small", 1).await;
        let fields: [&[u8]; 6] = [b"id", b"huge", b"amount", b"1", b"padding", &huge];
        client.call(&[&[b"XADD".as_slice(), STREAM.as_bytes(), b"*"], &fields[..]].concat()).await;
        for _ in 0..200 {
            let fields: [&[u8]; 6] = [b"id", b"large", b"amount", b"1", b"padding", &large];
            client.call(&[&[b"XADD".as_slice(), STREAM.as_bytes(), b"*"], &fields[..]].concat()).await;
        }
    }
}

/// A daemon that may hold little and trims at once.
fn frugal(lab: &Lab) -> Daemon {
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__BATCH__MAX_BYTES", "1MiB").env("TIDEGATE__BATCH__MAX_ENTRY_BYTES", "256KiB");
    command.env("TIDEGATE__DEAD_LETTERS__MAX_BYTES", "64KiB").env("TIDEGATE__TRIM__RETENTION", "0s");
    Daemon::start(command)
}

/// All that is good has landed, and all that is huge is a dead letter that keeps its digest.
async fn assert_landed(lab: &Lab) {
    lab.await_value("large", 400).await;
    lab.await_value("small", 2).await;
    lab.assert_settled().await;
    let letters = "select count(*) from tidegate.dead_letters where shortened and bytes > 64 * 1024 * 1024";
    assert_eq!(lab.number(letters).await, 2);
    // Trimming compares all but the last with the ledger, whole.
    let mut client = lab.client().await;
    eventually("left in the stream", Some(1), async || client.call(&["XLEN", STREAM]).await.int()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_holds_a_few_batches_however_large_entries_are() {
    let lab = Lab::new().await;
    fill(&lab).await;
    let daemon = frugal(&lab);
    assert_landed(&lab).await;
    let peak = daemon.peak_mebibytes_of_data();
    assert!(peak <= MEBIBYTES, "{peak} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn taking_over_what_the_dead_held_needs_no_more() {
    let lab = Lab::new().await;
    fill(&lab).await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    let daemon = frugal(&lab);
    assert_landed(&lab).await;
    let peak = daemon.peak_mebibytes_of_data();
    assert!(peak <= MEBIBYTES, "{peak} MiB");
}

/// Rows of any table take no more, although their keys and values are spelled once more to be sent: 60,000 rows of bytes, texts and objects.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_any_table_need_no_more() {
    let lab = Lab::new().await;
    lab.execute(
        "create table public.wide (k bytea primary key, n bigint, t text, tv numeric, doc jsonb, docv jsonb, many bytea)",
    )
    .await;
    let mut client = lab.client().await;
    let text = "x".repeat(300);
    for first in (0..60_000).step_by(2_000) {
        let entry = |n: usize| {
            let (key, doc) = (format!("key-{n:0>40}"), format!("{{\"k{}\": \"{text}\"}}", n % 7));
            ["XADD", "flush:wide", "*", "k", &key, "t", &text, "doc", &doc].map(str::to_owned)
        };
        client.pipeline(&(first..first + 2_000).map(entry).collect::<Vec<_>>()).await;
    }
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__BATCH__MAX_BYTES", "1MiB").env("TIDEGATE__BATCH__MAX_ENTRY_BYTES", "256KiB");
    command.env("TIDEGATE__DEAD_LETTERS__MAX_BYTES", "64KiB");
    for (key, value) in [
        ("STREAM", "flush:wide"),
        ("TABLE", "wide"),
        ("KEYS", "k: bytea"),
        ("VALUES", "n = count(), t = last(t) by tv, doc = jsonb_merge(doc) by docv, many = distinct(t)"),
        ("UPDATED_AT_COLUMN", ""),
    ] {
        command.env(format!("TIDEGATE__PIPELINES__WIDE__{key}"), value);
    }
    let daemon = Daemon::start(command);
    eventually("all rows", 60_000, async || lab.number("select count(*) from public.wide").await).await;
    let peak = daemon.peak_mebibytes_of_data();
    assert!(peak <= MEBIBYTES, "{peak} MiB");
}

/// A worker of tiny batches: nearly every reply is longer than one.
fn tiny(lab: &Lab) -> Daemon {
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__BATCH__MAX_BYTES", "16KiB").env("TIDEGATE__BATCH__MAX_ENTRY_BYTES", "8KiB");
    command.env("TIDEGATE__DEAD_LETTERS__MAX_BYTES", "4KiB").env("TIDEGATE__RUN__WORKERS", "2");
    Daemon::start(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_killed_and_stopped_in_the_middle_of_a_reply_lose_and_double_nothing() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemons = [tiny(&lab), tiny(&lab)];
    let padding = vec![b'x'; 40_000];
    let (mut applied, mut buried) = (0, 0);
    for round in 0..10 {
        for n in 0..300 {
            // Small ones, ones that nearly fill a batch, and a few that are too large.
            let length = if n % 50 == 7 {
                20_000 + n
            } else if n % 5 == 0 {
                7_000
            } else {
                n
            };
            if length > 8 << 10 {
                buried += 1
            } else {
                applied += 1
            }
            let fields: [&[u8]; 6] = [b"id", b"a", b"amount", b"1", b"padding", &padding[..length]];
            client.call(&[&[b"XADD".as_slice(), STREAM.as_bytes(), b"*"], &fields[..]].concat()).await;
        }
        let daemon = &mut daemons[round % 2];
        if round % 4 < 2 {
            daemon.kill().await;
        } else {
            daemon.signal(Signal::TERM);
            let status = daemon.exit().await;
            assert!(status.success(), "{status}: {}", daemon.last_lines());
            assert_eq!(daemon.wait_for("stopped").await["phase"], "settled");
        }
        *daemon = tiny(&lab);
        daemon.wait_for("running").await;
    }
    lab.await_value("a", applied).await;
    eventually("letters", buried, async || lab.number("select count(*) from tidegate.dead_letters").await).await;
    lab.assert_settled().await;
    assert_eq!(lab.in_ledger().await, applied + buried);
}
