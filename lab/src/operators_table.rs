//! A table with every operator, fed from the same read as the counters, and what it must hold.
//!
//! The entries say all that is needed: an amount that no other entry of a round has, whether it is even, and a small document. So each row is computed from
//! the entries whose digests the ledger holds, as the counters are.

use std::collections::{BTreeMap, HashMap};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row};
use tidegate::model::entry::EntryId;
use tidegate_lab::harness::STREAM;
use tokio::process::Command;

use crate::journal::Meant;

const CREATE: &str = "create table if not exists public.operators (
    id text primary key, n bigint not null, s numeric not null, lo bigint, hi bigint, l bigint, lv numeric, f bigint, fv numeric,
    kept bigint, alle boolean, any_even boolean, doc jsonb, docv jsonb, d bytea)";

/// Makes the table.
pub async fn create(sql: &mut PgConnection) {
    sqlx::raw_sql(CREATE).execute(sql).await.expect("the operators' table");
}

/// The daemon writes it, too.
pub fn configure(command: &mut Command) {
    // Once a pipeline is named the default one is no more than one of them.
    command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
    for (key, value) in [
        ("WITH", "counters"),
        ("TABLE", "operators"),
        ("KEYS", "id"),
        (
            "VALUES",
            "n = count(), s = sum(amount: numeric), lo = min(amount), hi = max(amount), l = last(amount: bigint) by lv, \
             f = first(amount: bigint) by fv, kept = set_if_null(amount: bigint), alle = and(even), any_even = or(even), \
             doc = jsonb_merge(doc) by docv, d = distinct(amount)",
        ),
        ("UPDATED_AT_COLUMN", ""),
    ] {
        command.env(format!("TIDEGATE__PIPELINES__OPERATORS__{key}"), value);
    }
}

/// The rows of a round, as text.
pub async fn rows(sql: &mut PgConnection, round: u32) -> Result<HashMap<String, Vec<String>>, sqlx::Error> {
    let columns = "n, s, lo, hi, l, lv, f, fv, alle, any_even, doc, kept, tidegate.distinct_count(d)";
    let texts: Vec<String> = columns.split(", ").map(|column| format!("coalesce({column}::text, '')")).collect();
    let query = format!("select id, array[{}] from public.operators where id like 'r{round}:%'", texts.join(", "));
    let rows = sqlx::query(AssertSqlSafe(query)).fetch_all(sql).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// What differs between the rows and what the entries ask for, in words.
pub fn differences(rows: &HashMap<String, Vec<String>>, applied: &[(EntryId, Meant)]) -> Vec<String> {
    let mut by_key: BTreeMap<String, Vec<(EntryId, Meant)>> = BTreeMap::new();
    applied.iter().for_each(|(id, meant)| by_key.entry(meant.key()).or_default().push((*id, *meant)));
    let mut wrong: Vec<String> =
        rows.keys().filter(|key| !by_key.contains_key(*key)).map(|key| format!("operators has a row {key}")).collect();
    for (key, mut entries) in by_key {
        entries.sort_by_key(|(id, _)| *id);
        let Some(row) = rows.get(&key) else {
            wrong.push(format!("operators lacks {key}"));
            continue;
        };
        // Two servers alive at once gave one id to two entries: which of the two counts as the newer one is open.
        let has_twins = entries.windows(2).any(|pair| pair[0].0 == pair[1].0);
        let expected = expected(&entries);
        for (n, (found, expected)) in row.iter().zip(&expected).enumerate() {
            if found != expected && !(has_twins && [4, 6, 10].contains(&n)) {
                wrong.push(format!("operators {key}, column {n}: is {found}, the ledger's entries make {expected}"));
            }
        }
        let deltas: Vec<String> = entries.iter().map(|(_, meant)| meant.delta().to_string()).collect();
        if !deltas.contains(&row[11]) {
            wrong.push(format!("operators {key}: kept is {}, which no entry brought", row[11]));
        }
        // Far more than the sketch's standard error.
        let (about, exactly) = (row[12].parse().unwrap_or(0.0), deltas.len() as f64);
        if (about - exactly).abs() > 2.0 + exactly * 0.1 {
            wrong.push(format!("operators {key}: about {about} different amounts of {exactly}"));
        }
    }
    wrong
}

/// The columns of one row, but for those that have no exact value.
fn expected(entries: &[(EntryId, Meant)]) -> Vec<String> {
    let deltas = || entries.iter().map(|(_, meant)| meant.delta());
    let text = |number: Option<i64>| number.map_or(String::new(), |number| number.to_string());
    let (first, last) = (entries.first(), entries.last());
    let evens: Vec<bool> = deltas().map(|delta| delta % 2 == 0).collect();
    let mut doc = BTreeMap::new();
    for (_, meant) in entries {
        doc.insert(meant.writer, meant.n);
    }
    let doc: Vec<String> = doc.iter().map(|(writer, n)| format!("\"w{writer}\": {n}")).collect();
    vec![
        entries.len().to_string(),
        deltas().sum::<i64>().to_string(),
        text(deltas().min()),
        text(deltas().max()),
        text(last.map(|(_, meant)| meant.delta())),
        last.map_or(String::new(), |(id, _)| id.number().to_string()),
        text(first.map(|(_, meant)| meant.delta())),
        first.map_or(String::new(), |(id, _)| id.number().to_string()),
        evens.iter().all(|even| *even).to_string(),
        evens.iter().any(|even| *even).to_string(),
        format!("{{{}}}", doc.join(", ")),
    ]
}
