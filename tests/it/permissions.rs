//! The lines of docs/permissions.md, executed: each program runs as the user that they create, and needs no other right.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::harness::{Daemon, Lab, Resp, STREAM, database, eventually, output};

const DOCUMENT: &str = include_str!("../../docs/permissions.md");

/// The fenced blocks of this language, in order.
pub(crate) fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let blocks = DOCUMENT.split(fence.as_str()).skip(1);
    blocks.map(|rest| rest.split("```").next().unwrap_or_default().trim()).collect()
}

/// Creates the users of Valkey; the worker with the rights that this delivery needs.
async fn create_users(lab: &Lab, delivery: &str) {
    let of_delivery = |line: &&str| delivery == "exclusive" || !line.contains("tidegate:lease");
    for line in blocks("acl").into_iter().filter(of_delivery).filter(|line| !line.contains("+cluster|")) {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(lab.client().await.call(&words).await, Resp::Text(b"OK".to_vec()), "{line}");
    }
}

/// The url of the same server for another user.
pub(crate) fn as_user(url: &str, user: &str) -> String {
    url.replace("://", &format!("://{user}:secret@"))
}

/// The url of this database for another role.
fn as_role(url: &str, role: &str) -> String {
    let (_, place) = url.split_once('@').expect("a user in the url");
    format!("postgres://{role}:secret@{place}")
}

async fn execute(url: &str, sql: &str) {
    let mut connection = PgConnection::connect(url).await.expect("connected");
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.expect(sql);
}

/// Runs a block, but for the roles that another test of this server has created.
async fn create_role(url: &str, sql: &str) {
    let mut connection = PgConnection::connect(url).await.expect("connected");
    for statement in sql.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
        let done = sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await;
        let exists =
            matches!(&done, Err(sqlx::Error::Database(e)) if matches!(e.code().as_deref(), Some("42710" | "23505")));
        assert!(exists || done.is_ok(), "{statement}: {done:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_program_runs_with_the_documented_rights_and_no_other() {
    run_with_the_documented_rights("group").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_alone_runs_with_the_documented_rights_and_no_other() {
    run_with_the_documented_rights("exclusive").await;
}

async fn run_with_the_documented_rights(delivery: &str) {
    let lab = Lab { database: database(false).await, ..Lab::new().await };
    create_users(&lab, delivery).await;
    let sql = blocks("sql");
    let [migrator, grants, worker, operator_grants, operator, redrive_grants] = sql[..] else {
        panic!("six blocks of SQL: {sql:?}")
    };
    let name = lab.database.rsplit('/').next().and_then(|rest| rest.split('?').next()).expect("a name");
    create_role(&lab.database, worker).await;
    create_role(&lab.database, operator).await;
    create_role(&lab.database, &migrator.replace("database app", &format!("database {name}"))).await;

    let mut migrate = lab.program(&["migrate"]);
    migrate.env("DATABASE_URL", as_role(&lab.database, "tidegate_migrator"));
    let (code, _, stderr) = output(&mut migrate).await;
    assert_eq!(code, 0, "{stderr}");
    for grants in [grants, operator_grants, redrive_grants] {
        execute(&as_role(&lab.database, "tidegate_migrator"), grants).await;
    }

    let program = |arguments: &[&str], user: &str| {
        let mut command = lab.program(arguments);
        command.env("VALKEY_URL", as_user(&lab.valkey.url(), user));
        command.env("DATABASE_URL", as_role(&lab.database, "tidegate_worker"));
        command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", delivery);
        command
    };
    let mut run = program(&["run"], "tidegate");
    // Everything that a worker ever does, as soon as it may.
    run.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__COMPACT__MARGIN", "1s");
    let mut daemon = Daemon::start(run);
    let lines = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(lines.path(), "b 5\n").expect("written");
    let mut produce = program(&["produce", lines.path().to_str().expect("text")], "producer");
    let (code, _, stderr) = output(&mut produce).await;
    assert_eq!(code, 0, "{stderr}");
    let mut plain = lab.client().await;
    plain.call(&["AUTH", "plain_producer", "secret"]).await;
    for command in [
        &["MULTI"][..],
        &["INCRBY", "counter:b", "1"],
        &["XADD", STREAM, "*", "id", "a", "amount", "1"],
        &["XADD", STREAM, "*", "id", "a", "amount", "bad"],
    ] {
        plain.call(command).await;
    }
    assert!(matches!(plain.call(&["EXEC"]).await, Resp::Array(_)));
    lab.await_value("a", 1).await;
    lab.await_value("b", 5).await;
    // A peer that died with an entry in its hands, and a consumer that left nothing behind.
    let mut client = lab.client().await;
    for consumer in ["dead", "empty"] {
        let group = crate::harness::GROUP;
        client.call(&["XREADGROUP", "GROUP", group, consumer, "STREAMS", STREAM, ">"]).await;
    }
    let length = async || lab.client().await.call(&["XLEN", STREAM]).await.int();
    eventually("entries left by trimming", Some(1), length).await;
    let (code, stdout, stderr) = output(&mut program(&["replay", "--since", "1h", "--yes"], "replay_operator")).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    client.add("a", 1).await;
    lab.await_value("a", 2).await;
    operate(&lab).await;
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    let refused = |line: &str| line.contains("NOPERM") || line.contains("permission denied");
    let lines = daemon.all_lines();
    assert!(!lines.iter().any(|line| refused(line)), "{lines:?}");
}

/// Everything that somebody looks at, and repairs, as the documented users.
async fn operate(lab: &Lab) {
    lab.client().await.call(&["XGROUP", "CREATE", STREAM, "foreign", "0"]).await;
    lab.client().await.call(&["INCRBY", "counter:a", "1"]).await;
    for (user, arguments, exits) in [
        ("observer", &["status"][..], &[0, 4][..]),
        ("observer", &["pending", "--entries"], &[0]),
        ("observer", &["tap", "--after", "0-0", "--limit", "1"], &[0]),
        ("observer", &["wait"], &[0]),
        ("observer", &["trim", "--dry-run"], &[0]),
        ("observer", &["group", "list"], &[0]),
        ("observer", &["doctor"], &[0, 4]),
        ("observer", &["audit", "--full"], &[3]),
        ("observer", &["dead", "list"], &[0]),
        ("observer", &["pause", "counters", "--for", "1m"], &[0]),
        ("observer", &["resume", "counters"], &[0]),
        ("operator", &["audit", "--key", "b", "--repair", "--yes"], &[0]),
        ("operator", &["group", "repair", "--group", "foreign", "--yes"], &[0]),
        ("observer", &["dead", "redrive", "--all", "--yes"], &[0, 65]),
        ("observer", &["dead", "discard", "--all", "--yes"], &[0]),
    ] {
        let mut command = lab.program(arguments);
        command.env("VALKEY_URL", as_user(&lab.valkey.url(), user));
        command.env("DATABASE_URL", as_role(&lab.database, "tidegate_operator"));
        let (code, stdout, stderr) = output(&mut command).await;
        assert!(exits.contains(&code), "{arguments:?} ended with {code}: {stdout}{stderr}");
        for refused in ["NOPERM", "permission denied", "may not be read"] {
            assert!(!format!("{stdout}{stderr}").contains(refused), "{arguments:?}: {stdout}{stderr}");
        }
    }
}
