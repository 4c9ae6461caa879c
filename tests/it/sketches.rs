//! Sketches and objects in PostgreSQL: what it merges and counts is what memory merges and counts; what is foreign is refused with a sentence.

use std::time::Instant;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};
use tidegate::merge::distinct::estimate;
use tidegate::model::target::Write;

use crate::harness::database;
use crate::operators::{Entry, Flush, table};

async fn connected(url: &str) -> PgConnection {
    PgConnection::connect(url).await.expect("connected")
}

async fn execute(sql: &mut PgConnection, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()))
        .execute(sql)
        .await
        .unwrap_or_else(|e| panic!("{statement}: {e}"));
}

async fn bytes(sql: &mut PgConnection, query: &str) -> Vec<u8> {
    sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(sql).await.unwrap_or_else(|e| panic!("{query}: {e}"))
}

async fn number(sql: &mut PgConnection, query: &str) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(sql).await.unwrap_or_else(|e| panic!("{query}: {e}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_has_one_sketch_in_memory_and_in_postgresql_from_one_value_to_many() {
    let url = database(true).await;
    let mut sql = connected(&url).await;
    execute(
        &mut sql,
        "create table visits (k text primary key, v bytea); create table grouped (k char(9) primary key, v bytea)",
    )
    .await;
    let targets = ["visits", "grouped"].map(|name| table(name, "k", "v = distinct(v)", Write::Merge));
    let flush = Flush::of(&url, targets.into()).await.expect("the tables fit");
    let (mut ms, mut again) = (1_000, 1_000_000_000);
    // Whole: all at once. Small: in batches of a few, sparse into sparse. Large: dense into dense. Mixed: each into each.
    let cuts = [
        ("whole", vec![6_000]),
        ("small", vec![7; 100]),
        ("large", vec![1_500; 4]),
        ("mixed", vec![1, 600, 3, 40, 2_000, 1, 300]),
    ];
    for (key, lengths) in cuts {
        let (mut from, mut batches) = (0, Vec::new());
        for length in lengths {
            let entries = (from..from + length).map(|n: u64| {
                ms += 1;
                Entry::of(ms, [("k", key), ("v", &format!("visitor-{n}"))])
            });
            batches.push(entries.collect::<Vec<_>>());
            // Half of them come again.
            from += length - length / 2;
        }
        let all: Vec<Entry> = batches
            .iter()
            .flatten()
            .map(|entry| {
                again += 1;
                entry.again(again, "k", &format!("{key}-all"))
            })
            .collect();
        for batch in &batches {
            flush.flush(batch).await.expect("flushed");
        }
        flush.flush(&all).await.expect("flushed");
        for table in ["visits", "grouped"] {
            let merged = bytes(&mut sql, &format!("select v from {table} where k = '{key}'")).await;
            let folded = bytes(&mut sql, &format!("select v from {table} where k = '{key}-all'")).await;
            assert_eq!((merged.len(), merged == folded), (folded.len(), true), "{table}, {key}: one sketch of one set");
            let counted =
                number(&mut sql, &format!("select tidegate.distinct_count(v) from {table} where k = '{key}'")).await;
            assert_eq!(estimate(&merged), u64::try_from(counted).ok(), "{table}, {key}");
        }
    }
    let union = "select tidegate.distinct_count(tidegate.distinct_union(v)) from visits";
    let whole = "select tidegate.distinct_count(v) from visits where k = 'whole'";
    assert_eq!(number(&mut sql, union).await, number(&mut sql, whole).await, "all others are part of the whole");
    assert!((5_700..6_300).contains(&number(&mut sql, whole).await));
    assert_eq!(
        number(
            &mut sql,
            "select coalesce(tidegate.distinct_count(tidegate.distinct_union(v)), -1) from visits where false"
        )
        .await,
        -1
    );
    assert_eq!(number(&mut sql, "select tidegate.distinct_count('\\xd100')").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_sketch_is_refused_with_a_sentence_and_its_neighbours_go_on() {
    let url = database(true).await;
    let mut sql = connected(&url).await;
    let dense = |byte: &str| format!("'\\xd101'::bytea || decode(repeat('{byte}', 4096), 'hex')");
    let foreign = [
        "'\\x'".to_owned(),
        "'\\xd1'".into(),
        "'\\xd200'".into(),
        "'\\xd10001'".into(),
        "'\\xd10200'".into(),
        "'\\xd10100'".into(),
        "'hello'".into(),
    ];
    let damaged = [
        "'\\xd100100001'".to_owned(),
        "'\\xd100000100'".into(),
        "'\\xd100000136'".into(),
        "'\\xd100000201000101'".into(),
        dense("36"),
        dense("ff"),
    ];
    for (bytes, said) in
        foreign.iter().map(|b| (b, "no sketch of tidegate")).chain(damaged.iter().map(|b| (b, "is damaged")))
    {
        let query = format!("select tidegate.distinct_count({bytes})");
        let why = sqlx::query(AssertSqlSafe(query)).execute(&mut sql).await.expect_err("refused").to_string();
        assert!(why.contains(said), "{bytes}: {why}");
    }
    for (held, met) in [
        (dense("ff"), dense("01")),
        (dense("01"), "'\\xd100ffff01'".into()),
        ("'\\xd100000101'".into(), "'\\xd100000102ff'".into()),
    ] {
        let query = format!("select tidegate.distinct_merge({held}, {met})");
        sqlx::query(AssertSqlSafe(query)).execute(&mut sql).await.expect_err("refused");
    }
    execute(
        &mut sql,
        "create table visits (k text primary key, v bytea); insert into visits values ('foreign', 'hello')",
    )
    .await;
    let flush =
        Flush::of(&url, vec![table("visits", "k", "v = distinct(v)", Write::Merge)]).await.expect("the table fits");
    let why = flush.flush(&[Entry::of(1_000, [("k", "foreign"), ("v", "a")])]).await.expect_err("refused");
    assert!(why.contains("22023") && why.contains("no sketch of tidegate"), "{why}");
    flush.flush(&[Entry::of(1_001, [("k", "good"), ("v", "a")])]).await.expect("flushed");
    assert_eq!(number(&mut sql, "select tidegate.distinct_count(v) from visits where k = 'good'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_that_brings_nothing_new_leaves_the_stored_sketch_where_it_is() {
    let url = database(true).await;
    let mut sql = connected(&url).await;
    execute(&mut sql, "create table visits (k text primary key, v bytea)").await;
    execute(&mut sql, "alter table visits alter column v set storage external").await;
    let flush =
        Flush::of(&url, vec![table("visits", "k", "v = distinct(v)", Write::Merge)]).await.expect("the table fits");
    let visit = |ms: u64, n: u64| Entry::of(ms, [("k", "a"), ("v", &n.to_string())]);
    flush.flush(&(0..6_000).map(|n| visit(1_000 + n, n)).collect::<Vec<_>>()).await.expect("flushed");
    let chunks = "select max(chunk_id::text::bigint) from pg_toast.pg_toast_";
    let toast = number(&mut sql, "select 'visits'::regclass::oid::bigint").await;
    let before = number(&mut sql, &format!("{chunks}{toast}")).await;
    flush.flush(&(0..100).map(|n| visit(10_000_000 + n, n)).collect::<Vec<_>>()).await.expect("flushed");
    assert_eq!(number(&mut sql, &format!("{chunks}{toast}")).await, before, "nothing was written out of line");
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_meet_what_is_there_and_what_is_no_object_is_refused() {
    let url = database(true).await;
    let mut sql = connected(&url).await;
    execute(
        &mut sql,
        "create table profiles (k text primary key, v jsonb, by jsonb);
         insert into profiles values ('by_hand', '{\"a\": 1, \"z\": 9}', null), ('null', 'null', '[]'), ('array', '[1]', null),
                                     ('odd', '{\"a\": 1}', '{\"a\": \"x\"}')",
    )
    .await;
    let flush =
        Flush::of(&url, vec![table("profiles", "k", "v = jsonb_merge(v) by by", Write::Merge)]).await.expect("fits");
    for (ms, key) in [(1_000, "by_hand"), (1_001, "null"), (1_002, "odd")] {
        flush.flush(&[Entry::of(ms, [("k", key), ("v", "{\"a\": null, \"b\": 1.10}")])]).await.expect("flushed");
        let z = if key == "by_hand" { ", \"z\": 9" } else { "" };
        let query = format!(
            "select count(*) from profiles where k = '{key}' and v::text = '{{\"a\": null, \"b\": 1.10{z}}}' and (by -> 'b')::numeric = {}",
            u128::from(ms) << 64
        );
        assert_eq!(number(&mut sql, &query).await, 1, "{key}");
    }
    let why = flush.flush(&[Entry::of(2_000, [("k", "array"), ("v", "{\"a\": 1}")])]).await.expect_err("refused");
    assert!(why.contains("22023") && why.contains("holds a JSON array"), "{why}");
    // Each of these PostgreSQL or we refuse; it is buried alone, for a reason that is known before it is sent.
    for (n, bad) in ["[1]", "{\"a\":\"\\u0000\"}", "{\"a\":1,\"a\":2}", "{\"a\":1e2000}", "{\"a\":\"\\ud800\"}", "{"]
        .into_iter()
        .enumerate()
    {
        let said = flush.flush(&[Entry::of(3_000 + n as u64, [("k", "bad"), ("v", bad)])]).await;
        assert_eq!(said, Err("1 entries were buried".into()), "{bad}");
    }
    assert_eq!(number(&mut sql, "select count(*) from tidegate.dead_letters where reason = 'bad_field'").await, 6);
}

/// Prints what docs/sketches.md says: `cargo test --test it sketches::costs -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement, for the document"]
async fn costs() {
    let url = database(true).await;
    let mut sql = connected(&url).await;
    execute(
        &mut sql,
        "create function dense(seed float8) returns bytea language plpgsql as $$
         declare s bytea := '\\xd101'::bytea || decode(repeat('02', 4096), 'hex');
         begin perform setseed(seed); for at in 2..4097 loop s := set_byte(s, at, 1 + (random() * 5)::int); end loop; return s; end $$;
         create function sparse(registers int, step int) returns bytea language sql as $$
         select '\\xd100'::bytea || string_agg(decode(lpad(to_hex(n * step), 4, '0') || '03', 'hex'), '' order by n) from generate_series(1, registers) n $$;
         create temp table s as select dense(0.1) d, dense(0.2) e, sparse(200, 16) s200, sparse(10, 300) s10, sparse(1, 77) s1",
    )
    .await;
    for (what, call) in [
        ("nothing", "octet_length(d)"),
        ("merge 1 register into a sparse sketch of 200", "tidegate.distinct_merge(s200, s1)"),
        ("merge 10 registers into a sparse sketch of 200", "tidegate.distinct_merge(s200, s10)"),
        ("merge 1 register into a dense sketch", "tidegate.distinct_merge(d, s1)"),
        ("merge 10 registers into a dense sketch", "tidegate.distinct_merge(d, s10)"),
        ("merge 200 registers into a dense sketch", "tidegate.distinct_merge(d, s200)"),
        ("merge two dense sketches", "tidegate.distinct_merge(d, e)"),
        ("count a sparse sketch of 200 registers", "tidegate.distinct_count(s200)"),
        ("count a dense sketch", "tidegate.distinct_count(d)"),
    ] {
        let query = format!("select count({call}) from s, generate_series(1, 500) where random() >= 0");
        execute(&mut sql, &query).await;
        let started = Instant::now();
        execute(&mut sql, &query).await;
        eprintln!("| {what} | {:.0} µs |", started.elapsed().as_micros() as f64 / 500.0);
    }
}
