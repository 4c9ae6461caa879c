//! `tidegate check --live`: each thing that does not fit is found, its statement is executed as it is printed, and it is found no more.

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::process::Command;

use crate::contract::assert_fits;
use crate::harness::{Lab, output};

/// The program with this configuration and without a Valkey.
fn check(lab: &Lab, file: &tempfile::NamedTempFile, arguments: &[&str]) -> Command {
    let mut command = lab.program(&[&["--config", file.path().to_str().expect("a path")], arguments].concat());
    command.env_remove("VALKEY_URL");
    command
}

/// A pipeline of usage; `more` are further keys of its section.
fn section(keys: &str, values: &str, more: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = format!(
        "[pipelines.usage]\nstream = \"flush:usage\"\ntable = \"public.usage\"\nkeys = \"{keys}\"\nvalues = \"{values}\"\n{more}\n"
    );
    let text = if more.contains("updated_at_column") { text } else { text + "updated_at_column = \"\"\n" };
    std::fs::write(file.path(), text).expect("written");
    file
}

const KEYS: &str = "tenant, day: date";
const VALUES: &str = "n = count(), bytes = sum(bytes)";
const TABLE: &str = "create table public.usage (tenant text, day date, n bigint not null default 0, bytes bigint not null default 0, primary key (tenant, day)) with (fillfactor = 70)";

/// What is found: exit code, and severity, evidence and statement of each finding.
async fn found(
    lab: &Lab,
    file: &tempfile::NamedTempFile,
    url: Option<&str>,
) -> (i32, Vec<(String, String, Option<String>)>) {
    let mut command = check(lab, file, &["check", "--live", "--output", "json"]);
    if let Some(url) = url {
        command.env("DATABASE_URL", url);
    }
    let (code, stdout, stderr) = output(&mut command).await;
    let document: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{code}: {stdout}{stderr}"));
    assert_fits("check", &document);
    assert_eq!(document["fits"] == true, code == 0, "{document}");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let tables = document["tables"].as_array().expect("a list").iter();
    let findings = tables.flat_map(|table| table["findings"].as_array().expect("a list"));
    let finding = |f: &Value| (text(&f["severity"]), text(&f["evidence"]), f["fix"].as_str().map(str::to_owned));
    (code, findings.map(finding).collect())
}

/// A fault in a database of its own: it is found as `severity` with `words`, its statement is executed, and it is found no more.
async fn mends(lab: &Lab, (keys, values, more): (&str, &str, &str), setup: &str, severity: &str, words: &str) {
    lab.execute(&format!(
        "drop table if exists public.usage cascade; drop schema if exists other cascade; create schema other; {setup}"
    ))
    .await;
    let file = section(keys, values, more);
    let is_it = |(s, evidence, _): &&(String, String, Option<String>)| s == severity && evidence.contains(words);
    let (code, findings) = found(lab, &file, None).await;
    let wanted = if findings.iter().any(|(severity, ..)| severity == "error") { 78 } else { 0 };
    assert_eq!(code, wanted, "{setup}: {findings:?}");
    let one =
        findings.iter().find(is_it).unwrap_or_else(|| panic!("no {severity} {words:?} after {setup}: {findings:?}"));
    let fix = one.2.clone().unwrap_or_else(|| panic!("{one:?} has no statement"));
    let mut sql = PgConnection::connect(&lab.database).await.expect("connected");
    let executed = sqlx::raw_sql(AssertSqlSafe(fix.clone())).execute(&mut sql).await;
    assert!(executed.is_ok(), "{fix}: {executed:?}");
    let (_, left) = found(lab, &file, None).await;
    assert!(!left.iter().any(|finding| is_it(&finding)), "after {fix}: {left:?}");
    assert!(!left.iter().any(|(severity, ..)| severity == "error"), "after {fix}: {left:?}");
}

const PLAIN: (&str, &str, &str) = (KEYS, VALUES, "");

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_fits_has_no_finding_and_check_needs_no_valkey() {
    let lab = Lab::new().await;
    lab.execute(TABLE).await;
    let file = section(KEYS, VALUES, "");
    assert_eq!(found(&lab, &file, None).await, (0, vec![]));
    let (code, stdout, stderr) = output(&mut check(&lab, &file, &["check", "--live"])).await;
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(
        stdout.starts_with("the configuration is valid, and every table fits\npublic.usage (pipeline usage): fits"),
        "{stdout}"
    );
    // A server that is away is not a table that does not fit.
    let nobody = crate::harness::free_port();
    let mut command = check(&lab, &file, &["check", "--live"]);
    command.env("DATABASE_URL", format!("postgres://me:hunter2@127.0.0.1:{nobody}/none"));
    let (code, _, stderr) = output(&mut command).await;
    assert!(code == 69 && !stderr.contains("hunter2"), "{code}: {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_goes_with_another_pipeline_is_named_by_its_own_section() {
    let lab = Lab::new().await;
    lab.execute(TABLE).await;
    let rider =
        "[pipelines.total]\nwith = \"usage\"\ntable = \"public.total\"\nkeys = \"tenant\"\nvalues = \"n = count()\"";
    let file = section(KEYS, VALUES, &format!("updated_at_column = \"\"\n{rider}"));
    let (code, stdout, stderr) = output(&mut check(&lab, &file, &["check", "--live"])).await;
    assert_eq!(code, 78, "{stderr}");
    for line in ["public.usage (pipeline usage): fits", "public.total (pipeline total, with usage): does not fit"] {
        assert!(stdout.lines().any(|shown| shown == line), "{stdout}");
    }
    let mut command = check(&lab, &file, &["check", "--live", "--output", "json"]);
    let document: Value = serde_json::from_str(&output(&mut command).await.1).expect("JSON");
    assert_fits("check", &document);
    let places = document["tables"].as_array().expect("a list").iter();
    let places: Vec<_> = places.map(|table| (table["pipeline"].as_str(), table["section"].as_str())).collect();
    assert_eq!(places, [(Some("usage"), Some("usage")), (Some("usage"), Some("total"))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_made_by_its_statement() {
    let lab = Lab::new().await;
    mends(&lab, PLAIN, "", "error", "it does not exist").await;
    let values = "n = count(), cost = sum(cost: numeric(2)), p = last(path?) by pv, seen = max(at: timestamptz), o = or(ok?: boolean)";
    let all = ("tenant: uuid, hour = hour(at), Big: bigint, user", values, "updated_at_column = \"at\"");
    mends(&lab, all, "", "error", "it does not exist").await;
    let lacks =
        "create table public.usage (tenant text, day date, n bigint not null default 0, primary key (tenant, day))";
    mends(&lab, PLAIN, lacks, "error", "it has no column bytes").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unique_index_on_exactly_the_keys_is_asked_for() {
    let lab = Lab::new().await;
    let bare = "create table public.usage (tenant text, day date, n bigint default 0, bytes bigint default 0) with (fillfactor = 70);";
    let index = |index: &str| format!("{bare} {index}");
    mends(&lab, PLAIN, bare, "error", "no unique index on tenant, day alone").await;
    for other in [
        "create index on public.usage (tenant, day)",
        "create unique index on public.usage (tenant, day) where n > 0",
        "create unique index on public.usage (tenant, lower(day::text))",
    ] {
        mends(
            &lab,
            PLAIN,
            &index(other).replace("lower(day::text)", "(day + 1)"),
            "error",
            "no unique index on tenant, day alone",
        )
        .await;
    }
    // One that comes later is refused even beside a good one: the upsert would take both.
    let deferrable = "alter table public.usage add constraint late unique (tenant, day) deferrable";
    mends(&lab, PLAIN, &index(deferrable), "error", "is deferrable").await;
    mends(
        &lab,
        PLAIN,
        &index(&format!("create unique index on public.usage (day, tenant); {deferrable}")),
        "error",
        "is deferrable",
    )
    .await;
    let primary =
        "alter table public.usage add constraint late primary key (tenant, day) deferrable initially deferred";
    mends(&lab, PLAIN, &index(primary), "error", "is deferrable").await;
    let invalid = "create unique index broken on public.usage (tenant, day); update pg_index set indisvalid = false where indexrelid = 'public.broken'::regclass";
    mends(&lab, PLAIN, &index(invalid), "error", "is not valid").await;
    if lab.number("select count(*) from pg_collation where collname = 'en-x-icu'").await > 0 {
        let folds = "create collation if not exists public.folds (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
            create unique index on public.usage (tenant collate public.folds, day)";
        mends(&lab, PLAIN, &index(folds), "error", "other keys are equal").await;
    } else {
        eprintln!("skipped: this PostgreSQL is built without ICU, so it has no collation without regard to case");
    }
    // All of these will do.
    for fits in [
        "create unique index on public.usage (day, tenant)",
        "create unique index on public.usage (tenant, day) nulls not distinct",
        "create unique index on public.usage (tenant text_pattern_ops, day)",
        "create unique index on public.usage (tenant collate \"C\", day desc)",
        "create unique index on public.usage (tenant, day); create unique index on public.usage (tenant, day, n) where false",
    ] {
        lab.execute(&format!("drop table if exists public.usage; {}", index(fits))).await;
        let (code, findings) = found(&lab, &section(KEYS, VALUES, ""), None).await;
        assert!(code == 0 && !findings.iter().any(|(severity, ..)| severity != "advice"), "{fits}: {findings:?}");
    }
}

/// The table with this behind it.
fn with(more: &str) -> String {
    format!("{TABLE}; {more}")
}

#[tokio::test(flavor = "multi_thread")]
async fn other_unique_indexes_are_judged_by_what_they_let_in() {
    let lab = Lab::new().await;
    mends(&lab, PLAIN, &with("create unique index on public.usage (tenant)"), "error", "lets in one row only").await;
    mends(&lab, PLAIN, &with("create unique index on public.usage (bytes)"), "warning", "may refuse rows").await;
    mends(&lab, PLAIN, &with("alter table public.usage add unique (tenant, n)"), "warning", "may refuse rows").await;
    mends(&lab, PLAIN, &with("create unique index on public.usage (tenant) where n > 5"), "warning", "may refuse rows")
        .await;
    mends(&lab, PLAIN, &with("create unique index on public.usage ((n + 1))"), "warning", "may refuse rows").await;
    mends(
        &lab,
        PLAIN,
        &with("alter table public.usage add column c text default 'x'; create unique index on public.usage (c)"),
        "error",
        "lets in one row only",
    )
    .await;
    let exclusion = "alter table public.usage add constraint apart exclude using btree (n with =)";
    mends(&lab, PLAIN, &with(exclusion), "warning", "exclusion constraint").await;
    for harmless in [
        "alter table public.usage add column id bigserial; create unique index on public.usage (id)",
        "alter table public.usage add column id uuid default gen_random_uuid() unique",
        "alter table public.usage add column note text unique",
        "create unique index on public.usage (day, n, tenant)",
    ] {
        lab.execute(&format!("drop table public.usage; {}", with(harmless))).await;
        let (code, findings) = found(&lab, &section(KEYS, VALUES, ""), None).await;
        assert!(code == 0 && !findings.iter().any(|(severity, ..)| severity != "advice"), "{harmless}: {findings:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_refuse_what_is_written_are_found() {
    let lab = Lab::new().await;
    let optional = (KEYS, "n = count(), p = last(path?) by pv", "");
    let table = |columns: &str| {
        format!(
            "create table public.usage (tenant text, day date, n bigint default 0, {columns}, primary key (tenant, day)) with (fillfactor = 70)"
        )
    };
    mends(
        &lab,
        optional,
        &table("p text not null, pv numeric"),
        "error",
        "column p must not be null, and the first entry",
    )
    .await;
    mends(
        &lab,
        optional,
        &table("p text, pv numeric not null default 0"),
        "error",
        "column pv must not be null, and the first entry",
    )
    .await;
    mends(&lab, optional, &table("p text, pv bigint"), "error", "a version needs numeric").await;
    let bytes = "bytes bigint default 0";
    mends(
        &lab,
        PLAIN,
        &table(&format!("{bytes}, owner text not null")),
        "error",
        "column owner must not be null and has no default",
    )
    .await;
    mends(
        &lab,
        PLAIN,
        &format!(
            "drop domain if exists filled; create domain filled as text not null; {}",
            table(&format!("{bytes}, owner filled"))
        ),
        "error",
        "column owner must not be null",
    )
    .await;
    mends(&lab, PLAIN, &table("bytes bigint generated always as (n * 2) stored"), "error", "column bytes is generated")
        .await;
    mends(&lab, PLAIN, &table("bytes bigint generated always as identity"), "error", "generated always as identity")
        .await;
    mends(&lab, PLAIN, &table("bytes real"), "error", "column bytes has type real").await;
    let stamped = (KEYS, VALUES, "updated_at_column = \"at\"");
    mends(&lab, stamped, &table(&format!("{bytes}, at text")), "error", "which is no time").await;
    let named = ("tenant, User: bigint", "Sum = sum(bytes)", "");
    mends(
        &lab,
        named,
        "create table public.usage (tenant text, \"User\" bigint, \"Sum\" real, primary key (tenant, \"User\"))",
        "error",
        "column \"Sum\" has type real",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hides_drops_or_loses_rows_is_found() {
    let lab = Lab::new().await;
    mends(
        &lab,
        PLAIN,
        &with("create rule quiet as on insert to public.usage do instead nothing"),
        "error",
        "rule quiet",
    )
    .await;
    mends(&lab, PLAIN, &TABLE.replace("create table", "create unlogged table"), "error", "it is not logged").await;
    mends(
        &lab,
        PLAIN,
        &with("create table other.child () inherits (public.usage)"),
        "warning",
        "other.child inherits from it",
    )
    .await;
    let drops =
        "create or replace function public.drop_row() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger quiet before update on public.usage for each row execute function public.drop_row()";
    mends(&lab, PLAIN, &with(drops), "warning", "the trigger quiet").await;
    mends(
        &lab,
        PLAIN,
        &with("alter table public.usage add constraint positive check (bytes >= 0)"),
        "warning",
        "positive CHECK ((bytes >= 0))",
    )
    .await;
    let domain = "drop domain if exists amount cascade; create domain amount as bigint check (value >= 0);";
    mends(
        &lab,
        PLAIN,
        &format!("{domain} {}", TABLE.replace("bytes bigint", "bytes amount")),
        "warning",
        "of the domain public.amount",
    )
    .await;
    let refers = "create table other.tenants (tenant text primary key); alter table public.usage add foreign key (tenant) references other.tenants";
    mends(&lab, PLAIN, &with(refers), "warning", "foreign key usage_tenant_fkey").await;
    let referred =
        "create table other.notes (tenant text, day date, foreign key (tenant, day) references public.usage)";
    mends(&lab, (KEYS, VALUES, "write = \"delete_zero\""), &with(referred), "warning", "other.notes refers to it")
        .await;
    let published = TABLE.replace("primary key", "unique");
    let publication = "drop publication if exists changes; create publication changes for table public.usage";
    mends(&lab, PLAIN, &format!("{published}; {publication}"), "error", "has no replica identity").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_looked_at_one_by_one() {
    let lab = Lab::new().await;
    let parent = |by: &str| TABLE.replace(" with (fillfactor = 70)", &format!(" partition by {by}"));
    let month =
        "create table other.november partition of public.usage for values from ('2026-11-01') to ('2026-12-01')";
    let range = format!("{}; {month}", parent("range (day)"));
    mends(&lab, PLAIN, &range, "warning", "public.usage is partitioned and has no default partition").await;
    mends(&lab, PLAIN, &range, "advice", "other.november fills its pages").await;
    mends(
        &lab,
        PLAIN,
        &format!("{range}; alter table other.november set unlogged"),
        "error",
        "its partition other.november is not logged",
    )
    .await;
    let drops =
        "create or replace function public.drop_row() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger quiet before insert on other.november for each row execute function public.drop_row()";
    mends(&lab, PLAIN, &format!("{range}; {drops}"), "warning", "before each row of other.november").await;
    let server = "create extension if not exists postgres_fdw; create server if not exists elsewhere foreign data wrapper postgres_fdw;
        create foreign table other.december partition of public.usage for values from ('2026-12-01') to ('2027-01-01') server elsewhere";
    // A table with a unique index takes no partition on another server; one without may have it before the index is made.
    let bare = range.replace(", primary key (tenant, day)", "");
    if lab.number("select count(*) from pg_available_extensions where name = 'postgres_fdw'").await > 0 {
        lab.execute(&format!("drop table if exists public.usage cascade; drop schema if exists other cascade; create schema other; {bare}; {server}")).await;
        let (code, findings) = found(&lab, &section(KEYS, VALUES, ""), None).await;
        let fix = findings
            .iter()
            .find(|finding| finding.1.contains("other.december is on another server"))
            .and_then(|finding| finding.2.clone());
        lab.execute(&fix.expect("a statement")).await;
        let (_, left) = found(&lab, &section(KEYS, VALUES, ""), None).await;
        assert!(code == 78 && !left.iter().any(|finding| finding.1.contains("another server")), "{left:?}");
    }
    // A hash of which half is missing, and a key that the partitions are not made by.
    let half = format!(
        "{}; create table other.half partition of public.usage for values with (modulus 2, remainder 0)",
        parent("hash (tenant)")
    );
    lab.execute(&format!("drop table if exists public.usage cascade; {half}")).await;
    let (code, findings) = found(&lab, &section(KEYS, VALUES, ""), None).await;
    assert!(
        code == 0 && findings.iter().any(|(_, evidence, _)| evidence.contains("a remainder has no partition")),
        "{findings:?}"
    );
    let (code, findings) = found(&lab, &section("day: date", VALUES, ""), None).await;
    assert!(
        code == 78
            && findings
                .iter()
                .any(|(_, evidence, _)| evidence.contains("partitioned by tenant, which is not among the keys")),
        "{findings:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_asked_for_by_column_and_no_more_than_is_needed() {
    let lab = Lab::new().await;
    lab.execute("drop role if exists by_column; create role by_column login").await;
    let (_, place) = lab.database.split_once('@').expect("a user in the url");
    let url = format!("postgres://by_column@{place}");
    for (more, setup, words) in [
        ("", "revoke usage on schema public from public", "may not use the schema"),
        (
            "",
            "grant usage on schema public to public",
            "lacks the right to select (tenant, day, n, bytes), insert (tenant, day, n, bytes), update (n, bytes)",
        ),
        (
            "write = \"insert\"",
            "revoke all on public.usage from by_column",
            "lacks the right to select (tenant, day), insert (tenant, day, n, bytes)",
        ),
        ("write = \"delete_zero\"", "revoke all on public.usage from by_column", "update (n, bytes), delete"),
        (
            "",
            "alter table public.usage enable row level security; grant all on public.usage to by_column",
            "row security applies",
        ),
    ] {
        if lab.number("select count(*) from pg_class where relname = 'usage'").await == 0 {
            lab.execute(TABLE).await;
        }
        lab.execute(setup).await;
        let file = section(KEYS, VALUES, more);
        let (code, findings) = found(&lab, &file, Some(&url)).await;
        let finding = findings
            .iter()
            .find(|finding| finding.1.contains(words))
            .unwrap_or_else(|| panic!("{words}: {findings:?}"));
        assert_eq!(code, 78);
        lab.execute(&finding.2.clone().expect("a statement")).await;
        let (_, left) = found(&lab, &file, Some(&url)).await;
        assert!(!left.iter().any(|finding| finding.1.contains(words)), "{left:?}");
    }
    // What was granted is enough to flush.
    lab.execute("alter table public.usage disable row level security; revoke all on public.usage from by_column").await;
    let file = section(KEYS, VALUES, "");
    let (_, findings) = found(&lab, &file, Some(&url)).await;
    lab.execute(&findings[0].2.clone().expect("a statement")).await;
    lab.execute("grant usage on schema tidegate to by_column; grant select, insert, update, delete on all tables in schema tidegate to by_column; grant usage on all sequences in schema tidegate to by_column").await;
    lab.client().await.call(&["XADD", "flush:usage", "*", "tenant", "a", "day", "2026-11-27", "bytes", "5"]).await;
    lab.client().await.call(&["XADD", "flush:usage", "*", "tenant", "a", "day", "2026-11-27", "bytes", "6"]).await;
    for _ in 0..2 {
        let mut run = check(&lab, &file, &["run", "--until-empty"]);
        run.env("VALKEY_URL", lab.valkey.url()).env("DATABASE_URL", &url);
        let (code, _, stderr) = output(&mut run).await;
        assert_eq!(code, 0, "{stderr}");
        lab.client().await.call(&["XADD", "flush:usage", "*", "tenant", "a", "day", "2026-11-27", "bytes", "7"]).await;
    }
    assert_eq!(lab.number("select bytes from public.usage").await, 18);
    // The owner is bound by row security that is forced.
    lab.execute("alter role by_column nobypassrls; alter table public.usage owner to by_column; alter table public.usage enable row level security, force row level security").await;
    let (code, findings) = found(&lab, &file, Some(&url)).await;
    let fix = findings
        .iter()
        .find(|finding| finding.1.contains("row security"))
        .and_then(|finding| finding.2.clone())
        .expect("a statement");
    assert!(code == 78 && fix.contains("no force row level security"), "{findings:?}");
    lab.execute(&fix).await;
    let (_, left) = found(&lab, &file, Some(&url)).await;
    assert!(!left.iter().any(|finding| finding.1.contains("row security")), "{left:?}");
    lab.execute("reassign owned by by_column to current_user; drop owned by by_column; drop role by_column").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_updates_cheap_is_advice_and_keeps_nobody_from_starting() {
    let lab = Lab::new().await;
    mends(&lab, PLAIN, &TABLE.replace(" with (fillfactor = 70)", ""), "advice", "fills its pages").await;
    mends(&lab, PLAIN, &with("create index on public.usage (bytes)"), "advice", "looks at bytes").await;
    mends(&lab, PLAIN, &with("create index on public.usage ((n + 1))"), "advice", "looks at n").await;
    mends(&lab, PLAIN, &with("create index on public.usage (tenant) where n > 0"), "advice", "looks at n").await;
    mends(
        &lab,
        PLAIN,
        &TABLE.replace("primary key (tenant, day)", "unique (tenant, day) include (n)"),
        "advice",
        "looks at n",
    )
    .await;
    mends(
        &lab,
        PLAIN,
        &with("alter table public.usage set (autovacuum_enabled = off)"),
        "advice",
        "left alone by autovacuum",
    )
    .await;
    mends(
        &lab,
        PLAIN,
        &with("update pg_class set reltuples = 5e6 where oid = 'public.usage'::regclass"),
        "advice",
        "a million rows",
    )
    .await;
    lab.execute(&format!("drop table public.usage; {}", TABLE.replace(" with (fillfactor = 70)", ""))).await;
    assert_eq!(
        found(&lab, &section(KEYS, VALUES, "write = \"insert\""), None).await,
        (0, vec![]),
        "rows that are never updated need no room"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn all_tables_of_a_pipeline_are_judged_at_once() {
    let lab = Lab::new().await;
    let file = section(KEYS, VALUES, "");
    let text = std::fs::read_to_string(file.path()).expect("text");
    std::fs::write(file.path(), text + "[pipelines.daily]\nwith = \"usage\"\ntable = \"public.daily\"\nkeys = \"day: date\"\nvalues = \"n = count()\"\nupdated_at_column = \"\"\n").expect("written");
    let (code, findings) = found(&lab, &file, None).await;
    assert_eq!((code, findings.len()), (78, 2), "{findings:?}");
    let mut run = check(&lab, &file, &["run"]);
    run.env("VALKEY_URL", lab.valkey.url());
    let (code, _, stderr) = output(&mut run).await;
    assert!(
        code == 78
            && stderr.contains("table public.usage does not fit")
            && stderr.contains("table public.daily does not fit"),
        "{stderr}"
    );
}

/// Where the catalog of Citus says that a table is distributed, flushes keep to what it documents, and what it cannot give is refused. The catalog is a
/// stand-in: there is no Citus here.
#[tokio::test(flavor = "multi_thread")]
async fn a_distributed_table_is_recognised_and_what_it_cannot_give_is_refused() {
    let lab = Lab::new().await;
    lab.execute(
        "set allow_system_table_mods = on;
         create table pg_catalog.pg_dist_partition (logicalrelid regclass);
         grant select on pg_catalog.pg_dist_partition to public;
         insert into pg_catalog.pg_dist_partition values ('public.counters')",
    )
    .await;
    let mut client = lab.client().await;
    let with = |setting: &str, value: &str, verb: &[&str]| {
        let mut command = lab.program(verb);
        command.env(format!("TIDEGATE__PIPELINES__COUNTERS__{setting}"), value);
        command
    };
    for (setting, value, words) in [
        ("WRITE", "delete_zero", "nothing but write = \"merge\" can be a flush"),
        ("WRITE", "insert", "nothing but write = \"merge\" can be a flush"),
        ("MODE", "managed", "a reader may see one server's part of a flush before another's"),
    ] {
        let (code, _, stderr) = output(&mut with(setting, value, &["run", "--until-empty"])).await;
        assert!(code == 78 && stderr.contains(words), "{value}: {code}: {stderr}");
    }
    client.add_many("a", 3).await;
    let (code, _, stderr) = output(&mut lab.program(&["run", "--until-empty"])).await;
    assert_eq!((code, lab.value("a").await), (0, Some(3)), "{stderr}");
}
