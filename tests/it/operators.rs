//! The law of operators: folding in memory and then merging gives what merging one by one gives, in any grouping and any order of batches. Each operator
//! with each kind of field, in tables with keys of their own orders, against the real flush; what is expected is computed here from the entries alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};
use tidegate::config::{Needs, Sources};
use tidegate::flow::batch::{Filling, Origin};
use tidegate::flow::flush::{Failed, Lane, Statements, flush};
use tidegate::flow::turn::Turn;
use tidegate::lanes::{Identity, Record, register};
use tidegate::merge::Merge;
use tidegate::model::datum::{Calendar, read};
use tidegate::model::entry::{EntryId, Generation};
use tidegate::model::pipeline::{Pipeline, Table};
use tidegate::model::target::{Kind, Target, Unit, Write, parse_keys, parse_values};
use tidegate::postgres::{Database, Endpoint};
use tidegate::target::check_tables;
use tidegate::telemetry::trace::Trace;

use crate::harness::database;

/// A pipeline's flush, without a daemon around it.
pub(crate) struct Flush {
    database: Database,
    lane: Lane,
}

pub(crate) fn endpoint(url: &str) -> Endpoint {
    let env = [("DATABASE_URL".to_owned(), url.to_owned())].into();
    let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES).expect("valid");
    loaded.config.postgres.address().expect("set")
}

pub(crate) fn table(name: &str, keys: &str, values: &str, write: Write) -> Target {
    let (keys, values) = (parse_keys(keys).expect("keys"), parse_values(values).expect("values"));
    Target { table: Table::parse(name).expect("a name"), keys, values, updated_at: None, write }
}

impl Flush {
    /// Into these tables; or the sentence that refuses them.
    pub(crate) async fn of(url: &str, tables: Vec<Target>) -> Result<Flush, String> {
        static PIPELINES: AtomicU64 = AtomicU64::new(0);
        let database = Database::new(endpoint(url), 1);
        let name = format!("p{}", PIPELINES.fetch_add(1, Ordering::Relaxed));
        let pipeline = Pipeline {
            stream: format!("flush:{name}"),
            name,
            table: tables[0].table.clone(),
            tables,
            ..Pipeline::counters()
        };
        assert_eq!(pipeline.tables.iter().find_map(Target::contradiction), None);
        let fits = database.run(async |c| check_tables(c, &pipeline).await).await.expect("PostgreSQL answers");
        let fits = fits.map_err(|unfit| unfit.to_string())?;
        let statements = Statements::of(&pipeline, &fits).expect("the zones are known");
        let shard = pipeline.shards().swap_remove(0);
        let identity = Identity::of("test", &shard);
        let id = database
            .run(async |c| register(c, std::slice::from_ref(&identity), &BTreeSet::new(), Record::Yes).await)
            .await
            .expect("answers");
        let turn = Turn::of(&pipeline.table, None);
        Ok(Flush { database, lane: Lane::new(pipeline, statements, id.expect("new")[0], identity, turn, 4096) })
    }

    /// One batch; or what PostgreSQL says against it.
    pub(crate) async fn flush(&self, entries: &[Entry]) -> Result<(), String> {
        let generation = Generation { run_id: "r".into(), replication_id: "p".into(), epoch: 1 };
        let origin = Origin { generation: Arc::new(generation), consumer: "c".into(), trace: Trace::default() };
        let mut filling = Filling::new(origin, 1 << 20);
        let mut entries: Vec<&Entry> = entries.iter().collect();
        entries.sort_by_key(|entry| entry.id);
        for entry in entries {
            // No other entry of these tests lies between two neighbouring milliseconds.
            if filling.last_id().is_some_and(|last| last.ms + 1 != entry.id.ms) {
                filling.close_run();
            }
            filling.push(entry.id, entry.fields.iter().flat_map(|(name, value)| [name.as_bytes(), &value[..]]));
        }
        match flush(&self.database, std::slice::from_ref(&self.lane), filling.seal(false)).await {
            Ok((flushed, _)) if flushed.settled.tally.buried == 0 => Ok(()),
            Ok((flushed, _)) => Err(format!("{} entries were buried", flushed.settled.tally.buried)),
            Err(Failed { why, .. }) => Err(format!("{why:?}")),
        }
    }
}

/// An entry: its id, its fields.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    id: EntryId,
    fields: BTreeMap<String, Vec<u8>>,
}

impl Entry {
    pub(crate) fn of<'f>(ms: u64, fields: impl IntoIterator<Item = (&'f str, &'f str)>) -> Entry {
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec())).collect();
        Entry { id: EntryId { ms, seq: 0 }, fields }
    }

    /// The same under another id, with one field changed.
    pub(crate) fn again(&self, ms: u64, name: &str, value: &str) -> Entry {
        let mut entry = Entry { id: EntryId { ms, seq: 0 }, ..self.clone() };
        entry.fields.insert(name.to_owned(), value.as_bytes().to_vec());
        entry
    }
}

/// Numbers that look random, from a seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end as u64) as usize
    }
}

/// Values of a kind, ascending where the kind has an order: those in one line are equal, the first one is how PostgreSQL is asked for it.
fn values(kind: Kind) -> Vec<Vec<&'static str>> {
    let lines = match kind {
        Kind::Text => "a|b|A|é|1.0|1",
        Kind::Bigint => "-9000000000,-09000000000|-1|0,-0,000|7,07|100000000000",
        Kind::Numeric(_) => "-100.25,-0100.250|-0.01|0,0.000,-0|1,1.0,01|12345678901234567890.5",
        Kind::Uuid => {
            "6ba7b810-9dad-11d1-80b4-00c04fd430c8,6BA7B8109DAD11D180B400C04FD430C8,{6ba7b810-9dad-11d1-80b4-00c04fd430c8}|6ba7b811-9dad-11d1-80b4-00c04fd430c8"
        }
        Kind::Date => "0001-01-01|1999-12-31|2024-02-29|2026-11-27|9999-12-31",
        Kind::Timestamptz => {
            "0001-01-01T00:00:00Z|1969-12-31T23:59:59.999999Z,1969-12-31T23:59:59.9999999Z|2026-11-27T08:00:00Z,2026-11-27T09:00:00+01:00,1795766400000,2026-11-27T04:30:00-03:30|2026-11-27T08:00:00.001Z,1795766400001|9999-12-30T00:00:00Z"
        }
        Kind::Boolean => "false,f,no,0,OFF|true,t,yes,1,On",
        Kind::Bytea => "\\x,|\\x00,\0|\\x61,a|\\x5c78,\\x",
        Kind::Inet => "192.0.2.7,192.0.2.7/32|192.0.2.7/24|2001:db8::1,2001:DB8:0:0::1,2001:db8::1/128|2001:db8::/32",
        Kind::Jsonb => {
            "{}|{\"a\": 1.10}|{\"a\": null}|{\"a\": 2, \"b\": {\"c\": [true]}}|{\"b\": \"é\"}|{\"c\": 12345678901234567890.123}"
        }
    };
    lines.split('|').map(|line| if kind == Kind::Jsonb { vec![line] } else { line.split(',').collect() }).collect()
}

const KINDS: [(&str, Kind); 11] = [
    ("text", Kind::Text),
    ("bigint", Kind::Bigint),
    ("numeric", Kind::Numeric(None)),
    ("numeric(2)", Kind::Numeric(Some(2))),
    ("uuid", Kind::Uuid),
    ("date", Kind::Date),
    ("timestamptz", Kind::Timestamptz),
    ("boolean", Kind::Boolean),
    ("bytea", Kind::Bytea),
    ("inet", Kind::Inet),
    ("jsonb", Kind::Jsonb),
];

/// A value column of the law's tables.
struct Column {
    name: String,
    merge: Merge,
    kind: usize,
}

impl Column {
    /// Each operator with each kind that it takes.
    fn all() -> Vec<Column> {
        let merges: Vec<Merge> = Merge::words().into_iter().filter_map(Merge::parse).collect();
        let of = |merge: Merge| {
            let accepted = (0..KINDS.len()).filter(move |kind| merge.accepts(KINDS[*kind].1).is_ok());
            accepted.map(move |kind| Column { name: format!("{}_{kind}", merge.name()), merge, kind })
        };
        merges.into_iter().flat_map(of).collect()
    }

    fn value(&self) -> String {
        let Column { name, merge, kind } = self;
        let by = merge.needs_version().map_or(String::new(), |_| format!(" by {name}_by"));
        format!("{name} = {}(f{kind}?: {}){by}", merge.name(), KINDS[*kind].0)
    }

    fn definition(&self) -> String {
        let Column { name, merge, kind } = self;
        let sql_type = match merge {
            Merge::Count => "bigint",
            Merge::Distinct => "bytea",
            _ if matches!(KINDS[*kind].1, Kind::Numeric(Some(_))) => "numeric(30, 2)",
            _ => KINDS[*kind].0,
        };
        let by = merge.needs_version().map_or(String::new(), |by| format!(", {name}_by {by}"));
        format!("{name} {sql_type}{by}")
    }

    /// A condition that holds exactly when the column is right for these: each with its id, and which value of its kind it brought, if any.
    fn is_right(&self, met: &[(EntryId, Option<usize>)]) -> String {
        let Column { name, merge, kind } = self;
        let (word, kind) = KINDS[*kind];
        let values = values(kind);
        let literal = |value: usize| format!("'{}'::{word}", values[value][0]).replace("numeric(2)", "numeric");
        let present: Vec<(EntryId, usize)> = met.iter().filter_map(|(id, value)| Some((*id, (*value)?))).collect();
        let indices = present.iter().map(|(_, value)| *value);
        let additive = |total: String| format!("{name} = {total}");
        let none = || format!("{name} is null");
        let extreme = |value: Option<usize>| value.map_or_else(none, |value| format!("{name} = {}", literal(value)));
        let versioned = |winner: Option<&(EntryId, usize)>| match winner {
            Some((id, value)) => format!("{name} = {} and {name}_by = {}", literal(*value), id.number()),
            None => format!("{name} is null and {name}_by is null"),
        };
        match merge {
            Merge::Count => additive(present.len().to_string()),
            Merge::Sum => {
                // In hundredths, so that it is exact.
                let cents = |text: &str| {
                    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
                    let number: i128 = format!("{whole}{fraction:0<2}").parse().expect("a number");
                    number
                };
                let total: i128 = indices.map(|value| cents(values[value][0])).sum();
                additive(format!("{total}::numeric * 0.01"))
            }
            Merge::Min => extreme(indices.min()),
            Merge::Max => extreme(indices.max()),
            Merge::Last => versioned(present.iter().max()),
            Merge::First => versioned(present.iter().min()),
            Merge::SetIfNull if present.is_empty() => none(),
            Merge::SetIfNull => {
                format!("{name} in ({})", indices.map(literal).collect::<Vec<_>>().join(", "))
            }
            Merge::And => extreme(indices.min()),
            Merge::Or => extreme(indices.max()),
            Merge::JsonbMerge if present.is_empty() => format!("{name} is null and {name}_by is null"),
            Merge::JsonbMerge => {
                let mut newest: BTreeMap<String, (EntryId, serde_json::Value)> = BTreeMap::new();
                for (id, value) in &present {
                    let object: serde_json::Map<String, serde_json::Value> =
                        serde_json::from_str(&values[*value][0].replace("12345678901234567890.123", "\"long\""))
                            .expect("an object");
                    for (key, value) in object {
                        let held = newest.entry(key).or_insert((*id, value.clone()));
                        *held = if *id >= held.0 { (*id, value) } else { held.clone() };
                    }
                }
                let object: serde_json::Map<_, _> =
                    newest.iter().map(|(key, (_, value))| (key.clone(), value.clone())).collect();
                let object =
                    serde_json::Value::from(object).to_string().replace("\"long\"", "12345678901234567890.123");
                let by: Vec<String> =
                    newest.iter().map(|(key, (id, _))| format!("\"{key}\": {}", id.number())).collect();
                format!("{name} = '{object}' and {name}_by = '{{{}}}'", by.join(", "))
            }
            Merge::Distinct if present.is_empty() => none(),
            Merge::Distinct => {
                let different = indices.collect::<BTreeSet<_>>().len();
                format!("tidegate.distinct_count({name}) = {different}")
            }
        }
    }
}

/// A table of the law: how its key is declared, read, and spelled; those in one line are equal for PostgreSQL.
struct Keyed {
    name: &'static str,
    sql_type: &'static str,
    key: &'static str,
    spelled: &'static [&'static [&'static str]],
    write: Write,
}

const TABLES: [Keyed; 7] = [
    Keyed { name: "plain", sql_type: "text", key: "k = k0", spelled: &[&["a"], &["A"], &["b"]], write: Write::Merge },
    Keyed {
        name: "cased",
        sql_type: "citext",
        key: "k = k1",
        spelled: &[&["a", "A"], &["b", "B"]],
        write: Write::Merge,
    },
    Keyed {
        name: "priced",
        sql_type: "numeric(10, 2)",
        key: "k = k2",
        spelled: &[&["1", "1.00", "1.001"], &["1.01"]],
        write: Write::Merge,
    },
    Keyed {
        name: "identified",
        sql_type: "uuid",
        key: "k = k3: uuid",
        spelled: &[
            &["6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6BA7B810-9DAD-11D1-80B4-00C04FD430C8"],
            &["6ba7b811-9dad-11d1-80b4-00c04fd430c8", "urn:uuid:6ba7b811-9dad-11d1-80b4-00c04fd430c8"],
        ],
        write: Write::Merge,
    },
    Keyed {
        name: "timed",
        sql_type: "timestamptz",
        key: "k = k4: timestamptz",
        spelled: &[&["2026-11-27T08:00:00Z", "2026-11-27T09:00:00+01:00"], &["2026-11-27T08:00:01Z", "1795766401000"]],
        write: Write::Merge,
    },
    Keyed { name: "kept", sql_type: "text", key: "k = k5", spelled: &[&["a"], &["b"]], write: Write::Insert },
    Keyed {
        name: "icu",
        sql_type: "text collate no_case",
        key: "k = k6",
        spelled: &[&["page", "PAGE", "Page"], &["other"]],
        write: Write::Merge,
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn folding_and_merging_is_merging_one_by_one_in_any_order_and_grouping() {
    let url = database(true).await;
    let mut sql = PgConnection::connect(&url).await.expect("connected");
    let columns = Column::all();
    assert_eq!(columns.len(), 70, "an operator takes more kinds or fewer: is each of them right?");
    let execute = async |sql: &mut PgConnection, statement: String| {
        sqlx::raw_sql(AssertSqlSafe(statement.clone()))
            .execute(sql)
            .await
            .unwrap_or_else(|e| panic!("{statement}: {e}"));
    };
    execute(&mut sql, "create extension citext".into()).await;
    let icu: bool = sqlx::query_scalar("select exists (select from pg_collation where collname = 'en-x-icu')")
        .fetch_one(&mut sql)
        .await
        .expect("answered");
    if icu {
        let collation = "create collation no_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
        execute(&mut sql, collation.into()).await;
    } else {
        eprintln!("without a collation of its own: this PostgreSQL is built without ICU");
    }
    let tables: Vec<&Keyed> = TABLES.iter().filter(|table| icu || table.name != "icu").collect();
    let definitions: Vec<String> = columns.iter().map(Column::definition).collect();
    let written: Vec<String> = columns.iter().map(Column::value).collect();
    let mut targets = Vec::new();
    for Keyed { name, sql_type, key, write, .. } in &tables {
        let definition =
            format!("create table {name} (k {sql_type} primary key, n bigint, {})", definitions.join(", "));
        execute(&mut sql, definition).await;
        targets.push(table(name, key, &format!("n = count(), {}", written.join(", ")), *write));
    }
    let flush = Flush::of(&url, targets).await.expect("the tables fit");
    let seed = std::env::var("TIDEGATE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    eprintln!("TIDEGATE_SEED={seed}");
    let (mut dice, mut ms) = (Dice(seed), 1_800_000_000_000u64);
    for round in 0..25 {
        let names: Vec<&str> = tables.iter().map(|table| table.name).collect();
        execute(&mut sql, format!("truncate {}", names.join(", "))).await;
        // Which line each key and each value is of, beside the entry.
        let mut entries: Vec<(Entry, Vec<usize>, Vec<Option<usize>>)> = Vec::new();
        for _ in 0..1 + dice.below(12) {
            ms += 1 + dice.below(3) as u64;
            let (mut fields, mut keys, mut brought) = (BTreeMap::new(), Vec::new(), Vec::new());
            let mut pick = |dice: &mut Dice, name: String, lines: Vec<Vec<&str>>| {
                let line = dice.below(lines.len());
                let spelling = lines[line][dice.below(lines[line].len())];
                fields.insert(name, spelling.as_bytes().to_vec());
                line
            };
            for (n, Keyed { spelled, .. }) in TABLES.iter().enumerate() {
                keys.push(pick(&mut dice, format!("k{n}"), spelled.iter().map(|line| line.to_vec()).collect()));
            }
            for (n, (_, kind)) in KINDS.iter().enumerate() {
                let is_missing = dice.below(4) == 0;
                brought.push((!is_missing).then(|| {
                    let mut lines = values(*kind);
                    // Bytes are sent as they are: the first of a line is only how PostgreSQL writes them.
                    if *kind == Kind::Bytea {
                        lines = lines.into_iter().map(|line| line[1..].to_vec()).collect();
                    }
                    pick(&mut dice, format!("f{n}"), lines)
                }));
            }
            entries.push((Entry { id: EntryId { ms, seq: u64::MAX - dice.below(2) as u64 }, fields }, keys, brought));
        }
        let mut order: Vec<usize> = (0..entries.len()).collect();
        (1..order.len()).rev().for_each(|n| order.swap(n, dice.below(n + 1)));
        let mut batches: Vec<Vec<usize>> = Vec::new();
        for index in order {
            match batches.last_mut().filter(|_| dice.below(2) == 0) {
                Some(batch) => batch.push(index),
                None => batches.push(vec![index]),
            }
        }
        for batch in &batches {
            let sent: Vec<Entry> = batch.iter().map(|index| entries[*index].0.clone()).collect();
            flush.flush(&sent).await.unwrap_or_else(|why| panic!("seed {seed}, round {round}, {batches:?}: {why}"));
        }
        for (n, Keyed { name, sql_type, spelled, write, .. }) in TABLES.iter().enumerate() {
            if !names.contains(name) {
                continue;
            }
            let mut rows = 0;
            for (line, spellings) in spelled.iter().enumerate() {
                let is_of = |index: &&usize| entries[**index].1[n] == line;
                // Of rows that are only inserted the first batch that has the key decides.
                let met: Vec<usize> = match write {
                    Write::Insert => {
                        let first = batches.iter().find(|batch| batch.iter().any(|index| is_of(&index)));
                        first.into_iter().flatten().filter(is_of).copied().collect()
                    }
                    _ => batches.iter().flatten().filter(is_of).copied().collect(),
                };
                if met.is_empty() {
                    continue;
                }
                rows += 1;
                let of = |kind: usize| -> Vec<_> {
                    met.iter().map(|index| (entries[*index].0.id, entries[*index].2[kind])).collect()
                };
                let mut conditions: Vec<(String, String)> =
                    columns.iter().map(|column| (column.name.clone(), column.is_right(&of(column.kind)))).collect();
                conditions.push(("n".into(), format!("n = {}", met.len())));
                let wrong: Vec<String> = conditions
                    .iter()
                    .map(|(name, right)| format!("case when ({right}) then null else '{name}' end"))
                    .collect();
                let query = format!(
                    "select array_remove(array[{}], null)::text[] from {name} where k = '{}'::{sql_type}",
                    wrong.join(", "),
                    spellings[0]
                );
                let wrong: Vec<String> =
                    sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(&mut sql).await.expect("a row");
                let expected: Vec<&String> =
                    conditions.iter().filter(|(name, _)| wrong.contains(name)).map(|(_, right)| right).collect();
                assert!(
                    wrong.is_empty(),
                    "seed {seed}, round {round}, {name} {spellings:?}: {expected:?} of {met:?} in {batches:?}"
                );
            }
            let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from {name}")))
                .fetch_one(&mut sql)
                .await
                .expect("counted");
            assert_eq!(count, rows, "seed {seed}, round {round}: rows of {name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_whose_sums_are_zero_are_deleted_in_any_order_and_grouping() {
    let url = database(true).await;
    let mut sql = PgConnection::connect(&url).await.expect("connected");
    sqlx::raw_sql(
        "create extension citext;
         create table left_over (k citext primary key, a bigint, b numeric);
         create table plain_left_over (k text primary key, a bigint, b numeric)",
    )
    .execute(&mut sql)
    .await
    .expect("created");
    let values = "a = sum(a?), b = sum(b?: numeric)";
    let targets = ["left_over", "plain_left_over"].map(|name| table(name, "k", values, Write::DeleteZero));
    let flush = Flush::of(&url, targets.into()).await.expect("the tables fit");
    let (mut dice, mut ms) = (Dice(7), 1_800_000_000_000);
    let mut sums: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
    for round in 0..40 {
        let mut batch = Vec::new();
        for _ in 0..1 + dice.below(6) {
            let (key, a, b) = (["x", "X", "y"][dice.below(3)], dice.below(3) as i64 - 1, dice.below(3) as i64 - 1);
            ms += 1;
            batch.push(Entry::of(ms, [("k", key), ("a", &a.to_string()), ("b", &format!("{b}.0"))]));
            let sum = sums.entry(key).or_default();
            *sum = (sum.0 + a, sum.1 + b);
        }
        flush.flush(&batch).await.unwrap_or_else(|why| panic!("round {round}: {why}"));
        let rows: Vec<(String, i64, i64)> = sqlx::query_as(
            "select 'c ' || lower(k::text), a, b::bigint from left_over
             union all select 'p ' || k, a, b::bigint from plain_left_over order by 1",
        )
        .fetch_all(&mut sql)
        .await
        .expect("rows");
        let mut expected: BTreeMap<String, (i64, i64)> = BTreeMap::new();
        for (key, (a, b)) in &sums {
            for name in [format!("c {}", key.to_lowercase()), format!("p {key}")] {
                let sum = expected.entry(name).or_default();
                *sum = (sum.0 + a, sum.1 + b);
            }
        }
        let expected: BTreeSet<_> =
            expected.into_iter().filter(|(_, sums)| *sums != (0, 0)).map(|(k, (a, b))| (k, a, b)).collect();
        assert_eq!(rows.into_iter().collect::<BTreeSet<_>>(), expected, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_texts_of_one_datum_are_equal_for_postgresql_and_two_data_are_not() {
    let url = database(true).await;
    let mut sql = PgConnection::connect(&url).await.expect("connected");
    let mut dice = Dice(3);
    for (word, kind) in KINDS.into_iter().filter(|(_, kind)| !matches!(kind, Kind::Text | Kind::Jsonb)) {
        let mut texts: Vec<Vec<u8>> = values(kind).into_iter().flatten().map(|text| text.as_bytes().to_vec()).collect();
        let mut generated: Vec<String> = Vec::new();
        for _ in 0..40 {
            let n = dice.below(5) as i64 - 2;
            generated.push(match kind {
                Kind::Bigint => {
                    format!("{}{}{}", if n < 0 { "-" } else { "" }, "0".repeat(dice.below(3)), dice.below(12))
                }
                Kind::Numeric(_) => {
                    format!(
                        "{}{}.{}",
                        if n < 0 { "-" } else { "" },
                        ["", "0", "1", "10"][dice.below(4)],
                        ["0", "00", "1", "10", "01"][dice.below(5)]
                    )
                }
                Kind::Uuid => format!("{:032x}", dice.below(3)),
                Kind::Date => format!("20{:02}-{:02}-28", 20 + dice.below(3), 1 + dice.below(12)),
                Kind::Timestamptz => format!(
                    "2026-0{}-01T{:02}:{:02}:00.{}{}{:02}:{}",
                    1 + dice.below(2),
                    dice.below(3),
                    30 * dice.below(2),
                    ["0", "000", "1", "10"][dice.below(4)],
                    ["+", "-"][dice.below(2)],
                    dice.below(3),
                    ["00", "30"][dice.below(2)]
                ),
                Kind::Boolean => ["TRUE", "False", "Y", "n"][dice.below(4)].into(),
                Kind::Bytea => ["a", "A", "\\x61", "\\141", "ä"][dice.below(5)].into(),
                _ => format!("10.0.{}.{}/{}", dice.below(2), dice.below(2), [32, 24, 8][dice.below(3)]),
            });
        }
        texts.extend(generated.into_iter().map(String::into_bytes));
        let mut data: Vec<String> = Vec::new();
        for text in &texts {
            let datum =
                read(kind, text).unwrap_or_else(|why| panic!("{word} {:?} {why}", String::from_utf8_lossy(text)));
            data.push(datum.text().expect("a text").into_owned());
        }
        let sql_type = if matches!(kind, Kind::Numeric(_)) { "numeric" } else { word };
        // What was sent, read by PostgreSQL itself, is the datum: bytes and milliseconds are not PostgreSQL's spelling.
        for (text, datum) in texts.iter().zip(&data) {
            let is_spelled_alike = kind != Kind::Bytea && (kind != Kind::Timestamptz || text.contains(&b'T'));
            // PostgreSQL rounds what is finer than a microsecond, here it is cut off.
            let is_fine = text.ends_with(b".9999999Z");
            if is_spelled_alike && !is_fine {
                let query = format!("select $1::text::{sql_type} = $2::text::{sql_type}");
                let text = String::from_utf8_lossy(text).into_owned();
                let query = sqlx::query_scalar(AssertSqlSafe(query)).bind(text.clone()).bind(datum.clone());
                assert!(query.fetch_one(&mut sql).await.unwrap_or(false), "{word}: {text} was read as {datum}");
            }
        }
        let different: BTreeSet<&String> = data.iter().collect();
        let query = format!("select count(distinct d::{sql_type}) from unnest($1::text[]) d");
        let query = sqlx::query_scalar(AssertSqlSafe(query)).bind(&data);
        let counted: i64 = query.fetch_one(&mut sql).await.expect("counted");
        assert_eq!(counted, different.len() as i64, "{word}: {different:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stretches_of_time_are_those_of_postgresql() {
    let url = database(true).await;
    let mut sql = PgConnection::connect(&url).await.expect("connected");
    let units = [
        ("minute", Unit::Minute),
        ("hour", Unit::Hour),
        ("day", Unit::Day),
        ("week", Unit::Week),
        ("month", Unit::Month),
    ];
    // The seconds around which the clocks are set, or a day, month or year ends.
    let turns = [
        "2026-03-29T01:00:00Z",
        "2026-10-25T01:00:00Z",
        "2006-04-02T03:31:00Z",
        "2006-10-29T02:31:00Z",
        "2018-11-04T03:00:00Z",
        "2018-02-18T02:00:00Z",
        "2026-04-04T15:00:00Z",
        "2026-10-03T15:30:00Z",
        "2024-02-29T00:00:00Z",
        "2023-12-31T23:00:00Z",
        "2026-12-31T18:30:00Z",
        "2000-01-01T00:00:00Z",
        "1970-01-01T00:00:00Z",
        "1893-03-31T23:06:32Z",
        "1935-03-30T05:00:00Z",
    ];
    let mut dice = Dice(11);
    for zone in ["UTC", "Europe/Berlin", "America/St_Johns", "America/Sao_Paulo", "Asia/Kolkata", "Australia/Lord_Howe"]
    {
        for (word, unit) in units {
            let calendar = Calendar::of(unit, zone).expect("a zone");
            let moments: Vec<String> = turns
                .iter()
                .flat_map(|turn| {
                    let at = millis(turn);
                    let around = [
                        -86_400_000,
                        -5_400_001,
                        -3_600_000,
                        -1_800_000,
                        -60_000,
                        -1,
                        0,
                        1,
                        59_999,
                        1_799_999,
                        1_800_000,
                        3_599_999,
                        3_600_000,
                        5_400_000,
                        86_400_000,
                    ];
                    let near = 8_000_000 - dice.below(16_000_000) as i64;
                    around.into_iter().chain([near]).map(move |by| (at + by).to_string()).collect::<Vec<_>>()
                })
                .collect();
            let truncated = match unit.kind() {
                Kind::Date => format!("date_trunc('{word}', m at time zone '{zone}')::date::text"),
                _ => format!(
                    "to_char(date_trunc('{word}', m, '{zone}') at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
                ),
            };
            let query = format!(
                "select {truncated} from unnest($1::text[]) with ordinality as t (ms, n), lateral (select timestamptz 'epoch' + ms::bigint * interval '1 ms') as l (m) order by n"
            );
            let expected: Vec<String> =
                sqlx::query_scalar(AssertSqlSafe(query)).bind(&moments).fetch_all(&mut sql).await.expect("truncated");
            let stamps: Vec<jiff::Timestamp> = (moments.iter())
                .map(|ms| jiff::Timestamp::from_millisecond(ms.parse().expect("a number")).expect("a moment"))
                .collect();
            for (moment, expected_of_it) in stamps.iter().zip(&expected) {
                let (begins, within) = calendar.stretch(*moment).expect("a stretch");
                assert_eq!(&begins, expected_of_it, "{word} of {moment} in {zone}");
                assert!(within.contains(moment), "{word} of {moment} in {zone}: it lies in its own stretch");
                // What is said to hold for a whole stretch holds for each moment of it.
                for (other, expected_of_other) in
                    stamps.iter().zip(&expected).filter(|(other, _)| within.contains(other))
                {
                    assert_eq!(expected_of_it, expected_of_other, "{word} of {moment} and {other} in {zone}");
                }
            }
        }
    }
}

/// Milliseconds since 1970 of a moment.
fn millis(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().expect("a moment").as_millisecond()
}
