//! Which type of a column takes which operator: a table for each type, tried with a real flush. `docs/types.md` says what this test found:
//! `TIDEGATE_UPDATE_DOCS=1 cargo test --test it types` writes it; without the variable a difference is a failure.

use std::collections::BTreeMap;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};
use tidegate::merge::Merge;
use tidegate::model::target::{Kind, Write, parse_values};

use crate::harness::database;
use crate::operators::{Entry, Flush, table};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/types.md");

/// A type of a column: as SQL writes it, how a field for it is best read, and two values, the lower one first.
struct Type(&'static str, &'static str, [&'static str; 2]);

const TYPES: [Type; 52] = [
    Type("smallint", "bigint", ["3", "4"]),
    Type("integer", "bigint", ["3", "4"]),
    Type("bigint", "bigint", ["3", "4"]),
    Type("numeric", "numeric", ["1.5", "2.25"]),
    Type("numeric(10, 2)", "numeric(2)", ["1.5", "2.25"]),
    Type("numeric(10, -2)", "numeric(0)", ["100", "200"]),
    Type("real", "text", ["1.5", "2.25"]),
    Type("double precision", "text", ["1.5", "2.25"]),
    Type("money", "text", ["1.5", "2.25"]),
    Type("text", "text", ["a", "b"]),
    Type("character varying", "text", ["a", "b"]),
    Type("character varying(9)", "text", ["a", "b"]),
    Type("character(9)", "text", ["abc", "abd"]),
    Type("bpchar", "text", ["abc", "abd"]),
    Type("\"char\"", "text", ["a", "b"]),
    Type("name", "text", ["a", "b"]),
    Type("citext", "text", ["a", "b"]),
    Type("uuid", "uuid", ["6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6ba7b811-9dad-11d1-80b4-00c04fd430c8"]),
    Type("date", "date", ["2026-11-27", "2026-11-28"]),
    Type("time", "text", ["08:00", "09:00"]),
    Type("timetz", "text", ["08:00+00", "09:00+00"]),
    Type("timestamp", "text", ["2026-11-27T08:00:00", "2026-11-27T09:00:00"]),
    Type("timestamp(0)", "text", ["2026-11-27T08:00:00", "2026-11-27T09:00:00"]),
    Type("timestamptz", "timestamptz", ["2026-11-27T08:00:00Z", "2026-11-27T09:00:00Z"]),
    Type("timestamptz(0)", "timestamptz", ["2026-11-27T08:00:00Z", "2026-11-27T09:00:00Z"]),
    Type("interval", "text", ["1 day", "2 days"]),
    Type("boolean", "boolean", ["false", "true"]),
    Type("bytea", "bytea", ["a", "b"]),
    Type("inet", "inet", ["192.0.2.7", "192.0.2.8"]),
    Type("cidr", "text", ["192.0.2.0/24", "192.0.3.0/24"]),
    Type("macaddr", "text", ["08:00:2b:01:02:03", "08:00:2b:01:02:04"]),
    Type("macaddr8", "text", ["08:00:2b:01:02:03:04:05", "08:00:2b:01:02:03:04:06"]),
    Type("json", "text", ["{\"a\": 1}", "{\"b\": 2}"]),
    Type("jsonb", "jsonb", ["{\"a\": 1}", "{\"b\": 2}"]),
    Type("integer[]", "text", ["{1,2}", "{3}"]),
    Type("text[]", "text", ["{a,b}", "{c}"]),
    Type("mood", "text", ["calm", "glad"]),
    Type("positive", "bigint", ["3", "4"]),
    Type("short_text", "text", ["a", "b"]),
    Type("pair", "text", ["(1,a)", "(2,b)"]),
    Type("int4range", "text", ["[1,3)", "[2,5)"]),
    Type("tstzrange", "text", ["[2026-01-01,2026-01-02)", "[2026-01-02,2026-01-03)"]),
    Type("bit(3)", "text", ["101", "110"]),
    Type("bit varying(5)", "text", ["101", "110"]),
    Type("oid", "text", ["1", "2"]),
    Type("pg_lsn", "text", ["0/1", "0/2"]),
    Type("tsvector", "text", ["'a'", "'b'"]),
    Type("jsonpath", "text", ["$.a", "$.b"]),
    Type("point", "text", ["(1,2)", "(3,4)"]),
    Type("box", "text", ["(1,2),(0,0)", "(3,4),(0,0)"]),
    Type("polygon", "text", ["((0,0),(1,1),(1,0))", "((0,0),(2,2),(2,0))"]),
    Type("timestamp[]", "text", ["{2026-11-27}", "{2026-11-28}"]),
];

/// What becomes of a type with an operator, or as a key: accepted with such a field, or the sentence that refuses it.
type Verdict = Result<String, String>;

/// How a field is read for this operator: as is best for the column, where the operator takes that.
fn kind_for(merge: Merge, best: &str) -> String {
    let taken =
        parse_values(&format!("v = count(f: {best})")).expect("a kind")[0].field.as_ref().map(|field| field.kind);
    let kind = taken.filter(|kind| merge.accepts(*kind).is_ok()).unwrap_or(merge.usual_kind());
    match kind {
        // A whole number would land in a numeric as well; the point is what the column is for.
        Kind::Bigint if best == "text" => "bigint".into(),
        kind => kind.to_string(),
    }
}

/// Two entries for one row, the older one flushed after the newer one; then what is in the row is right.
async fn try_value(
    url: &str,
    sql: &mut PgConnection,
    Type(sql_type, best, [low, high]): &Type,
    merge: Merge,
) -> Verdict {
    let kind = kind_for(merge, best);
    let by = merge.needs_version();
    let definition = by.map_or(String::new(), |by| format!(", v_by {by}"));
    let create =
        format!("drop table if exists tried; create table tried (k text primary key, v {sql_type}{definition})");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *sql).await.map_err(|why| format!("no table: {why}"))?;
    let by = by.map_or("", |_| " by v_by");
    let flush =
        Flush::of(url, vec![table("tried", "k", &format!("v = {}(f: {kind}){by}", merge.name()), Write::Merge)])
            .await?;
    let [low, high] = match (merge, kind.as_str(), *best) {
        (Merge::JsonbMerge, ..) => ["{\"a\": 1}", "{\"b\": 2}"],
        (Merge::And | Merge::Or, ..) => ["false", "true"],
        (Merge::Sum | Merge::Min | Merge::Max, "bigint", best) if best != "bigint" => ["3", "4"],
        _ => [*low, *high],
    };
    for (ms, value) in [(2_000, high), (1_000, low)] {
        let landed = flush.flush(&[Entry::of(ms, [("k", "x"), ("f", value)])]).await;
        landed.unwrap_or_else(|why| panic!("{sql_type}, {} of a {kind}: accepted, and then: {why}", merge.name()));
    }
    let literal = |value: &str| match kind.as_str() {
        "bytea" => format!("convert_to('{value}', 'UTF8')"),
        _ => format!("'{}'::{sql_type}", value.replace('\'', "''")),
    };
    let expected = match merge {
        Merge::Sum => format!("{}::numeric + {}::numeric", literal(low), literal(high)),
        Merge::Count => "2".into(),
        Merge::Min | Merge::First | Merge::And => literal(low),
        Merge::Max | Merge::Last | Merge::SetIfNull | Merge::Or => literal(high),
        Merge::JsonbMerge => "'{\"a\": 1, \"b\": 2}'::jsonb".into(),
        Merge::Distinct => "2".into(),
    };
    let value = if merge == Merge::Distinct { "tidegate.distinct_count(v)" } else { "v" };
    // As texts: not every type has an equality.
    let text = |value: &str| match merge {
        Merge::Sum | Merge::Count => format!("({value})::numeric"),
        _ => format!("({value})::text"),
    };
    let query = format!("select ({} = {})::text || ' ' || v::text from tried", text(value), text(&expected));
    let said: String = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(sql).await.expect("a row");
    assert!(said.starts_with("true "), "{sql_type}, {} of a {kind}: not {expected}: {said}", merge.name());
    Ok(kind)
}

/// The same value twice and another one once, in one batch and in two: two rows.
async fn try_key(url: &str, sql: &mut PgConnection, Type(sql_type, best, [low, high]): &Type) -> Verdict {
    let kind = if *best == "jsonb" { "text" } else { best };
    let create = format!("drop table if exists tried; create table tried (k {sql_type} primary key, n bigint)");
    if let Err(why) = sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *sql).await {
        let why = why.as_database_error().map_or_else(|| why.to_string(), |why| why.message().to_owned());
        return Err(format!("PostgreSQL has no index for it: {why}"));
    }
    let flush = Flush::of(url, vec![table("tried", &format!("k = f: {kind}"), "n = count()", Write::Merge)]).await?;
    for (ms, values) in [(1_000, vec![*low, *high, *low]), (2_000, vec![*high])] {
        let entries: Vec<Entry> = (values.iter().zip(ms..)).map(|(value, ms)| Entry::of(ms, [("f", *value)])).collect();
        flush.flush(&entries).await.unwrap_or_else(|why| panic!("{sql_type} as a key: accepted, and then: {why}"));
    }
    let counts: Vec<i64> = sqlx::query_scalar("select n from tried").fetch_all(sql).await.expect("rows");
    assert_eq!(counts, [2, 2], "{sql_type} as a key");
    Ok(kind.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_with_every_operator_is_accepted_and_right_or_refused_with_a_sentence() {
    let url = database(true).await;
    let mut sql = PgConnection::connect(&url).await.expect("connected");
    sqlx::raw_sql(
        "create extension citext; create type mood as enum ('calm', 'glad'); create domain positive as integer check (value > 0);
         create domain short_text as varchar(9); create type pair as (a int, b text); set timezone = 'UTC'",
    )
    .execute(&mut sql)
    .await
    .expect("created");
    let operators: Vec<Merge> = Merge::words().into_iter().filter_map(Merge::parse).collect();
    let mut sentences: BTreeMap<String, usize> = BTreeMap::new();
    let mut rows = String::new();
    let mut refused: Vec<String> = Vec::new();
    for of in &TYPES {
        let mut cells = vec![format!("`{}`", of.0)];
        let mut verdicts = vec![try_key(&url, &mut sql, of).await];
        for merge in &operators {
            verdicts.push(try_value(&url, &mut sql, of, *merge).await);
        }
        for verdict in verdicts {
            cells.push(match verdict {
                Ok(kind) => kind,
                Err(sentence) => {
                    // One sentence stands for all types.
                    let sentence = sentence.trim_start_matches("table public.tried does not fit: ").replacen(
                        &format!("type {}", spelled(&mut sql, of.0).await),
                        "type …",
                        1,
                    );
                    let number = *sentences.entry(sentence.clone()).or_insert_with(|| {
                        refused.push(sentence);
                        refused.len()
                    });
                    format!("– {number}")
                }
            });
        }
        rows += &format!("| {} |\n", cells.join(" | "));
    }
    let head: Vec<&str> = ["column", "key"].into_iter().chain(Merge::words()).collect();
    let table = format!("| {} |\n|{}\n{rows}", head.join(" | "), " --- |".repeat(head.len()));
    let list: String = refused.iter().zip(1..).map(|(sentence, n)| format!("{n}. {sentence}\n")).collect();
    let document = format!("{PREFACE}\n{table}\n## What is refused\n\n{list}");
    if std::env::var_os("TIDEGATE_UPDATE_DOCS").is_some() {
        return std::fs::write(DOCUMENT, document).expect("written");
    }
    let written = std::fs::read_to_string(DOCUMENT).expect("the document");
    for (line, (is, should)) in written.lines().zip(document.lines()).enumerate() {
        assert_eq!(is, should, "docs/types.md:{}: run this test with TIDEGATE_UPDATE_DOCS=1", line + 1);
    }
    assert_eq!(written, document);
}

/// As PostgreSQL writes the type; a domain as its base.
async fn spelled(sql: &mut PgConnection, sql_type: &str) -> String {
    let query = "select format_type(coalesce(nullif(t.typbasetype, 0), a.atttypid), case when t.typbasetype <> 0 then t.typtypmod else a.atttypmod end)
                 from pg_attribute a join pg_type t on t.oid = a.atttypid where attrelid = 'spelled'::regclass and attnum = 1";
    let create = format!("drop table if exists spelled; create table spelled (v {sql_type})");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *sql).await.expect("created");
    sqlx::query_scalar(query).fetch_one(sql).await.expect("a type")
}

const PREFACE: &str = "# Types of columns

Which type of a column takes which operator, and which can be a key. A test makes a table for each type, flushes into it and writes this page, so what
stands here was seen. A cell names the type of the field that was written in `keys` or `values`; a number is the sentence below with which `tidegate run`
and `tidegate check` refuse the table.

- A field of type `text` is read by PostgreSQL as whatever the column is, as in an `insert`: `last`, `first` and `set_if_null` take any type so. Floating
  point takes the nearest number, `money` and dates are read as the database's settings say.
- A domain is treated as the type it stands for; a value that its CHECK refuses is a dead letter, as is a text that is too long for its column.
- A key's column that rounds, such as `numeric(10, 2)` or `timestamptz(0)`, makes one row of all values that round to one.
- `last`, `first` and `jsonb_merge` compare the ids of entries. Of two entries with the same id, which only different streams or two primaries can make,
  the one that is flushed first stays.
";
