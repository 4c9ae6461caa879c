//! Servers that are there and refuse: busy, loading, full, read-only. Nothing is buried for it, and everything lands when they serve again.

use tidegate::ops::sandbox::Postgres;

use crate::admin::Admin;
use crate::harness::{Client, Daemon, Lab, Resp, eventually, valkey};

/// How often a daemon met a fault with this code.
async fn met(admin: &Admin, code: &str) -> bool {
    admin.scrape().await.sum("tidegate_faults_total", &[("code", code)]).is_some_and(|faults| faults > 0.0)
}

async fn assert_nothing_buried(lab: &Lab) {
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}

/// A daemon that runs, and its admin port.
async fn started(lab: &Lab) -> (Daemon, Admin) {
    let mut daemon = lab.daemon();
    daemon.wait_for("running").await;
    let admin = Admin::of(&mut daemon).await;
    (daemon, admin)
}

/// The server serves again: one more lands, the counter is this then, and the daemon called nobody.
async fn assert_goes_on(lab: &Lab, daemon: &mut Daemon, value: i64) {
    lab.client().await.add("a", 1).await;
    lab.await_value("a", value).await;
    assert_called_nobody(lab, daemon).await;
}

async fn assert_called_nobody(lab: &Lab, daemon: &mut Daemon) {
    lab.assert_settled().await;
    for halted in ["reading is halted", "flushing is halted"] {
        assert_eq!(daemon.count(halted), 0, "{}", daemon.last_lines());
    }
    assert_nothing_buried(lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_is_busy_with_a_script_is_waited_for() {
    let lab = Lab { valkey: valkey(&["--lua-time-limit", "50"]).await, ..Lab::new().await };
    let (mut daemon, admin) = started(&lab).await;
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    let port = lab.valkey.port();
    let script =
        tokio::spawn(async move { Client::connect(port).await.call(&["EVAL", "while true do end", "0"]).await });
    eventually("the daemon is told BUSY", true, async || met(&admin, "BUSY").await).await;
    assert!(matches!(lab.client().await.call(&["PING"]).await, Resp::Error(why) if why.starts_with("BUSY")));
    assert_eq!(lab.client().await.call(&["SCRIPT", "KILL"]).await, Resp::Text(b"OK".to_vec()));
    assert!(matches!(script.await.expect("it ended"), Resp::Error(_)));
    assert_goes_on(&lab, &mut daemon, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_is_loading_its_data_is_waited_for() {
    // Told while it loads, and so slowly that there is a while to be told.
    let slowly = ["--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"];
    let mut lab = Lab { valkey: valkey(&slowly).await, ..Lab::new().await };
    let mut client = lab.client().await;
    for n in 0..3_000 {
        client.call(&["SET", &format!("other:{n}"), "data"]).await;
    }
    let (mut daemon, admin) = started(&lab).await;
    client.add_many("a", 100).await;
    lab.await_value("a", 100).await;
    assert_eq!(client.call(&["SAVE"]).await, Resp::Text(b"OK".to_vec()));
    lab.valkey.kill();
    lab.valkey.restart().await.expect("Valkey comes back");
    eventually("the daemon was told LOADING", true, async || met(&admin, "LOADING").await).await;
    assert_goes_on(&lab, &mut daemon, 101).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_cannot_write_to_its_disk_is_waited_for() {
    let valkey = valkey(&["--save", "1 1", "--dbfilename", "blocked"]).await;
    let lab = Lab { valkey, ..Lab::new().await };
    let blocked = lab.valkey.folder().join("blocked");
    // A file cannot take the place of a folder that holds something.
    let block = || {
        let _ = std::fs::remove_file(&blocked);
        std::fs::create_dir_all(blocked.join("something")).is_ok()
    };
    eventually("no file can be written", true, async || block()).await;
    let (mut daemon, admin) = started(&lab).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    eventually("the daemon is told MISCONF", true, async || met(&admin, "MISCONF").await).await;
    assert!(matches!(client.call(&["SET", "other", "data"]).await, Resp::Error(why) if why.starts_with("MISCONF")));
    std::fs::remove_dir_all(&blocked).expect("removed");
    let is_written = async || matches!(lab.client().await.call(&["SET", "other", "data"]).await, Resp::Text(_));
    eventually("it writes again", true, is_written).await;
    assert_goes_on(&lab, &mut daemon, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_without_a_free_connection_is_waited_for() {
    let lab = Lab::new().await;
    let (mut daemon, admin) = started(&lab).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    // There is room for this client alone.
    client.call(&["CONFIG", "SET", "maxclients", "1"]).await;
    client.call(&["CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal"]).await;
    eventually("the daemon is told MAXCLIENTS", true, async || met(&admin, "MAXCLIENTS").await).await;
    // More often than an error that Tidegate does not know is borne.
    let faults = async || admin.scrape().await.sum("tidegate_faults_total", &[("code", "MAXCLIENTS")]);
    eventually("it is tried again and again", true, async || faults().await.is_some_and(|faults| faults > 8.0)).await;
    client.call(&["CONFIG", "SET", "maxclients", "1000"]).await;
    assert_goes_on(&lab, &mut daemon, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_became_a_replica_is_waited_for_until_there_is_a_primary() {
    let lab = Lab::new().await;
    let (mut daemon, admin) = started(&lab).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    let nobody = crate::harness::free_port().to_string();
    client.call(&["REPLICAOF", "127.0.0.1", &nobody]).await;
    daemon.wait_for("reading is interrupted").await;
    eventually("the daemon is told READONLY", true, async || met(&admin, "READONLY").await).await;
    client.call(&["REPLICAOF", "NO", "ONE"]).await;
    assert_goes_on(&lab, &mut daemon, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_with_too_few_replicas_is_waited_for() {
    let lab = Lab::new().await;
    let (mut daemon, admin) = started(&lab).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    client.call(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    eventually("the daemon is told NOREPLICAS", true, async || met(&admin, "NOREPLICAS").await).await;
    assert!(matches!(client.call(&["SET", "other", "data"]).await, Resp::Error(why) if why.starts_with("NOREPLICAS")));
    client.call(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
    assert_goes_on(&lab, &mut daemon, 2).await;
}

/// A lab whose PostgreSQL is its own.
async fn lab_of_its_own() -> (Lab, Postgres) {
    let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    (Lab::on(&postgres, "own").await, postgres)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_that_is_read_only_is_waited_for() {
    let (lab, _postgres) = lab_of_its_own().await;
    let (mut daemon, admin) = started(&lab).await;
    // As a primary that became a standby: no transaction may write.
    for statement in ["alter system set default_transaction_read_only = on", "select pg_reload_conf()"] {
        lab.execute(statement).await;
    }
    eventually("it takes effect", 1, async || {
        lab.number("select (current_setting('transaction_read_only') = 'on')::int::bigint").await
    })
    .await;
    lab.client().await.add("a", 1).await;
    eventually("the daemon is told 25006", true, async || met(&admin, "25006").await).await;
    daemon.wait_for("flushing is interrupted").await;
    for statement in ["alter system reset default_transaction_read_only", "select pg_reload_conf()"] {
        lab.execute(statement).await;
    }
    lab.await_value("a", 1).await;
    assert_called_nobody(&lab, &mut daemon).await;
}

/// PostgreSQL says so by a trigger: no disk of the test's is filled.
#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_whose_disk_is_full_halts_buries_nothing_and_goes_on_by_itself() {
    let lab = Lab::new().await;
    lab.execute(
        "create function public.disk_full() returns trigger language plpgsql as
             $$ begin raise exception 'could not extend file: No space left on device' using errcode = 'disk_full'; end $$;
         create trigger disk_full before insert or update on public.counters for each row execute function public.disk_full()",
    )
    .await;
    let mut daemon = lab.daemon();
    let mut client = lab.client().await;
    client.add_many("a", 500).await;
    let halted = daemon.wait_for("flushing is halted").await;
    assert!(halted.to_string().contains("PostgreSQL's disk is full: free some space"), "{halted}");
    client.add_many("a", 500).await;
    lab.execute("drop trigger disk_full on public.counters").await;
    lab.await_value("a", 1_000).await;
    lab.assert_settled().await;
    assert_nothing_buried(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_timeout_that_is_too_short_for_a_batch_makes_smaller_ones() {
    let lab = Lab::new().await;
    if lab.number("select count(*) from pg_settings where name = 'transaction_timeout'").await == 0 {
        return eprintln!("skipped: this PostgreSQL has no transaction_timeout");
    }
    lab.execute(
        "create function public.slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.01); return new; end $$;
         create trigger slow before insert on public.counters for each row execute function public.slow()",
    )
    .await;
    let mut client = lab.client().await;
    for n in 0..60 {
        client.add(&format!("k{n}"), 1).await;
    }
    let database = lab.database.rsplit('/').next().expect("a name");
    lab.execute(&format!("alter database {database} set transaction_timeout = '200ms'")).await;
    let (mut daemon, admin) = started(&lab).await;
    // It holds for the test's own sessions, too.
    let unlimited = format!("{}?options=-c%20transaction_timeout%3D0", lab.database);
    let looking = Lab { valkey: valkey(&[]).await, database: unlimited };
    let landed = async || looking.number("select count(*) from public.counters").await;
    eventually("landed", 60, landed).await;
    assert!(met(&admin, "25P04").await);
    assert_called_nobody(&lab, &mut daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_without_a_free_connection_is_waited_for() {
    let (lab, _postgres) = lab_of_its_own().await;
    lab.execute("create role worker login; grant all on all tables in schema tidegate, public to worker; grant usage on schema tidegate to worker").await;
    lab.execute("alter role worker connection limit 0").await;
    let mut command = lab.program(&["run"]);
    command.env("DATABASE_URL", lab.database.replace("postgres@", "worker@"));
    let mut daemon = Daemon::start(command);
    lab.client().await.add("a", 1).await;
    let line = daemon.wait_for("cannot start yet").await.to_string();
    assert!(line.contains("53300") && line.contains("lower postgres.connections"), "{line}");
    lab.execute("alter role worker connection limit -1").await;
    lab.await_value("a", 1).await;
    lab.assert_settled().await;
}
