//! What an operator types.

use rustix::process::Signal;

use crate::harness::{self, Daemon, Lab, database, output};

async fn unmigrated() -> Lab {
    Lab { database: database(false).await, ..Lab::new().await }
}

#[tokio::test(flavor = "multi_thread")]
async fn run_refuses_an_unmigrated_database_and_says_what_to_type() {
    let lab = unmigrated().await;
    let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("run `tidegate migrate`"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_shows_its_sql_then_applies_it_once() {
    let lab = unmigrated().await;
    let (code, sql, _) = output(&mut lab.program(&["migrate", "--dry-run"])).await;
    assert_eq!(code, 0);
    assert!(sql.contains("ledger_no_overlap"), "{sql}");
    assert_eq!(
        lab.number("select count(*) from pg_namespace where nspname = 'tidegate'").await,
        0,
        "nothing was changed"
    );
    assert_eq!(output(&mut lab.program(&["migrate"])).await.0, 0);
    assert_eq!(output(&mut lab.program(&["migrate"])).await.1, "the database is up to date\n");
    assert_eq!(output(&mut lab.program(&["migrate", "--dry-run"])).await.1, "-- nothing to do\n");
    lab.client().await.add("a", 1).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_that_migrate_at_the_same_time_do_not_fight() {
    let lab = unmigrated().await;
    lab.client().await.add("a", 1).await;
    let start = || async { output(&mut lab.program(&["run", "--migrate", "--until-empty"])).await };
    let (a, b, c, d) = tokio::join!(start(), start(), start(), start());
    for (code, _, stderr) in [a, b, c, d] {
        assert_eq!(code, 0, "{stderr}");
    }
    assert_eq!(lab.value("a").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_does_not_fit_is_refused_with_the_remedy() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters drop constraint counters_pkey").await;
    let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("create unique index on public.counters (id)"), "{stderr}");
    lab.execute(
        "alter table public.counters rename column value to amount; alter table public.counters add primary key (id)",
    )
    .await;
    let (_, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert!(stderr.contains("has no column value"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_pipeline_is_refused_until_its_ledger_is_carried_over() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 10).await;
    lab.settle_everything().await;
    let renamed = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE__PIPELINES__TOTALS__STREAM", harness::STREAM);
        command.env("TIDEGATE__PIPELINES__TOTALS__TABLE", "public.counters");
        command
    };
    let (code, _, stderr) = output(&mut renamed(&["run", "--until-empty"])).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("tidegate migrate --rename-pipeline counters=totals"), "{stderr}");
    let (code, stdout, stderr) = output(&mut renamed(&["migrate", "--rename-pipeline", "counters=totals"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.starts_with("1 ledgers carried over from counters to totals\n"), "{stdout}");
    let (code, _, stderr) = output(&mut renamed(&["run", "--until-empty"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.value("a").await, Some(10), "everything came again under the new name, and was recognised");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tells_every_fault_and_hides_every_secret() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["check", "--print"]);
    command.env("DATABASE_URL", "postgres://me:hunter2@localhost/db");
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("postgres://me:***@localhost/db") && !stdout.contains("hunter2"), "{stdout}");
    let mut command = lab.program(&["check"]);
    command.env("TIDEGATE__BATCH__MAX_ENTRYS", "5").env("TIDEGATE__RUN__WORKERS", "two");
    let (code, _, stderr) = output(&mut command).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("did you mean") && stderr.contains("run.workers"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_ends_with_66_if_a_configuration_file_cannot_be_read() {
    let lab = Lab::new().await;
    for verb in ["check", "run", "migrate", "produce"] {
        let (code, _, stderr) = output(&mut lab.program(&[verb, "--config", "missing.toml"])).await;
        assert_eq!(code, 66, "{verb}: {stderr}");
        assert!(stderr.contains("missing.toml: cannot be read"), "{verb}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_refused_with_the_remedy_and_never_shown() {
    let lab = Lab::new().await;
    lab.client().await.call(&["CONFIG", "SET", "requirepass", "right"]).await;
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", lab.valkey.url().replace("valkey://", "valkey://:hunter2@"));
    let mut daemon = harness::Daemon::start(command);
    let line = daemon.wait_for("reading is halted").await;
    assert!(line["advice"].as_str().is_some_and(|advice| advice.contains("valkey.url")), "{line}");
    assert!(!daemon.last_lines().contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_proves_itself_and_leaves_nothing_on_borrowed_servers() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut command =
        lab.program(&["demo", "--seconds", "3", "--processes", "2", "--kill-every", "400", "--rate", "5000"]);
    command.env("TIDEGATE_DEMO_VALKEY_URL", lab.valkey.url()).env("TIDEGATE_DEMO_DATABASE_URL", &lab.database);
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("every counter is equal: nothing lost, nothing doubled"), "{stdout}");
    assert_eq!(client.call(&["DBSIZE"]).await.int(), Some(0));
    assert_eq!(lab.number("select count(*) from pg_class where relname like 'tidegate_demo%'").await, 0);
    assert_eq!(lab.in_ledger().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_may_evict_the_stream_is_refused_unless_that_is_accepted() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    client.add("a", 1).await;
    let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("allkeys-lru") && stderr.contains("--accept-eviction"), "{stderr}");
    let accepting = ["run", "--until-empty", "--accept-eviction"];
    assert_eq!(output(&mut lab.program(&accepting)).await.0, 0);
    client.call(&["CONFIG", "SET", "maxmemory-policy", "volatile-lru"]).await;
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bench_measures_proves_itself_and_leaves_nothing() {
    let lab = Lab::new().await;
    let small =
        ["bench", "--json", "--entries", "2_000", "--runs", "1", "--keys", "50", "--rate", "500", "--seconds", "1"];
    let (code, stdout, stderr) = output(&mut lab.program(&small)).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&report["exact"], &report["drain"]["entries"]), (&true.into(), &2_000.into()), "{report}");
    for figure in
        ["/drain/entries_per_second", "/drain/rows_per_second", "/drain/bytes_per_entry", "/steady/latency_ms/p99"]
    {
        assert!(
            report.pointer(figure).and_then(serde_json::Value::as_f64).is_some_and(|n| n > 0.0),
            "{figure}: {report}"
        );
    }
    assert_eq!(lab.client().await.call(&["DBSIZE"]).await.int(), Some(0));
    assert_eq!(lab.number("select count(*) from pg_class where relname like 'tidegate_bench%'").await, 0);
    assert_eq!(lab.number("select count(*) from tidegate.lanes").await, 0);
    assert_eq!(lab.in_ledger().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bench_refuses_a_database_that_is_not_migrated_and_sizes_that_make_no_sense() {
    let lab = Lab { database: harness::database(false).await, ..Lab::new().await };
    let (code, _, stderr) = output(&mut lab.program(&["bench"])).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("run `tidegate migrate`"), "{stderr}");
    for bad in [["--entries", "0"], ["--amounts", "9-1"], ["--id-bytes", "1-5"], ["--rate", "many"]] {
        let (code, _, stderr) = output(lab.program(&["bench"]).args(bad)).await;
        assert_eq!(code, 2, "{bad:?}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_reads_the_configuration_again_and_an_invalid_one_changes_nothing() {
    let lab = Lab::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tidegate.toml");
    let configure = |text: &str| std::fs::write(&file, text).expect("written");
    configure("[run]\nworkers = 1\n");
    let mut command = lab.program(&["run"]);
    command.env_remove("TIDEGATE__RUN__WORKERS").env("TIDEGATE_CONFIG", &file);
    let mut daemon = Daemon::start(command);
    assert_eq!(daemon.wait_for("running").await["workers"], 1);
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;

    configure("[run]\nworkers = 3\n");
    daemon.forget();
    daemon.signal(Signal::HUP);
    assert_eq!(daemon.wait_for("running").await["workers"], 3);
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 2).await;

    configure("[run]\nworkers = \"many\"\n");
    daemon.signal(Signal::HUP);
    let refusal = daemon.wait_for("the configuration cannot be used").await["refusal"].to_string();
    assert!(refusal.contains("run.workers"), "{refusal}");
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 3).await;
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
}

/// `run --until-empty` on these servers: its exit code, and what it says.
async fn until_empty(lab: &Lab, valkey: &str, database: &str) -> (i32, String) {
    let mut command = lab.program(&["run", "--until-empty", "--timeout", "3s"]);
    command.env("VALKEY_URL", valkey).env("DATABASE_URL", database);
    let (code, _, stderr) = output(&mut command).await;
    (code, stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn until_empty_ends_where_waiting_does_not_help() {
    let lab = Lab::new().await;
    let (valkey, database) = (lab.valkey.url(), lab.database.clone());
    let nobody = harness::free_port().await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    client.call(&["ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@all", "-xinfo", "-xrevrange"]).await;
    lab.execute("create role without_rights login").await;
    let (_, place) = database.split_once('@').expect("a user in the url");
    for (code, valkey, database) in [
        (69, format!("valkey://127.0.0.1:{nobody}"), database.clone()),
        (69, valkey.clone(), format!("postgres://postgres@127.0.0.1:{nobody}/none")),
        (77, valkey.replace("valkey://", "valkey://nobody:wrong@"), database.clone()),
        (77, valkey.replace("valkey://", "valkey://reader:secret@"), database.clone()),
        (77, valkey.clone(), format!("postgres://no_such_role@{place}")),
        (77, valkey.clone(), format!("postgres://without_rights@{place}")),
        (78, valkey.clone(), database.replace("test_", "no_such_database_")),
    ] {
        let (found, stderr) = until_empty(&lab, &valkey, &database).await;
        assert_eq!(found, code, "{valkey} {database}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn until_empty_says_by_its_exit_code_what_was_lost_or_buried() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XADD", harness::STREAM, "*", "id", "a", "amount", "bad"]).await;
    let (code, _, stderr) = output(&mut lab.program(&["run", "--until-empty"])).await;
    assert_eq!(code, 65, "{stderr}");
    // Somebody read entries, and then they were deleted: the stream is empty, and the group has not settled them.
    client.add_many("a", 5).await;
    client.call(&["XREADGROUP", "GROUP", harness::GROUP, "dead", "STREAMS", harness::STREAM, ">"]).await;
    client.call(&["XTRIM", harness::STREAM, "MAXLEN", "0"]).await;
    let (code, _, stderr) = output(&mut lab.program(&["run", "--until-empty"])).await;
    assert_eq!(code, 3, "{stderr}");
    assert!(
        stderr.contains("\"entries\":5") && stderr.contains("Valkey lost 5 entries before they were flushed"),
        "five unflushed; a sixth was flushed, and is not missing: {stderr}"
    );
    assert_eq!(lab.pending().await, 0);
    assert_eq!(output(&mut lab.program(&["run", "--until-empty"])).await.0, 0, "said once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_goes_on_where_flushes_cannot_and_a_signal_meanwhile_is_the_first_one() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__STOP__GRACE", "1500ms");
    let mut daemon = Daemon::start(command);
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    let mut lock = lab.sql().await;
    for statement in ["begin", "lock table public.counters in access exclusive mode"] {
        sqlx::raw_sql(statement).execute(&mut lock).await.expect(statement);
    }
    client.add("a", 1).await;
    daemon.wait_for("flushing is interrupted").await;
    daemon.forget();
    daemon.signal(Signal::HUP);
    // Out of time it goes on with the new configuration all the same.
    daemon.wait_for("running").await;
    daemon.forget();
    daemon.signal(Signal::HUP);
    daemon.wait_for("the configuration was read again").await;
    daemon.signal(Signal::TERM);
    daemon.wait_for("stopping: settling what is held").await;
    sqlx::raw_sql("rollback").execute(&mut lock).await.expect("rolled back");
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    lab.settle_everything().await;
    assert_eq!(lab.value("a").await, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_was_changed_after_it_was_applied_is_no_longer_up_to_date() {
    let lab = Lab::new().await;
    lab.execute("update tidegate.migrations set checksum = 'other' where version = 1").await;
    let (code, _, stderr) = output(&mut lab.program(&["migrate"])).await;
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("migration 1 was previously applied but has been modified"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_does_not_exist_and_a_pipeline_that_does_not_are_said_with_what_to_do() {
    let lab = Lab::new().await;
    let mut migrate = lab.program(&["migrate"]);
    let elsewhere = lab.database.rsplit_once('/').map(|(server, _)| format!("{server}/nowhere")).expect("a url");
    let (code, _, stderr) = output(migrate.env("DATABASE_URL", elsewhere)).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("the database does not exist: create it"), "{stderr}");
    let (code, stdout, stderr) = output(&mut lab.program(&["migrate", "--retarget", "typo"])).await;
    assert_eq!((code, stdout.as_str()), (78, ""), "{stderr}");
    assert!(stderr.contains("no pipeline \"typo\""), "{stderr}");
}
