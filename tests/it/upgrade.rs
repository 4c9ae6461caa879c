//! An upgrade from each earlier schema: what the ledger knew is still recognised, and statements of the older worker go on beside the new one.
//!
//! Older programs are not at hand, so their part is played by the statement that every version so far has in common: the columns of the first
//! migration. With each release its program joins this test.

use std::borrow::Cow;

use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use tidegate::model::entry::{EntryId, digest, write_canonical};
use tidegate::model::pipeline::Pipeline;

use crate::harness::{Daemon, Lab, STREAM, database, output};

/// The schema as it was after so many migrations.
async fn migrated_up_to(database: &str, version: i64) {
    let mut migrator: Migrator = sqlx::migrate!();
    migrator.migrations = Cow::Owned(migrator.iter().filter(|m| m.version <= version).cloned().collect());
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    let mut connection = PgConnection::connect(database).await.expect("connected");
    migrator.run_direct(None, &mut connection, false).await.expect("migrated");
}

/// The flush of an older worker: entries `numbers` of counter `a`, each worth 1. False where the ledger refuses it.
async fn older_flush(connection: &mut PgConnection, numbers: std::ops::RangeInclusive<u64>) -> bool {
    let mut digests = Vec::new();
    for ms in numbers.clone() {
        let mut canonical = Vec::new();
        write_canonical(&mut canonical, EntryId { ms, seq: 0 }, [&b"id"[..], b"a", b"amount", b"1"]);
        digests.extend(digest(&canonical).to_le_bytes());
    }
    let id = |ms: u64| EntryId { ms, seq: 0 }.number().to_string();
    let count = (numbers.end() - numbers.start() + 1) as i64;
    let mut transaction = connection.begin().await.expect("begun");
    let flushed = sqlx::query(
        "with row as (
             insert into tidegate.ledger (lane, ids, digests, digest_version, entries, consumer)
             select lane, numrange($1::numeric, $2::numeric, '[]'), $3, 1, $4::int, 'an older worker' from tidegate.lanes
             on conflict on constraint ledger_no_overlap do nothing returning 1)
         insert into public.counters as c (id, value) select 'a', $4 from row
         on conflict (id) do update set value = c.value + excluded.value",
    )
    .bind(id(*numbers.start()))
    .bind(id(*numbers.end()))
    .bind(digests)
    .bind(count)
    .execute(&mut *transaction)
    .await
    .expect("an older worker's statement works with the newer schema");
    transaction.commit().await.expect("committed");
    flushed.rows_affected() > 0
}

#[tokio::test(flavor = "multi_thread")]
async fn each_earlier_schema_is_upgraded_while_older_workers_go_on() {
    let last = sqlx::migrate!().iter().map(|migration| migration.version).max().expect("migrations");
    for schema in 1..last {
        let lab = Lab { database: database(false).await, ..Lab::new().await };
        migrated_up_to(&lab.database, schema).await;
        let mut client = lab.client().await;
        for ms in 1..=300 {
            client.call(&["XADD", STREAM, &format!("{ms}-0"), "id", "a", "amount", "1"]).await;
        }
        let mut older = lab.sql().await;
        sqlx::query(
            "insert into tidegate.lanes (source, pipeline, stream, target) values ('main', $1, $2, 'public.counters')",
        )
        .bind(Pipeline::counters().name)
        .bind(STREAM)
        .execute(&mut older)
        .await
        .expect("registered");
        assert!(older_flush(&mut older, 1..=100).await);

        let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
        assert_eq!(code, 78, "schema {schema} is too old for the new worker, which says so: {stderr}");
        let (code, _, stderr) = output(&mut lab.program(&["migrate"])).await;
        assert_eq!(code, 0, "schema {schema}: {stderr}");

        // The older worker holds entries that the new one is given as well: whoever is first, they count once.
        assert!(older_flush(&mut older, 101..=150).await);
        let mut newer = Daemon::start(lab.program(&["run", "--until-empty"]));
        for start in (151..300).step_by(10) {
            older_flush(&mut older, start..=start + 9).await;
        }
        assert_eq!(newer.exit().await.code(), Some(0), "schema {schema}: {}", newer.last_lines());
        newer.wait_for_event("metrics", |event| event["recognised"].as_u64() >= Some(150)).await;
        assert_eq!(lab.value("a").await, Some(300), "schema {schema}");
        lab.assert_settled().await;
    }
}
