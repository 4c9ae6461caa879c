//! Tables that do not fit, and tables with an order of their own.

use sqlx::AssertSqlSafe;

use crate::harness::{Daemon, GROUP, Lab, STREAM, eventually, output};

/// What `tidegate run` says of a table that is made like this.
async fn refusal(lab: &Lab, table: &str) -> String {
    lab.execute(&format!("drop table if exists public.counters cascade; {table}")).await;
    let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert_eq!(code, 78, "{table}: {stderr}");
    stderr
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_cannot_hold_every_sum_is_refused_with_the_statement_that_mends_it() {
    let lab = Lab::new().await;
    for unfit in ["real", "double precision", "money", "text", "numeric(10, -2)"] {
        let table =
            format!("create table public.counters (id text primary key, value {unfit}, updated_at timestamptz)");
        let stderr = refusal(&lab, &table).await;
        assert!(stderr.contains("alter table public.counters alter column value type"), "{unfit}: {stderr}");
    }
    for fit in ["bigint", "integer", "numeric", "numeric(30, 4)"] {
        lab.execute("drop table if exists public.counters").await;
        lab.execute(&format!(
            "create table public.counters (id text primary key, value {fit}, updated_at timestamptz)"
        ))
        .await;
        lab.client().await.call(&["XADD", STREAM, "*", "id", fit, "amount", "3"]).await;
        lab.settle_everything().await;
        assert_eq!(lab.number("select sum(value)::bigint from public.counters").await, 3, "{fit}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_does_not_fit_is_said_at_once() {
    let lab = Lab::new().await;
    let stderr = refusal(
        &lab,
        "create table public.counters (id json, value real, updated_at text, owner text not null);
         create rule quiet as on insert to public.counters do instead nothing",
    )
    .await;
    for finding in [
        "the key's column id has type json",
        "no unique index on id",
        "column value has type real",
        "column updated_at has type text",
        "column owner must not be null and has no default",
        "drop rule quiet on public.counters",
    ] {
        assert!(stderr.contains(finding), "no {finding:?} in {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_table_is_called_by_its_name() {
    let lab = Lab::new().await;
    let stderr = refusal(&lab, "create view public.counters as select 'a'::text as id, 1::bigint as value").await;
    assert!(stderr.contains("is a view") && !stderr.contains("does not exist"), "{stderr}");
    lab.execute("drop view public.counters").await;
    let (_, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert!(stderr.contains("does not exist: create it"), "{stderr}");
    let generated =
        "create table public.counters (id text primary key, n int, value bigint generated always as (n) stored)";
    assert!(refusal(&lab, generated).await.contains("column value is generated"));
}

#[tokio::test(flavor = "multi_thread")]
async fn null_and_a_delta_are_the_delta() {
    let lab = Lab::new().await;
    lab.execute(
        "alter table public.counters alter column value drop not null; insert into public.counters values ('a', null)",
    )
    .await;
    lab.client().await.add("a", 5).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_drops_rows_halts_the_pipeline_and_nothing_is_acknowledged() {
    let lab = Lab::new().await;
    lab.execute(
        "create function public.drop_row() returns trigger language plpgsql as $$ begin
             if new.id = 'dropped' then return null; end if;
             return new;
         end $$;
         create trigger quiet before insert on public.counters for each row execute function public.drop_row()",
    )
    .await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    client.add("dropped", 1).await;
    let line = daemon.wait_for("flushing is halted").await;
    assert!(line["fault"].as_str().is_some_and(|fault| fault.contains("only 0 of 1 rows")), "{line}");
    assert_eq!(
        (lab.pending().await, lab.in_ledger().await),
        (1, 1),
        "its entry is neither acknowledged nor in the ledger"
    );
    lab.execute("drop trigger quiet on public.counters").await;
    lab.await_value("dropped", 1).await;
    lab.assert_settled().await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}

/// Keys that are equal for this type are one row, whoever flushes them, and nobody waits in a circle.
async fn one_row(key_type: &str, before: &str, same: &[&str], other: &str) {
    let lab = Lab::new().await;
    let (before, table) = (
        before.to_owned(),
        format!("drop table public.counters; create table public.counters (id {key_type} primary key, value bigint)"),
    );
    lab.execute(&format!("{before}; {table}")).await;
    let mut client = lab.client().await;
    for n in 0..300 {
        for key in same {
            client.call(&["XADD", STREAM, "*", "id", key, "amount", "1"]).await;
        }
        if n % 10 == 0 {
            client.call(&["XADD", STREAM, "*", "id", other, "amount", "1"]).await;
        }
    }
    let daemons: Vec<Daemon> = (0..2)
        .map(|_| {
            let mut command = lab.program(&["run"]);
            command.env("TIDEGATE__RUN__WORKERS", "2").env("TIDEGATE__BATCH__MAX_ENTRIES", "50");
            command
                .env("TIDEGATE__BATCH__READ_COUNT", "20")
                .env("TIDEGATE__PIPELINES__COUNTERS__UPDATED_AT_COLUMN", "");
            Daemon::start(command)
        })
        .collect();
    let total = 300 * same.len() as i64 + 30;
    let settled = async || lab.number("select coalesce(sum(value), 0)::bigint from public.counters").await;
    eventually(key_type, total, settled).await;
    drop(daemons);
    let rows: Vec<i64> =
        sqlx::query_scalar(AssertSqlSafe("select value from public.counters order by value".to_owned()))
            .fetch_all(&mut lab.sql().await)
            .await
            .expect("readable");
    assert_eq!(rows, [30, 300 * same.len() as i64], "{key_type}");
    assert_eq!(lab.number("select deadlocks from pg_stat_database where datname = current_database()").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_type_takes_for_equal_are_one_row() {
    one_row("citext", "create extension citext", &["Straße", "STRASSE", "strasse"][1..], "b").await;
    if Lab::new().await.number("select count(*) from pg_collation where collname = 'en-x-icu'").await > 0 {
        one_row(
            "text collate no_case",
            "create collation no_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
            &["Page", "page", "PAGE"],
            "other",
        )
        .await;
    } else {
        eprintln!("skipped: this PostgreSQL is built without ICU, so it has no collation without regard to case");
    }
    one_row("char(8)", "", &["a", "a  "], "b").await;
    let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    one_row("uuid", "", &[uuid, &uuid.to_uppercase()], "6ba7b811-9dad-11d1-80b4-00c04fd430c8").await;
    one_row("bigint", "", &["7", "007", "+7"], "8").await;
    one_row("numeric(10, 2)", "", &["1", "1.00", "1.001"], "1.01").await;
    one_row("timestamptz", "", &["2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01"], "2026-01-01T00:00:01Z").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_none_of_its_type_is_a_dead_letter_and_harms_no_neighbour() {
    let lab = Lab::new().await;
    lab.execute("drop table public.counters; create table public.counters (id bigint primary key, value bigint, updated_at timestamptz)")
        .await;
    let mut client = lab.client().await;
    for key in ["1", "x", "2", "99999999999999999999"] {
        client.call(&["XADD", STREAM, "*", "id", key, "amount", "1"]).await;
    }
    let _daemon = lab.daemon();
    eventually("good ones", 2, async || lab.number("select count(*) from public.counters").await).await;
    eventually("dead letters", 2, async || lab.number("select count(*) from tidegate.dead_letters").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_rights_are_said_at_the_start_with_the_grant() {
    let lab = Lab::new().await;
    lab.execute("create role limited_tables login; grant usage on schema tidegate to limited_tables; grant select, insert, update, delete on all tables in schema tidegate to limited_tables; grant select on public.counters to limited_tables").await;
    let mut command = lab.program(&["run"]);
    let (_, place) = lab.database.split_once('@').expect("a user in the url");
    command.env("DATABASE_URL", format!("postgres://limited_tables@{place}"));
    let (code, _, stderr) = output(&mut command).await;
    assert_eq!(code, 78, "{stderr}");
    let grant = "grant insert (id, value, updated_at), update (value, updated_at) on public.counters to limited_tables";
    assert!(stderr.contains(grant), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_change_is_stated_and_never_applies_again_what_was_applied() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 100).await;
    lab.settle_everything().await;
    lab.execute("create table public.moved (like public.counters including all)").await;
    let configured = |arguments: &[&str], pipeline: &str| {
        let mut command = lab.program(arguments);
        command.env(format!("TIDEGATE__PIPELINES__{pipeline}__STREAM"), STREAM);
        command.env(format!("TIDEGATE__PIPELINES__{pipeline}__TABLE"), "public.moved");
        command
    };
    let (code, _, stderr) = output(&mut configured(&["run", "--until-empty"], "COUNTERS")).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("tidegate migrate --retarget counters"), "{stderr}");
    // The table was renamed: its ledger goes with it.
    lab.execute("drop table public.moved; alter table public.counters rename to moved").await;
    let (code, stdout, _) = output(&mut configured(&["migrate", "--retarget", "counters"], "COUNTERS")).await;
    assert_eq!((code, stdout.as_str()), (0, "1 ledgers of counters carried over to public.moved\n"));
    // Then the pipeline gets another name: refused, until that is stated too.
    let (code, _, stderr) = output(&mut configured(&["run", "--until-empty"], "TOTALS")).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("--rename-pipeline counters=totals"), "{stderr}");
    let (code, stdout, _) =
        output(&mut configured(&["migrate", "--rename-pipeline", "counters=totals"], "TOTALS")).await;
    assert_eq!(code, 0);
    let next = format!("`tidegate group repair`, which removes group {GROUP} from {STREAM}");
    assert!(stdout.contains(&next), "{stdout}");
    let (code, _, stderr) = output(&mut configured(&["run", "--until-empty"], "TOTALS")).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.number("select value from public.moved").await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pipelines_that_swap_their_streams_are_refused() {
    let lab = Lab::new().await;
    lab.execute("create table public.second (like public.counters including all)").await;
    let with_streams = |first: &str, second: &str| {
        let mut command = lab.program(&["run", "--until-empty"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", first);
        command.env("TIDEGATE__PIPELINES__SECOND__STREAM", second);
        command.env("TIDEGATE__PIPELINES__SECOND__TABLE", "public.second");
        command
    };
    assert_eq!(output(&mut with_streams("flush:one", "flush:two")).await.0, 0);
    let (code, _, stderr) = output(&mut with_streams("flush:two", "flush:one")).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("swapped their streams"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_with_other_columns_is_refused_while_the_first_one_lives() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add column other bigint, alter column value set default 0").await;
    let mut first = lab.daemon();
    first.wait_for("created the consumer group").await;
    let second = || {
        let mut command = lab.program(&["run", "--until-empty"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__VALUE_COLUMN", "other");
        command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
        command
    };
    let mut renamed_host = second();
    let (code, _, stderr) = output(&mut renamed_host).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("value=value") && stderr.contains("value=other"), "both are named: {stderr}");
    first.signal(rustix::process::Signal::TERM);
    assert!(first.exit().await.success());
    assert_eq!(output(&mut second()).await.0, 0, "the column is another one from now on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_pipeline_was_taken_over_with_another_configuration_halts_and_names_both() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    lab.execute("update tidegate.lanes set mapping = 'key=id value=other'").await;
    client.add("a", 1).await;
    let line = daemon.wait_for("flushing is halted").await.to_string();
    assert!(line.contains("value=other") && line.contains("value=value"), "{line}");
    assert_eq!(lab.value("a").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_another_pipeline_has_got_is_never_written_by_a_daemon_that_remembers_it() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemon = lab.daemon();
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    // PostgreSQL is restored to before the pipeline existed, and another one gets its number.
    lab.execute(
        "delete from tidegate.ledger; delete from public.counters;
         update tidegate.lanes set pipeline = 'foreign', stream = 'flush:foreign', target = 'public.foreign'",
    )
    .await;
    client.add("a", 1).await;
    let line = daemon.wait_for("PostgreSQL does not know this pipeline any more").await;
    assert!(line["fault"].as_str().is_some_and(|fault| fault.contains("pipeline counters")), "{line}");
    lab.await_value("a", 1).await;
    let foreign = "select count(*) from tidegate.ledger join tidegate.lanes using (lane) where pipeline = 'foreign'";
    assert_eq!((lab.number(foreign).await, lab.in_ledger().await), (0, 1), "nothing went into the foreign lane");
}
