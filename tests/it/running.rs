//! `tidegate run`: what it refuses at the start, reloads, and how `--until-empty` ends.

use rustix::process::Signal;

use crate::harness::{self, Daemon, Lab, output};
use crate::migrate::unmigrated;

#[tokio::test(flavor = "multi_thread")]
async fn run_refuses_an_unmigrated_database_and_says_what_to_type() {
    let lab = unmigrated().await;
    let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("run `tidegate migrate`"), "{stderr}");
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
    let nobody = harness::free_port();
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
    command.env("TIDEGATE__STOP__GRACE", "3s");
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
    // It has something to settle: else it stops at once.
    daemon.wait_for_event("reclaimed", |_| true).await;
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
