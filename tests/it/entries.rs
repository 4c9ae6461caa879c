//! What flows: from plain, atomic and careful producers, good entries and bad ones.

use std::collections::BTreeMap;

use crate::harness::{Client, Lab, Resp, STREAM};

/// Requests by path, from the access log where there is one, else made up with the same shape.
fn access_log() -> Vec<String> {
    let real = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/apache_access.log");
    if let Ok(log) = std::fs::read_to_string(real) {
        return log.lines().filter_map(|line| line.split('"').nth(1)?.split(' ').nth(1).map(str::to_owned)).collect();
    }
    // Every path as often as its number says: a few hot, many cold.
    (1..400).flat_map(|n| std::iter::repeat_n(format!("/page/{n}?q=\"ü\""), 4000 / (n * n + 3) + 1)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_of_an_access_log_is_counted_once() {
    let (lab, log) = (Lab::new().await, access_log());
    let mut totals: BTreeMap<&str, i64> = BTreeMap::new();
    log.iter().for_each(|path| *totals.entry(path).or_default() += 1);
    let _daemon = lab.daemon();
    let mut client = lab.client().await;
    for chunk in log.chunks(500) {
        let keys: Vec<String> = chunk.iter().map(|path| format!("counter:{path}")).collect();
        let commands: Vec<Vec<&str>> = chunk
            .iter()
            .zip(&keys)
            .flat_map(|(path, key)| [vec!["INCRBY", key, "1"], vec!["XADD", STREAM, "*", "id", path, "amount", "1"]])
            .collect();
        client.pipeline(&commands).await;
    }
    lab.settle_everything().await;
    let rows: Vec<(String, i64)> = sqlx::query_as("select id, value from public.counters")
        .fetch_all(&mut lab.sql().await)
        .await
        .expect("readable");
    let landed: BTreeMap<&str, i64> = rows.iter().map(|(id, value)| (id.as_str(), *value)).collect();
    assert_eq!(landed, totals);
    let gets: Vec<Vec<String>> = totals.keys().map(|path| vec!["GET".into(), format!("counter:{path}")]).collect();
    let live: Vec<i64> = client.pipeline(&gets).await.iter().map(|v| v.text().parse().expect("a number")).collect();
    assert_eq!(live, totals.values().copied().collect::<Vec<_>>());
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_multi_and_op_producers_all_count() {
    let lab = Lab::new().await;
    let _daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add("plain", 5).await;
    let multi: [&[&str]; 4] = [
        &["MULTI"],
        &["INCRBY", "counter:multi", "-7"],
        &["XADD", STREAM, "*", "id", "multi", "amount", "-7"],
        &["EXEC"],
    ];
    assert!(matches!(client.pipeline(&multi).await.last(), Some(Resp::Array(_))));
    for op in ["a", "b"] {
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        client
            .call(&["XADD", STREAM, "*", "op", op, "id", "op", "amount", "3", "traceparent", trace, "other", "field"])
            .await;
    }
    lab.await_value("plain", 5).await;
    lab.await_value("multi", -7).await;
    lab.await_value("op", 6).await;
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_entry_is_buried_with_every_byte_and_harms_no_neighbour() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    // 3 KB that do not compress: more than an index of PostgreSQL takes.
    let noise = (0..200u64).flat_map(|n| tidegate::model::entry::digest(&n.to_le_bytes()).to_string().into_bytes());
    let long_key: String = noise.map(char::from).collect();
    let max = i64::MAX.to_string();
    let bad: Vec<(&str, Vec<&[u8]>)> = vec![
        ("missing_key", vec![b"amount", b"1"]),
        ("missing_amount", vec![b"id", b"a"]),
        ("bad_amount", vec![b"id", b"a", b"amount", b"NaN"]),
        ("bad_amount", vec![b"id", b"a", b"amount", b""]),
        ("amount_overflow", vec![b"id", b"a", b"amount", b"9223372036854775808"]),
        ("bad_key", vec![b"id", b"nul\0here", b"amount", b"1"]),
        ("bad_key", vec![b"id", b"\xff\xfe", b"amount", b"1", b"\0", b"\xff"]),
        ("duplicate_field", vec![b"id", b"a", b"id", b"b", b"amount", b"1"]),
        ("refused_by_table", vec![b"id", long_key.as_bytes(), b"amount", b"1"]),
    ];
    // The highest sequence number of a millisecond: its id is a number that no floating point holds.
    let first = client.call(&["XADD", STREAM, "7-18446744073709551615", "id", "a"]).await.text();
    client.call(&["XADD", STREAM, "*", "id", "full", "amount", &max]).await;
    let mut ids = Vec::new();
    for (_, fields) in &bad {
        client.add_many("good", 50).await;
        let command: Vec<&[u8]> = [&[b"XADD".as_slice(), STREAM.as_bytes(), b"*"], &fields[..]].concat();
        ids.push(client.call(&command).await.text());
    }
    let overflow = client.call(&["XADD", STREAM, "*", "id", "full", "amount", "1"]).await.text();
    client.add_many("good", 50).await;

    lab.settle_everything().await;
    assert_eq!(lab.value("good").await, Some(50 * (bad.len() as i64 + 1)));
    assert_eq!(lab.value("full").await, Some(i64::MAX));
    assert_eq!(lab.number("select count(*) from public.counters").await, 2);
    let query = "select entry, reason, fields from tidegate.dead_letters order by id";
    let letters: Vec<(String, String, Vec<Vec<u8>>)> =
        sqlx::query_as(query).fetch_all(&mut lab.sql().await).await.expect("readable");
    let mut expected: Vec<(String, String, Vec<Vec<u8>>)> = ids
        .into_iter()
        .zip(&bad)
        .map(|(id, (reason, fields))| (id, (*reason).into(), fields.iter().map(|f| f.to_vec()).collect()))
        .collect();
    expected.insert(0, (first, "missing_amount".into(), vec![b"id".to_vec(), b"a".to_vec()]));
    let fields = ["id", "full", "amount", "1"].map(|f| f.as_bytes().to_vec()).to_vec();
    expected.push((overflow, "refused_by_table".into(), fields));
    assert_eq!(letters.len(), expected.len());
    for (found, expected) in letters.iter().zip(&expected) {
        assert_eq!((&found.0, &found.1), (&expected.0, &expected.1));
        assert!(found.2 == expected.2, "{}: not every byte was kept", found.0);
    }
    lab.assert_settled().await;
    // Dead letters are settled entries like any other: the ledger holds them too.
    assert_eq!(lab.in_ledger().await, 50 * (bad.len() as i64 + 1) + bad.len() as i64 + 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn halving_finds_exactly_the_poison_in_few_transactions() {
    const EACH: i64 = 500;
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint fine check (id not like 'bad%')").await;
    let mut client = lab.client().await;
    // Beside each other, at the ends, and apart: so many bad ones before each stretch of good ones.
    let mut bad = Vec::new();
    for together in [2, 0, 1, 1] {
        for _ in 0..together {
            bad.push(client.add(&format!("bad{}", bad.len()), 1).await);
        }
        client.add_many("good", EACH as usize).await;
    }
    bad.push(client.add("bad at the end", 1).await);
    let mut daemon = lab.settle_everything().await;
    assert_eq!(lab.value("good").await, Some(4 * EACH));
    let query = "select entry from tidegate.dead_letters where reason = 'refused_by_table' order by id";
    let buried: Vec<String> = sqlx::query_scalar(query).fetch_all(&mut lab.sql().await).await.expect("readable");
    assert_eq!(buried, bad);
    lab.assert_settled().await;
    // From 2,005 entries down to one are eleven halvings, some of them shared; then each has a second chance.
    let halvings = daemon.count("the table refused a piece");
    assert!((11..=13 * bad.len()).contains(&halvings), "{halvings} halvings for {} bad entries", bad.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_refuses_everything_halts_the_pipeline_and_buries_nothing() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint never check (value < 0)").await;
    let mut client = lab.client().await;
    client.add_many("a", 300).await;
    let mut daemon = lab.daemon();
    daemon.wait_for("flushing is halted").await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
    lab.execute("alter table public.counters drop constraint never").await;
    lab.await_value("a", 300).await;
    lab.assert_settled().await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_partition_is_no_poison() {
    let lab = Lab::new().await;
    lab.execute(
        "drop table public.counters;
         create table public.counters (id text primary key, value bigint not null, updated_at timestamptz) partition by list (id);
         create table public.a partition of public.counters for values in ('a')",
    )
    .await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    client.add("b", 1).await;
    daemon.wait_for("flushing is halted").await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
    lab.execute("create table public.b partition of public.counters for values in ('b')").await;
    lab.await_value("b", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_kills_its_readers_is_tried_alone_and_then_buried() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let deadly = client.add("deadly", 1).await;
    client.add("innocent", 1).await;
    // What eight dead processes leave behind: each had taken it and settled nothing.
    client.call(&["XGROUP", "CREATE", STREAM, crate::harness::GROUP, "0"]).await;
    client.call(&["XREADGROUP", "GROUP", crate::harness::GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    client.call(&["XCLAIM", STREAM, crate::harness::GROUP, "dead", "0", &deadly, "RETRYCOUNT", "8", "JUSTID"]).await;
    let mut daemon = lab.daemon();
    daemon.wait_for("entries were buried").await;
    lab.await_value("innocent", 1).await;
    assert_eq!(lab.value("deadly").await, None);
    let reason = "select count(*) from tidegate.dead_letters where reason = 'kills_the_process'";
    assert_eq!(lab.number(reason).await, 1);
    lab.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_table_by_other_columns_is_fed_beside_the_default_one() {
    let lab = Lab::new().await;
    lab.execute(
        "create schema app; create table app.\"Order\" (\"Page\" text primary key, \"Select\" bigint not null default 0)",
    )
    .await;
    let mut command = lab.program(&["run"]);
    for (key, value) in [
        ("STREAM", "flush:views"),
        ("TABLE", "app.Order"),
        ("KEY_COLUMN", "Page"),
        ("VALUE_COLUMN", "Select"),
        ("UPDATED_AT_COLUMN", ""),
        ("KEY_FIELD", "page"),
        ("VALUE_FIELD", "views"),
    ] {
        command.env(format!("TIDEGATE__PIPELINES__VIEWS__{key}"), value);
    }
    command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
    let _daemon = crate::harness::Daemon::start(command);
    let mut client: Client = lab.client().await;
    client.call(&["XADD", "flush:views", "*", "page", "/", "views", "2"]).await;
    client.call(&["XADD", "flush:views", "*", "page", "/", "views", "3"]).await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    crate::harness::eventually("views", 5, async || lab.number("select max(\"Select\") from app.\"Order\"").await)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_key_is_a_key_like_any_other() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("", 2).await;
    client.add("", 3).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("").await, Some(5));
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}
