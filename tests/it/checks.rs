//! Tables with a CHECK on a value: it meets what comes of a delta, and not the delta.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::harness::{Daemon, Lab, STREAM, eventually, output};

const DEAD: &str = "select count(*) from tidegate.dead_letters where reason = 'refused_by_table'";

/// Tables that hold no value below zero, each in its own way, with how its pipeline writes.
const TABLES: [(&str, &str, &str); 7] = [
    ("a constraint", "alter table public.counters add constraint covered check (value >= 0)", "merge"),
    (
        "a constraint over a key and a value",
        "alter table public.counters add constraint covered check (value >= 0 or id = 'credit')",
        "merge",
    ),
    (
        "a constraint of one partition",
        "drop table public.counters;
         create table public.counters (id text primary key, value bigint not null, updated_at timestamptz) partition by hash (id);
         create table public.all_of_them partition of public.counters for values with (modulus 1, remainder 0);
         alter table public.all_of_them add constraint covered check (value >= 0)",
        "merge",
    ),
    (
        "a domain of a domain",
        "create domain public.amount as bigint constraint covered check (value >= 0);
         create domain public.balance as public.amount;
         alter table public.counters alter column value type public.balance",
        "merge",
    ),
    (
        "a column that is computed",
        "alter table public.counters add column is_covered boolean generated always as (value >= 0) stored;
         alter table public.counters add constraint covered check (is_covered)",
        "merge",
    ),
    (
        "keys that PostgreSQL compares",
        "create extension citext schema public;
         alter table public.counters alter column id type public.citext;
         alter table public.counters add constraint covered check (value >= 0)",
        "merge",
    ),
    (
        "rows that go when nothing is left",
        "alter table public.counters add constraint covered check (value >= 0)",
        "delete_zero",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_balance_takes_every_withdrawal_that_it_covers() {
    for (what, setup, write) in TABLES {
        let lab = Lab::new().await;
        lab.execute(setup).await;
        let mut client = lab.client().await;
        for key in ["a", "b", "c"] {
            client.add(key, 10).await;
        }
        let mut command = lab.program(&["run"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__WRITE", write);
        let mut daemon = Daemon::start(command);
        eventually("deposits", 30, async || {
            lab.number("select coalesce(sum(value), 0)::bigint from public.counters").await
        })
        .await;
        // Withdrawals beside a deposit into a row that is not there yet, and one that is more than there is.
        for (key, delta) in [("a", -4), ("b", -10), ("new", 7), ("c", -11), ("a", -5), ("new", -2)] {
            client.add(key, delta).await;
        }
        eventually(what, 1, async || lab.number(DEAD).await).await;
        let left = "select coalesce(sum(value), 0)::bigint from public.counters where id = ";
        for (key, value) in [("a", 1), ("b", 0), ("c", 10), ("new", 5)] {
            eventually(what, value, async || lab.number(&format!("{left}'{key}'")).await).await;
        }
        lab.assert_settled().await;
        assert_eq!(lab.number(DEAD).await, 1, "{what}");
        assert_eq!(daemon.count("flushing is halted"), 0, "{what}: {}", daemon.last_lines());
        // What is covered by now is applied when it is tried again.
        client.add("c", 3).await;
        eventually(what, 13, async || lab.number(&format!("{left}'c'")).await).await;
        let mut redrive = lab.program(&["dead", "redrive", "--all", "--yes"]);
        redrive.env("TIDEGATE__PIPELINES__COUNTERS__WRITE", write);
        let (code, stdout, stderr) = output(&mut redrive).await;
        assert_eq!(code, 0, "{what}: {stdout}{stderr}");
        assert_eq!(lab.number(&format!("{left}'c'")).await, 2, "{what}");
    }
}

/// A row that is there and is not updated is missed as one that is not inserted.
#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_drops_updates_of_a_table_with_a_check_halts_the_pipeline() {
    let lab = Lab::new().await;
    lab.execute(
        "alter table public.counters add constraint covered check (value >= 0);
         insert into public.counters (id, value) values ('a', 1);
         create function public.drop_row() returns trigger language plpgsql as $$ begin return null; end $$;
         create trigger quiet before update on public.counters for each row execute function public.drop_row()",
    )
    .await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    client.add("b", 1).await;
    let mut daemon = lab.daemon();
    let line = daemon.wait_for("flushing is halted").await;
    assert!(line["fault"].as_str().is_some_and(|fault| fault.contains("only")), "{line}");
    assert_eq!((lab.value("a").await, lab.in_ledger().await), (Some(1), 0));
    lab.execute("drop trigger quiet on public.counters").await;
    lab.await_value("a", 2).await;
    lab.await_value("b", 1).await;
    lab.assert_settled().await;
}

/// Processes that update rows and insert new ones at the same time meet on both, and are killed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_a_check_is_exact_under_several_processes_and_kills() {
    let lab = Lab::new().await;
    lab.execute(
        "alter table public.counters add constraint covered check (value >= 0);
         insert into public.counters (id, value) select 'old' || n, 1000000 from generate_series(0, 49) n",
    )
    .await;
    let mut client = lab.client().await;
    let mut random = StdRng::seed_from_u64(11);
    let mut expected = 0;
    let mut commands = Vec::new();
    for _ in 0..6_000 {
        // A withdrawal from a balance that covers all of them, or a deposit into a row that somebody has to insert first.
        let (key, delta) = match random.random_bool(0.5) {
            true => (format!("old{}", random.random_range(0..50)), -random.random_range(1..100i64)),
            false => (format!("new{}", random.random_range(0..400)), random.random_range(1..100)),
        };
        expected += delta;
        commands.push(["XADD", STREAM, "*", "id", &key, "amount", &delta.to_string()].map(str::to_owned));
    }
    client.pipeline(&commands).await;
    let daemon = || {
        let mut command = lab.program(&["run"]);
        command.env("TIDEGATE__RUN__WORKERS", "2").env("TIDEGATE__BATCH__MAX_ENTRIES", "100");
        command.env("TIDEGATE__BATCH__READ_COUNT", "50").env("TIDEGATE__RECLAIM__DEAD_AFTER", "2s");
        Daemon::start(command)
    };
    let (mut killed, _others) = (daemon(), [daemon(), daemon()]);
    killed.wait_for("running").await;
    let total = "select sum(value)::bigint - 50000000 from public.counters";
    let before = lab.number(total).await;
    eventually("something that landed", true, async || lab.number(total).await != before).await;
    killed.kill().await;
    eventually("all of it", expected, async || lab.number(total).await).await;
    lab.assert_settled().await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}
