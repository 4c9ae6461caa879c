//! Rights: the users and roles of docs/permissions.md, made on a lab's servers by the lines of that document, and programs that run as them.
//!
//! With `TIDEGATE_TEST_RIGHTS` set, [`Lab::program_by_default`](crate::harness::Lab::program_by_default) starts each verb as the user and the role
//! that the document has for it, while the test itself stays the administrator. Streams and counters of the tests are called as in the document; what it says of
//! `public.counters` holds for all tables of the tests, as it asks.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::harness::Client;

const DOCUMENT: &str = include_str!("../../docs/permissions.md");
/// Runs programs with the documented rights and no others.
const LEAST: &str = "TIDEGATE_TEST_RIGHTS";
/// A server that does not answer at once is away, or stopped by the test.
const PATIENCE: Duration = Duration::from_secs(2);
/// So often a statement is tried that meets another one on the same row of a catalog.
const TRIES: usize = 20;

/// Whether programs run with the documented rights and no others.
pub fn are_least() -> bool {
    std::env::var_os(LEAST).is_some_and(|value| !value.is_empty())
}

/// The fenced blocks of this language, in order.
pub fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let blocks = DOCUMENT.split(fence.as_str()).skip(1);
    blocks.map(|rest| rest.split("```").next().unwrap_or_default().trim()).collect()
}

/// The document's statements.
pub struct Sql {
    /// What an administrator does for the migrator, in the database `app`.
    pub migrator: &'static str,
    /// What the worker is granted after each migration.
    pub worker_grants: &'static str,
    /// The worker's role.
    pub worker: &'static str,
    /// The tables that the role `app` makes later, for the worker.
    pub later_tables: &'static str,
    /// What the operator is granted after each migration.
    pub operator_grants: &'static str,
    /// The operator's role.
    pub operator: &'static str,
    /// What the operator needs to redrive.
    pub redrive_grants: &'static str,
    /// What the worker needs for the console.
    pub console_grants: &'static str,
}

impl Sql {
    /// Those of the document.
    pub fn documented() -> Sql {
        let blocks = blocks("sql");
        let [migrator, worker_grants, worker, later_tables, operator_grants, operator, redrive_grants, console_grants] =
            blocks[..]
        else {
            panic!("eight blocks of SQL: {blocks:?}")
        };
        Sql { migrator, worker_grants, worker, later_tables, operator_grants, operator, redrive_grants, console_grants }
    }

    /// The migrator's block for a database of another name.
    pub fn migrator_of(&self, url: &str) -> String {
        self.migrator.replace("database app", &format!("database {}", database_of(url)))
    }
}

fn database_of(url: &str) -> &str {
    url.rsplit('/').next().and_then(|rest| rest.split('?').next()).expect("a database in the url")
}

/// The url of the same server for another user.
pub fn as_user(url: &str, user: &str) -> String {
    url.replace("://", &format!("://{user}:secret@"))
}

/// The url of servers that a test has beside the lab's, for the user that the document has for this verb; as it is, where programs run as the administrator, or
/// the test names a user itself.
pub fn least(url: &str, arguments: &[&str]) -> String {
    let user = of_verb(arguments).0.filter(|_| are_least() && !url.contains('@'));
    user.map_or_else(|| url.to_owned(), |user| as_user(url, user))
}

/// The url of this database for another role.
pub fn as_role(url: &str, role: &str) -> String {
    let (_, place) = url.split_once('@').expect("a user in the url");
    format!("postgres://{role}:secret@{place}")
}

/// The user and the role that the document has for a verb; none where it says that somebody else does that: an administrator, a reader of the
/// manual, or a program with servers of its own.
pub fn of_verb(arguments: &[&str]) -> (Option<&'static str>, Option<&'static str>) {
    let has = |word: &str| arguments.contains(&word);
    match arguments.first().copied().unwrap_or_default() {
        // Whoever migrates at the start has the migrator's rights, too.
        "run" if has("--migrate") => (Some("tidegate"), None),
        "run" | "check" | "adopt" | "warm" | "counter" | "invalidate" => (Some("tidegate"), Some("tidegate_worker")),
        "migrate" => (None, Some("tidegate_migrator")),
        "replay" => (Some("replay_operator"), Some("tidegate_worker")),
        "produce" => (Some("producer"), None),
        "audit" | "group" if has("--repair") || has("repair") => (Some("operator"), Some("tidegate_operator")),
        "status" | "top" | "pending" | "tap" | "wait" | "trim" | "group" | "doctor" | "audit" | "dead" | "pause"
        | "resume"
        // A shell asks what can stand at the cursor.
        | "--" => (Some("observer"), Some("tidegate_operator")),
        _ => (None, None),
    }
}

/// The lines that make the users. The worker may do what any delivery and any mode needs.
fn lines() -> Vec<Vec<String>> {
    blocks("acl").into_iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

/// What a server is started with, so that it knows the users after a restart, too.
pub fn of_new_server() -> Vec<String> {
    let mut users: Vec<Vec<String>> = Vec::new();
    for words in lines() {
        // ACL SETUSER name rules …
        let (name, rules) = (&words[2], &words[3..]);
        match users.iter_mut().find(|user| user[1] == *name) {
            Some(user) => user.extend(rules.iter().cloned()),
            None => users.push([&["--user".to_owned(), name.clone()], rules].concat()),
        }
    }
    users.concat()
}

/// The url of a database for the migrator, who has been made.
pub async fn of_migrator(url: &str) -> String {
    let mut connection = PgConnection::connect(url).await.expect("connected");
    let sql = Sql::documented();
    for statements in [sql.worker, sql.operator, &sql.migrator_of(url)] {
        create(&mut connection, statements).await;
    }
    as_role(url, "tidegate_migrator")
}

/// Makes the users and roles on these servers, as far as they can be reached and have what is granted; waits until that is done.
pub fn make(valkey: u16, database: &str) {
    let database = database.to_owned();
    // Called in the middle of a test: on a thread of its own, the test's runtime does not matter.
    let made = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let _ = tokio::time::timeout(PATIENCE, make_users(valkey)).await;
            let _ = tokio::time::timeout(PATIENCE, make_roles(&database)).await;
        });
    });
    made.join().expect("users and roles were made");
}

async fn make_users(port: u16) -> std::io::Result<()> {
    let mut client = Client::try_connect(port).await?;
    client.try_pipeline(&lines()).await.map(drop)
}

async fn make_roles(url: &str) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    let sql = Sql::documented();
    for statements in [sql.worker, sql.operator, &sql.migrator_of(url)] {
        create(&mut connection, statements).await;
    }
    for statements in [sql.worker_grants, sql.operator_grants, sql.redrive_grants, sql.console_grants] {
        create(&mut connection, statements).await;
    }
    // Tables of the tests are made by the administrator, before a program starts and while it runs.
    create(&mut connection, &sql.later_tables.replace(" for role app", "")).await;
    create(
        &mut connection,
        &sql.later_tables.replace(" for role app", "").replace("tidegate_worker", "tidegate_operator"),
    )
    .await;
    let theirs = "select nspname::text from pg_namespace where nspname not like 'pg\\_%' and nspname not in ('information_schema', 'tidegate')";
    let schemas: Vec<String> = sqlx::query_scalar(theirs).fetch_all(&mut connection).await?;
    for schema in schemas {
        let name = schema.replace('"', "\"\"");
        let grants = format!(
            "grant usage on schema \"{name}\" to tidegate_worker, tidegate_operator;
             grant select, insert, update, delete on all tables in schema \"{name}\" to tidegate_worker, tidegate_operator"
        );
        create(&mut connection, &grants).await;
    }
    Ok(())
}

/// Runs statements one by one, but for what is there already, and what is granted on tables that are not there (yet).
pub async fn create(connection: &mut PgConnection, statements: &str) {
    for statement in statements.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
        for tried in 1.. {
            let done = sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut *connection).await;
            let Err(error) = done else { break };
            let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
            match code.as_str() {
                "42710" | "23505" => break,
                "42P01" | "3F000" if statement.starts_with("grant ") => break,
                // A standby, or a database that the test has made read-only, has what its primary was given.
                "25006" => break,
                "XX000" if tried < TRIES => tokio::time::sleep(Duration::from_millis(5)).await,
                _ => panic!("{statement}: {error}"),
            }
        }
    }
}
