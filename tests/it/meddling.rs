//! What operators and administrators change under running workers, and what they set for roles and databases: nothing is lost, doubled or buried for it.

use std::collections::BTreeSet;

use crate::harness::{Client, Daemon, GROUP, Lab, Resp, STREAM, eventually, valkey};

/// So many keys: a flush of them waits for its turn where there are several processes.
const KEYS: i64 = 300;

const GOOD: &str = "select coalesce(sum(value), 0)::bigint from public.counters where id like 'good%'";
const LETTERS: &str = "select count(*) from tidegate.dead_letters";

/// One increment of each of many keys, and one of each of these among them.
async fn add_all(client: &mut Client, odd: &[&str]) {
    for n in 0..KEYS {
        client.add(&format!("good{n}"), 1).await;
        if n == KEYS / 2 {
            for key in odd {
                client.add(key, 1).await;
            }
        }
    }
}

/// A foreign key that is checked at COMMIT.
async fn with_parents(lab: &Lab) {
    lab.execute(
        "create table public.parents (id text primary key);
         insert into public.parents select 'good' || n from generate_series(0, 299) n;
         alter table public.counters add foreign key (id) references public.parents deferrable initially deferred",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_at_commit_is_found_and_its_neighbours_land() {
    for exclusive in [false, true] {
        let lab = Lab::new().await;
        with_parents(&lab).await;
        let mut client = lab.client().await;
        // First as a reclaimed batch, in a transaction of several statements.
        client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
        add_all(&mut client, &["orphan", "foundling"]).await;
        client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
        let start = || Daemon::start(if exclusive { lab.exclusive(&["run"]) } else { lab.program(&["run"]) });
        // Two processes take turns.
        let mut daemons = [start(), start()];
        eventually("good", KEYS, async || lab.number(GOOD).await).await;
        eventually("letters", 2, async || lab.number(LETTERS).await).await;
        // Then fresh, in one statement, or in one call.
        add_all(&mut client, &["orphan", "foundling"]).await;
        eventually("good", 2 * KEYS, async || lab.number(GOOD).await).await;
        eventually("letters", 4, async || lab.number(LETTERS).await).await;
        lab.assert_settled().await;
        for daemon in &mut daemons {
            assert_eq!(daemon.count("flushing is halted"), 0, "{}", daemon.last_lines());
        }
    }
}

/// What an administrator may have set for the role, for reasons of others.
const SETTINGS: [(&str, &str); 22] = [
    ("statement_timeout", "'1ms'"),
    ("lock_timeout", "'1ms'"),
    ("idle_in_transaction_session_timeout", "'1ms'"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("search_path", "nowhere"),
    ("synchronous_commit", "off"),
    ("row_security", "off"),
    ("DateStyle", "'SQL, DMY'"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "'Asia/Kathmandu'"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-15"),
    ("client_encoding", "latin1"),
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "on"),
    ("array_nulls", "off"),
    ("transform_null_equals", "on"),
    ("quote_all_identifiers", "on"),
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_indexscan", "off"),
    ("jit_above_cost", "0"),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_for_the_role_changes_no_count_and_interrupts_nothing() {
    for exclusive in [false, true] {
        let lab = Lab::new().await;
        // A role of this database alone: the server is everybody's.
        let role = format!("worker_{}", lab.database.rsplit('/').next().expect("a name"));
        lab.execute(&format!(
            "create role {role} login; grant usage on schema tidegate, public to {role};
             grant all on all tables in schema tidegate, public to {role}"
        ))
        .await;
        for (name, value) in SETTINGS {
            // Some are called otherwise, or are gone, in other versions.
            let known = lab.number(&format!("select count(*) from pg_settings where name = '{name}'")).await;
            if known == 1 {
                lab.execute(&format!("alter role {role} set {name} = {value}")).await;
            }
        }
        let mut client = lab.client().await;
        client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
        let odd = ["o'neill \\ \"é\" 千", "NULL", "a\\'b", "tab\there"];
        add_all(&mut client, &odd).await;
        client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "COUNT", "200", "STREAMS", STREAM, ">"]).await;
        let (_, place) = lab.database.split_once('@').expect("a user in the url");
        let start = || {
            let mut command = lab.unhurried(if exclusive { lab.exclusive(&["run"]) } else { lab.program(&["run"]) });
            command.env("DATABASE_URL", format!("postgres://{role}@{place}"));
            Daemon::start(command)
        };
        let mut daemons = [start(), start()];
        for round in 1..=3 {
            eventually("good", round * KEYS, async || lab.number(GOOD).await).await;
            for key in odd {
                lab.await_value(key, round).await;
            }
            if round < 3 {
                add_all(&mut client, &odd).await;
            }
        }
        client.call(&["XADD", STREAM, "*", "id", "bad", "amount", "1.5"]).await;
        eventually("letters", 1, async || lab.number(LETTERS).await).await;
        lab.assert_settled().await;
        for daemon in &mut daemons {
            for line in ["flushing is halted", "flushing is interrupted", "reading is halted"] {
                assert_eq!(daemon.count(line), 0, "{}", daemon.last_lines());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_changed_under_its_workers_halts_them_or_is_written_on() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    let mut value = 1;
    for (change, back) in [
        (
            "alter table public.counters rename column value to v",
            "alter table public.counters rename column v to value",
        ),
        (
            "alter table public.counters rename to real; create view public.counters as select id, value from public.real",
            "drop view public.counters; alter table public.real rename to counters",
        ),
        (
            "alter table public.counters alter column value type text",
            "alter table public.counters alter column value drop default;
             alter table public.counters alter column value type bigint using value::bigint;
             alter table public.counters alter column value set default 0",
        ),
    ] {
        lab.execute(change).await;
        client.add_many("a", 10).await;
        daemon.wait_for("flushing is halted").await;
        lab.execute(back).await;
        daemon.wait_for("flushing goes on").await;
        value += 10;
        lab.await_value("a", value).await;
        daemon.forget();
    }
    // What the deltas still fit into is written on.
    for change in [
        "alter table public.counters alter column value type numeric",
        "alter table public.counters add column note text default 'x'",
        "alter table public.counters alter column value type bigint",
        "alter table public.counters drop column note",
        "create table public.copy (like public.counters including all); insert into public.copy select * from public.counters;
         drop table public.counters; alter table public.copy rename to counters",
    ] {
        lab.execute(change).await;
        client.add_many("a", 10).await;
        value += 10;
        eventually(change, value, async || lab.number("select value::bigint from public.counters where id = 'a'").await)
            .await;
    }
    assert_eq!(daemon.count("flushing is halted"), 0, "{}", daemon.last_lines());
    assert_eq!(lab.number(LETTERS).await, 0);
    lab.assert_settled().await;
}

/// The value of a field in a list of fields and values.
fn of(told: &[Resp], name: &str) -> Option<Resp> {
    let at = told.iter().position(|field| *field == Resp::Text(name.into()))?;
    told.get(at + 1).cloned()
}

/// Whether the group is there, has everything that the stream has, and has settled it.
async fn has_caught_up(client: &mut Client) -> bool {
    let Resp::Array(stream) = client.call(&["XINFO", "STREAM", STREAM]).await else { return false };
    let Resp::Array(groups) = client.call(&["XINFO", "GROUPS", STREAM]).await else { return false };
    let last = match of(&stream, "last-entry") {
        Some(Resp::Array(entry)) => Some(entry[0].clone()),
        _ => of(&stream, "last-generated-id"),
    };
    groups
        .into_iter()
        .map(Resp::array)
        .any(|group| of(&group, "pending") == Some(Resp::Int(0)) && of(&group, "last-delivered-id") == last)
}

/// Every entry that the stream holds is one of these keys, and each has landed once.
async fn each_landed_once(lab: &Lab, keys: &BTreeSet<String>) {
    eventually("caught up", true, async || has_caught_up(&mut lab.client().await).await).await;
    let count = "select count(*) from public.counters";
    eventually("rows", keys.len() as i64, async || lab.number(count).await).await;
    assert_eq!(lab.number("select count(*) from public.counters where value <> 1").await, 0, "doubled");
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_an_operator_moves_and_groups_that_are_set_back_double_nothing() {
    for exclusive in [false, true] {
        let lab = Lab::new().await;
        let mut daemon = Daemon::start(if exclusive { lab.exclusive(&["run"]) } else { lab.program(&["run"]) });
        let mut client = lab.client().await;
        let mut keys = BTreeSet::new();
        client.add("first", 1).await;
        keys.insert("first".to_owned());
        lab.await_value("first", 1).await;
        for round in 0..12u64 {
            for n in 0..20 {
                let key = format!("{round}-{n}");
                client.add(&key, 1).await;
                keys.insert(key);
            }
            let told = client.call(&["XINFO", "STREAM", STREAM]).await.array();
            let last = of(&told, "last-generated-id").map(|last| last.text());
            let ms: u64 = last.and_then(|last| last.split('-').next()?.parse().ok()).expect("an id");
            match round % 4 {
                // An hour ahead at the end: ids go on from there.
                0 => client.call(&["XSETID", STREAM, &format!("{}-7", ms + round * 300_000)]).await,
                1 => client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await,
                2 => client.call(&["XGROUP", "SETID", STREAM, GROUP, &format!("{ms}-0"), "ENTRIESREAD", "3"]).await,
                _ => client.call(&["XGROUP", "DESTROY", STREAM, GROUP]).await,
            };
            if round % 4 == 2 {
                // What lay between may have been passed over: it is brought again.
                client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
            }
            each_landed_once(&lab, &keys).await;
        }
        // The stream begins again, below all ids that the ledger knows, with other entries.
        client.call(&["DEL", STREAM]).await;
        for n in 1..=20 {
            let key = format!("again-{n}");
            client.call(&["XADD", STREAM, &format!("{n}-0"), "id", &key, "amount", "1"]).await;
            keys.insert(key);
        }
        each_landed_once(&lab, &keys).await;
        assert_eq!(daemon.count("flushing is halted"), 0, "{}", daemon.last_lines());
        assert_eq!(lab.number(LETTERS).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_limit_that_is_set_below_what_is_used_lets_everything_drain() {
    for exclusive in [false, true] {
        let lab = Lab { valkey: valkey(&["--maxmemory-policy", "noeviction"]).await, ..Lab::new().await };
        let mut client = lab.client().await;
        let mut command = if exclusive { lab.exclusive(&["run"]) } else { lab.program(&["run"]) };
        command.env("TIDEGATE__TRIM__RETENTION", "0s");
        let mut daemon = Daemon::start(command);
        client.add("a", 1).await;
        lab.await_value("a", 1).await;
        for _ in 0..4 {
            client.add_many("a", 5_000).await;
            client.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
            assert!(matches!(client.call(&["SET", "x", "1"]).await, Resp::Error(why) if why.starts_with("OOM")));
            let length = async || client.call(&["XLEN", STREAM]).await.int() <= Some(1);
            eventually("settled, and trimmed", true, length).await;
            client.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
        }
        lab.await_value("a", 20_001).await;
        assert_eq!(daemon.count("reading is halted"), 0, "{}", daemon.last_lines());
        assert_eq!(lab.number(LETTERS).await, 0);
    }
}
