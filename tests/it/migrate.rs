//! `tidegate migrate`.

use crate::harness::{self, Lab, database, output};

pub(crate) async fn unmigrated() -> Lab {
    Lab { database: database(false).await, ..Lab::new().await }
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
