//! A pgbouncer in transaction mode between the daemon and PostgreSQL; and connections that are closed while they are idle.

use std::path::PathBuf;
use std::process::Stdio;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::harness::{Daemon, GROUP, Lab, STREAM, database, eventually, free_port, output};

/// So few that clients get another server's connection all the time.
const POOL: usize = 3;

/// A pgbouncer in front of a lab's PostgreSQL.
pub(crate) struct Pooler {
    port: u16,
    _process: Child,
    _folder: TempDir,
}

impl Pooler {
    /// None where there is no pgbouncer; that is said.
    pub(crate) async fn start(lab: &Lab, setting: &str) -> Option<Pooler> {
        let Some(program) = std::env::var_os("TIDEGATE_PGBOUNCER").map(PathBuf::from).filter(|p| p.is_file()) else {
            eprintln!("skipped: no pgbouncer (TIDEGATE_PGBOUNCER)");
            return None;
        };
        let folder = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let file = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = {POOL}\n{setting}\n",
            lab.postgres_port()
        );
        std::fs::write(&file, text).expect("written");
        let mut command = Command::new(program);
        command
            .arg("-q")
            .arg(&file)
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if rustix::process::geteuid().is_root() {
            // It refuses to be root.
            command.args(["-u", "nobody"]);
        }
        let process = command.spawn().expect("pgbouncer starts");
        eventually("pgbouncer listens", true, async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
        Some(Pooler { port, _process: process, _folder: folder })
    }

    pub(crate) fn url(&self, lab: &Lab) -> String {
        lab.database.replace(&lab.postgres_port().to_string(), &self.port.to_string())
    }

    fn program(&self, lab: &Lab, arguments: &[&str]) -> Command {
        let mut command = lab.program(arguments);
        command.env("DATABASE_URL", self.url(lab)).env("TIDEGATE__RUN__WORKERS", "3");
        command.env("TIDEGATE__BATCH__MAX_ENTRIES", "200").env("TIDEGATE__BATCH__READ_COUNT", "50");
        command
    }

    /// What another client sees of each connection of the pool: settings, prepared statements, advisory locks.
    async fn seen_by_others(&self, lab: &Lab) -> Vec<String> {
        let options: PgConnectOptions = self.url(lab).parse().expect("a URL");
        let options = options.extra_float_digits(None).disable_statement_logging();
        let mut clients = Vec::new();
        for _ in 0..POOL {
            clients.push(PgConnection::connect_with(&options).await.expect("connected"));
        }
        let mut seen = Vec::new();
        for client in &mut clients {
            // All are open at once, so each has a connection of its own.
            sqlx::raw_sql("begin").execute(&mut *client).await.expect("begun");
            let row: (String,) = sqlx::query_as(
                "select concat_ws(' ', current_setting('statement_timeout'), current_setting('lock_timeout'),
                     current_setting('idle_in_transaction_session_timeout'), current_setting('search_path'),
                     current_setting('synchronous_commit'), current_setting('transaction_isolation'),
                     (select count(*) from pg_prepared_statements where name <> ''),
                     (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()))",
            )
            .persistent(false)
            .fetch_one(&mut *client)
            .await
            .expect("answered");
            seen.push(row.0);
        }
        for client in &mut clients {
            sqlx::raw_sql("rollback").execute(client).await.expect("ended");
        }
        seen
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn through_a_pooler_in_transaction_mode_counts_are_exact_and_nothing_is_left_in_it() {
    // Newer and older configurations: settings at the start are refused, or ignored.
    for setting in ["", "ignore_startup_parameters = extra_float_digits, options"] {
        let lab = Lab::new().await;
        let Some(pooler) = Pooler::start(&lab, setting).await else { return };
        let before = pooler.seen_by_others(&lab).await;
        let mut client = lab.client().await;
        let mut killed = Daemon::start(pooler.program(&lab, &["run"]));
        let mut daemon = Daemon::start(pooler.program(&lab, &["run"]));
        killed.wait_for("running").await;
        daemon.wait_for("running").await;
        for round in 0..4 {
            client.add_many("a", 500).await;
            client.add_many("b", 500).await;
            client.call(&["XADD", STREAM, "*", "id", "a", "amount", "bad"]).await;
            if round == 1 {
                eventually("it is at work", true, async || lab.in_ledger().await > 500).await;
                killed.kill().await;
            }
        }
        lab.await_value("a", 2_000).await;
        lab.await_value("b", 2_000).await;
        lab.assert_settled().await;
        // All of it once more: the careful way, in transactions of several statements.
        client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
        client.add("a", 1).await;
        daemon.wait_for("redelivered entries were recognised").await;
        lab.await_value("a", 2_001).await;
        lab.assert_settled().await;
        assert_eq!((lab.value("b").await, lab.in_ledger().await), (Some(2_000), 4_005));
        assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 4);
        assert_eq!(daemon.count("flushing is interrupted"), 0, "{}", daemon.last_lines());
        assert_eq!(pooler.seen_by_others(&lab).await, before, "{setting}");
        daemon.kill().await;
        let (code, out, err) = output(&mut pooler.program(&lab, &["replay", "--since", "1h", "--yes"])).await;
        assert_eq!(code, 0, "{out}{err}");
        let (code, _, err) = output(&mut pooler.program(&lab, &["run", "--until-empty"])).await;
        assert_eq!(code, 0, "{err}");
        assert_eq!((lab.value("a").await, lab.value("b").await), (Some(2_001), Some(2_000)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_through_a_pooler() {
    let lab = Lab::new().await;
    let Some(pooler) = Pooler::start(&lab, "").await else { return };
    let mut daemon = Daemon::start(pooler.program(&lab, &["run"]));
    daemon.wait_for("running").await;
    let mut locker = lab.sql().await;
    let mut lock = locker.begin().await.expect("begun");
    sqlx::raw_sql("lock table public.counters").execute(&mut *lock).await.expect("locked");
    lab.client().await.add("a", 1).await;
    let line = daemon.wait_for("flushing is interrupted").await;
    assert!(line["fault"].to_string().contains("55P03"), "lock_timeout: {line}");
    lock.rollback().await.expect("ended");
    lab.await_value("a", 1).await;
    lab.execute(
        "create function public.dawdles() returns trigger language plpgsql as
         $$ begin perform pg_sleep(30); return new; end $$;
         create trigger dawdles before insert on public.counters for each row execute function public.dawdles()",
    )
    .await;
    daemon.forget();
    lab.client().await.add("a", 1).await;
    let line = daemon.wait_for("flushing is interrupted").await;
    assert!(line["fault"].to_string().contains("57014"), "statement_timeout: {line}");
    lab.execute("drop trigger dawdles on public.counters").await;
    lab.await_value("a", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_through_a_pooler_are_refused_with_the_way_round() {
    let lab = Lab { database: database(false).await, ..Lab::new().await };
    let Some(pooler) = Pooler::start(&lab, "").await else { return };
    let (code, _, stderr) = output(&mut pooler.program(&lab, &["migrate"])).await;
    assert_ne!(code, 0);
    assert!(stderr.contains("connect to PostgreSQL itself"), "{stderr}");
    assert_eq!(lab.number("select count(*) from pg_namespace where nspname = 'tidegate'").await, 0);
    assert_eq!(output(&mut lab.program(&["migrate"])).await.0, 0);
    let (code, _, stderr) = output(&mut pooler.program(&lab, &["run", "--migrate", "--until-empty"])).await;
    assert_eq!(code, 0, "nothing is missing: {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_that_the_server_closed_costs_no_incident() {
    let lab = Lab::new().await;
    let name = lab.database.rsplit('/').next().expect("a name").to_owned();
    lab.execute(&format!("alter database {name} set idle_session_timeout = '600ms'")).await;
    let mut command = lab.program(&["run"]);
    // What uses the connections at short intervals keeps them from being idle.
    for key in ["TRIM__EVERY", "COMPACT__EVERY"] {
        command.env(format!("TIDEGATE__{key}"), "1h");
    }
    let mut daemon = Daemon::start(command);
    // Whatever else uses the connections, and whenever it last did.
    for value in 1..=10 {
        lab.client().await.add("a", 1).await;
        lab.await_value("a", value).await;
        eventually("the server closed what was idle", 0, async || lab.sessions().await).await;
    }
    assert_eq!(daemon.count("flushing is interrupted"), 0, "{}", daemon.last_lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_out_of_reach_is_told_in_plain_words_with_its_place() {
    let lab = Lab::new().await;
    let port = free_port();
    let mut command = lab.program(&["run"]);
    command.env("DATABASE_URL", format!("postgres://me:hunter2@127.0.0.1:{port}/app"));
    let mut daemon = Daemon::start(command);
    let line = daemon.wait_for("cannot start yet").await;
    assert_eq!(line["fault"], format!("cannot reach PostgreSQL at 127.0.0.1:{port}: connection refused"));
    // Waiting does not give a server TLS.
    let mut command = lab.program(&["run"]);
    command.env("DATABASE_URL", format!("{}?sslmode=require", lab.database));
    let (code, _, stderr) = output(&mut command).await;
    assert_ne!(code, 0);
    assert!(stderr.contains("offers no TLS"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_work_through_a_pooler_and_leave_nothing_in_it() {
    let lab = Lab::new().await;
    let Some(pooler) = Pooler::start(&lab, "").await else { return };
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut client = lab.client().await;
    client.add("a", 5).await;
    client.add("a", 500).await;
    assert_eq!(output(&mut pooler.program(&lab, &["run", "--until-empty"])).await.0, 65);
    lab.execute("alter table public.counters drop constraint small").await;
    let before = pooler.seen_by_others(&lab).await;
    for (arguments, exit) in [
        (&["status"][..], 4),
        (&["doctor"], 0),
        (&["audit", "--full"], 0),
        (&["dead", "redrive", "--all", "--dry-run"], 0),
        (&["dead", "redrive", "--all", "--yes"], 0),
        (&["audit", "--full"], 0),
        (&["pause", "counters", "--for", "1m"], 0),
        (&["resume", "counters"], 0),
        (&["trim", "--dry-run"], 0),
    ] {
        let (code, stdout, stderr) = output(&mut pooler.program(&lab, arguments)).await;
        assert_eq!(code, exit, "{arguments:?}: {stdout}{stderr}");
    }
    assert_eq!(pooler.seen_by_others(&lab).await, before);
    assert_eq!(lab.value("a").await, Some(505));
    let (code, _, stderr) = output(&mut pooler.program(&lab, &["audit", "--full", "--repair", "--yes"])).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("name PostgreSQL itself"), "{stderr}");
}
