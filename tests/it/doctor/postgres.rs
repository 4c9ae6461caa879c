//! What the doctor says of PostgreSQL, of the ledger and of the tables.

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tidegate::ops::sandbox::Postgres;

use super::{assert_well, doctor, examine, execute, fix, of};
use crate::harness::{Lab, eventually, output, standby_of};
use crate::pooler::Pooler;

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_without_its_constraint_is_found() {
    let lab = Lab::new().await;
    for spoil in [
        "alter table tidegate.ledger drop constraint ledger_no_overlap",
        "alter table tidegate.ledger drop constraint ledger_no_overlap, add constraint ledger_no_overlap
             exclude using gist (lane with =, ids with &&) deferrable",
    ] {
        lab.execute(spoil).await;
        let told = fix(&doctor(&lab).await, "D14", "error", "missing, deferrable or not valid");
        lab.execute("alter table tidegate.ledger drop constraint if exists ledger_no_overlap").await;
        lab.execute(&told).await;
        assert_well(&doctor(&lab).await, "D14");
        lab.client().await.add("a", 1).await;
        lab.settle_everything().await;
    }
    assert_eq!(lab.value("a").await, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autovacuum_that_is_off_or_held_up_is_found() {
    let lab = Lab::new().await;
    lab.execute("alter table tidegate.ledger set (autovacuum_enabled = false)").await;
    let told = fix(&doctor(&lab).await, "D15", "warning", "autovacuum does not run on tidegate.ledger");
    execute(&lab, &told).await;
    assert_well(&doctor(&lab).await, "D15");
    // A transaction that is open for long keeps what is dead. Without the constraint the rows are there sooner.
    lab.execute(
        "alter table tidegate.ledger drop constraint ledger_no_overlap;
         insert into tidegate.ledger (lane, ids, entries, consumer)
             select 1, numrange(n, n, '[]'), 1, 'nobody' from generate_series(1, 150000) n",
    )
    .await;
    let mut open = lab.sql().await;
    let begin = "begin isolation level repeatable read; select count(*) from pg_class";
    sqlx::raw_sql(begin).execute(&mut open).await.expect("begun");
    lab.execute("delete from tidegate.ledger").await;
    let told = async || {
        let found = doctor(&lab).await;
        of(&found, "D15").iter().any(|finding| finding["evidence"].to_string().contains("dead rows beside"))
    };
    eventually("PostgreSQL counts dead rows a moment later", true, told).await;
    let told = fix(&doctor(&lab).await, "D15", "warning", "dead rows beside");
    sqlx::raw_sql("commit").execute(&mut open).await.expect("ended");
    lab.execute(told.split(',').next().expect("a statement")).await;
    let well = async || of(&doctor(&lab).await, "D15").iter().all(|finding| finding["severity"] == "ok");
    eventually("PostgreSQL counts again", true, well).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_near_the_end_of_their_type_are_found() {
    for (kind, value) in [("smallint", "32000"), ("integer", "2147483000"), ("bigint", "-9223372036854775800")] {
        let lab = Lab::new().await;
        lab.execute(&format!("alter table public.counters alter column value type {kind}")).await;
        lab.execute("insert into public.counters values ('small', 7)").await;
        assert_well(&doctor(&lab).await, "D15");
        lab.execute(&format!("insert into public.counters values ('large', {value})")).await;
        let told = fix(&doctor(&lab).await, "D15", "warning", &format!("values of value are near the end of {kind}"));
        lab.execute(&told).await;
        let found = doctor(&lab).await;
        assert_well(&found, "D15");
        assert!(!of(&found, "D19").iter().any(|finding| finding["severity"] == "error"), "{kind}: {found}");
        lab.client().await.add("large", if value.starts_with('-') { -1_000 } else { 1_000 }).await;
        lab.settle_everything().await;
        assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_does_not_fit_or_refuses_rows_is_found() {
    let lab = Lab::new().await;
    lab.execute(
        "alter table public.counters add constraint positive check (value >= 0);
         alter table public.counters alter column updated_at drop default;
         alter table public.counters alter column updated_at type text",
    )
    .await;
    let found = doctor(&lab).await;
    let told = [fix(&found, "D19", "error", "updated_at"), fix(&found, "D20", "warning", "positive")];
    assert!(told[0].contains("alter column updated_at type timestamptz"), "{told:?}");
    for told in told {
        lab.execute(&told).await;
    }
    let found = doctor(&lab).await;
    assert_well(&found, "D19");
    assert_well(&found, "D20");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_updates_dear_is_found() {
    let lab = Lab::new().await;
    assert_well(&doctor(&lab).await, "D27");
    lab.execute(
        "create index by_value on public.counters (value);
         alter table public.counters set (fillfactor = 100, autovacuum_enabled = false)",
    )
    .await;
    let found = doctor(&lab).await;
    for words in ["the index public.by_value looks at value", "fills its pages", "left alone by autovacuum"] {
        lab.execute(&fix(&found, "D27", "info", words)).await;
    }
    assert_well(&doctor(&lab).await, "D27");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_is_found() {
    let lab = Lab::new().await;
    let Some(pooler) = Pooler::start(&lab, "").await else { return };
    let mut command = lab.program(&["doctor"]);
    let found = examine(command.env("DATABASE_URL", pooler.url(&lab))).await;
    assert!(fix(&found, "D18", "info", "a connection pooler").contains("`tidegate migrate`"));
    assert!(!found.to_string().contains("\"unknown\""), "{found}");
    assert_well(&doctor(&lab).await, "D18");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_waits_for_no_standby_is_found_and_so_is_its_standby() {
    let mut primary = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&primary, "here").await;
    assert_well(&doctor(&lab).await, "D22");
    let mut standby = standby_of(&mut primary, &[]).await;
    let standbys = async || lab.number("select count(*) from pg_stat_replication where state = 'streaming'").await;
    eventually("it follows", 1, standbys).await;
    let told = fix(&doctor(&lab).await, "D22", "warning", "1 standby is connected");
    execute(&lab, told.split("; from then").next().expect("statements")).await;
    let well = async || of(&doctor(&lab).await, "D22").iter().all(|finding| finding["severity"] == "ok");
    eventually("the setting is read", true, well).await;

    // The url leads to the standby.
    let mut command = lab.program(&["doctor"]);
    let found = examine(command.env("DATABASE_URL", standby.url("here"))).await;
    assert_eq!(fix(&found, "D22", "error", "it is a standby"), "name the primary in postgres.url");

    // It is gone, and no commit ends any more.
    standby.stop();
    eventually("it is gone", 0, standbys).await;
    let told = fix(&doctor(&lab).await, "D22", "error", "every commit waits for a standby");
    execute(&lab, told.split("without it: ").nth(1).expect("statements")).await;
    eventually("the setting is read", true, well).await;
    lab.client().await.add("a", 1).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_nobody_and_a_database_that_is_read_only_are_found() {
    let postgres = Postgres::start(&["wal_level=logical"]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "here").await;
    // Whoever subscribes to a table is no standby.
    let subscriber = Postgres::start(&[]).await.expect("PostgreSQL starts");
    lab.execute("create publication told for table public.counters").await;
    let mut there = PgConnection::connect(&subscriber.url("postgres")).await.expect("connected");
    let subscribe = format!(
        "create subscription told connection 'host=127.0.0.1 port={} user=postgres dbname=here' publication told",
        postgres.port()
    );
    let table = "create table public.counters (id text primary key, value bigint, updated_at timestamptz)";
    for statement in [table, &subscribe] {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut there).await.expect("subscribed");
    }
    let subscribed =
        async || lab.number("select count(*) from pg_stat_replication where application_name = 'told'").await;
    eventually("a subscriber", 1, subscribed).await;
    assert_well(&doctor(&lab).await, "D22");
    sqlx::raw_sql("drop subscription told").execute(&mut there).await.expect("unsubscribed");
    for spoil in [
        "alter database here set default_transaction_read_only = on",
        "alter role postgres set default_transaction_read_only = on",
        "alter role postgres in database here set default_transaction_read_only = on",
        "alter system set default_transaction_read_only = on; select pg_reload_conf()",
    ] {
        execute(&lab, spoil).await;
        let read_only = async || of(&doctor(&lab).await, "D22").iter().any(|finding| finding["severity"] == "error");
        eventually("the setting is read", true, read_only).await;
        let told = fix(&doctor(&lab).await, "D22", "error", "default_transaction_read_only is on");
        let mut session = lab.sql().await;
        for statement in told.split("; ") {
            sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut session).await.expect(spoil);
        }
        let well = async || of(&doctor(&lab).await, "D22").iter().all(|finding| finding["severity"] == "ok");
        eventually(spoil, true, well).await;
    }
    execute(&lab, "alter system set synchronous_standby_names = 'nobody'; select pg_reload_conf()").await;
    let waits = async || of(&doctor(&lab).await, "D22").iter().any(|finding| finding["severity"] == "error");
    eventually("the setting is read", true, waits).await;
    let told = fix(&doctor(&lab).await, "D22", "error", "(synchronous_standby_names is nobody), and none is connected");
    execute(&lab, told.split("without it: ").nth(1).expect("statements")).await;
    let well = async || of(&doctor(&lab).await, "D22").iter().all(|finding| finding["severity"] == "ok");
    eventually("the setting is read", true, well).await;
    let (code, _, stderr) = output(&mut lab.program(&["run", "--until-empty"])).await;
    assert_eq!(code, 0, "{stderr}");
}
