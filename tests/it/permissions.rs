//! The lines of docs/permissions.md, executed: each program runs as the user that they create, and needs no other right.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use tidegate::client::{Cache, CacheOptions, Count, CounterOptions, Counters, NearCache, NearOptions, Taken, postgres};
use tidegate::config::{Needs, Sources};
use tidegate::model::pipeline::{Mode, Pipeline};
use tidegate::valkey::Endpoint;

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, Resp, STREAM, database, eventually, output};
use crate::rights::{Sql, as_role, as_user, blocks, create};

/// Creates the users of Valkey; the worker with the rights that this delivery needs.
async fn create_users(lab: &Lab, delivery: &str) {
    let is_needed = |line: &&str| {
        let is_of_managed = line.contains("tidegate:dirty") && !line.contains("resetkeys");
        (delivery == "exclusive" || !line.contains("tidegate:lease"))
            && (delivery == "managed" || !is_of_managed)
            && (delivery == "console" || !line.contains("SETUSER tidegate ~counter:* +memory|usage"))
            && (delivery == "managed" || !line.contains("SETUSER tidegate +scan"))
            && !line.contains("SETUSER tidegate +get +set +rpush")
            && !line.contains("+cluster|")
    };
    for line in blocks("acl").into_iter().filter(is_needed) {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(lab.client().await.call(&words).await, Resp::Text(b"OK".to_vec()), "{line}");
    }
}

async fn execute(url: &str, sql: &str) {
    let mut connection = PgConnection::connect(url).await.expect("connected");
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.expect(sql);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_program_runs_with_the_documented_rights_and_no_other() {
    run_with_the_documented_rights("group").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_alone_runs_with_the_documented_rights_and_no_other() {
    run_with_the_documented_rights("exclusive").await;
}

/// A lab with the documented users and roles, and a database that the migrator has migrated.
async fn lab_with_rights(delivery: &str) -> Lab {
    let lab = Lab { database: database(false).await, ..Lab::new().await };
    create_users(&lab, delivery).await;
    let sql = Sql::documented();
    let mut administrator = lab.sql().await;
    for statements in [sql.worker, sql.operator, &sql.migrator_of(&lab.database)] {
        create(&mut administrator, statements).await;
    }
    let mut migrate = lab.program(&["migrate"]);
    migrate.env("DATABASE_URL", as_role(&lab.database, "tidegate_migrator"));
    let (code, _, stderr) = output(&mut migrate).await;
    assert_eq!(code, 0, "{stderr}");
    let of_console = (delivery == "console").then_some(sql.console_grants);
    for grants in [sql.worker_grants, sql.operator_grants, sql.redrive_grants].into_iter().chain(of_console) {
        execute(&as_role(&lab.database, "tidegate_migrator"), grants).await;
    }
    lab
}

async fn run_with_the_documented_rights(delivery: &str) {
    let lab = lab_with_rights(delivery).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_made_later_is_written_with_the_documented_rights() {
    let lab = lab_with_rights("group").await;
    let mut application = lab.sql().await;
    create(&mut application, &Sql::documented().later_tables.replace("role app", "role current_role")).await;
    lab.execute(
        "create table public.visits (id text primary key, value bigint not null, updated_at timestamptz);
         insert into public.visits (id, value) values ('a', 5)",
    )
    .await;
    for delta in [1, -6] {
        lab.client().await.add("a", delta).await;
        let mut command = lab.program(&["run", "--until-empty"]);
        command.env("VALKEY_URL", as_user(&lab.valkey.url(), "tidegate"));
        command.env("DATABASE_URL", as_role(&lab.database, "tidegate_worker"));
        command.env("TIDEGATE__PIPELINES__COUNTERS__TABLE", "public.visits");
        command.env("TIDEGATE__PIPELINES__COUNTERS__WRITE", "delete_zero");
        let (code, _, stderr) = output(&mut command).await;
        assert_eq!(code, 0, "{stderr}");
    }
    assert_eq!(lab.number("select count(*) from public.visits").await, 0, "a row in which nothing is left is deleted");
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
        ("observer", &["doctor"], &[0]),
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

#[tokio::test(flavor = "multi_thread")]
async fn a_workers_role_that_lacks_a_right_is_found() {
    let lab = lab_with_rights("lacking").await;
    let diagnose = async || {
        let mut command = lab.program(&["doctor", "--all"]);
        command.env("DATABASE_URL", as_role(&lab.database, "tidegate_worker"));
        output(&mut command).await
    };
    let (code, stdout, stderr) = diagnose().await;
    assert!(code == 0 && !stdout.contains("cannot run a worker"), "{code}: {stdout}{stderr}");
    lab.execute("revoke update on tidegate.ledger from tidegate_worker").await;
    let (code, stdout, stderr) = diagnose().await;
    assert!(code == 4 && stdout.contains("it lacks update on tidegate.ledger"), "{code}: {stdout}{stderr}");
    lab.execute("grant update on tidegate.ledger to tidegate_worker").await;
    lab.execute("revoke update on public.counters from tidegate_worker").await;
    let (code, stdout, stderr) = diagnose().await;
    assert!(code == 4 && stdout.contains("lacks the right to update (value, updated_at)"), "{code}: {stdout}{stderr}");
    // A role that only looks is no worker's, and is right to lack it.
    lab.execute("revoke insert on tidegate.lanes from tidegate_worker").await;
    let (code, stdout, stderr) = diagnose().await;
    assert!(
        code == 0 && stdout.contains("nothing, if it is not the daemon's role; else grant update"),
        "{code}: {stdout}{stderr}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_works_with_the_documented_rights_and_no_other() {
    let lab = lab_with_rights("console").await;
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", as_user(&lab.valkey.url(), "tidegate"));
    command.env("DATABASE_URL", as_role(&lab.database, "tidegate_worker"));
    command.env("TIDEGATE__ADMIN__CONSOLE", "open").env("TIDEGATE__ADMIN__TOKEN", "0123456789abcdef");
    let mut daemon = Daemon::start(command);
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("running", |_| true).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    client.call(&["XADD", STREAM, "*", "id", "a", "amount", "bad"]).await;
    lab.await_value("a", 1).await;
    let letters = "select count(*) from tidegate.dead_letters";
    eventually("a letter", 1, async || lab.number(letters).await).await;
    let headers = [("Authorization", "Bearer 0123456789abcdef"), ("Content-Type", "application/json")];
    for (method, path, body, status) in [
        ("GET", "/api/status", "", 200),
        ("GET", "/api/consumers", "", 200),
        ("GET", "/api/dead", "", 200),
        ("POST", "/api/audit", r#"{"pipeline": "counters"}"#, 200),
        ("POST", "/api/pause", r#"{"pipeline": "counters"}"#, 200),
        ("POST", "/api/pause", r#"{"pipeline": "counters", "duration": "1h"}"#, 200),
        ("POST", "/api/resume", r#"{"pipeline": "counters"}"#, 200),
        ("POST", "/api/dead/redrive", r#"{"all": true}"#, 200),
        ("POST", "/api/dead/discard", r#"{"all": true}"#, 200),
        ("POST", "/api/dead/reopen", r#"{"all": true}"#, 200),
    ] {
        let answer = admin.request(method, path, &headers, body).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
        assert!(
            !answer.body.contains("may not be read") && !answer.body.contains("\"memory_bytes\":null"),
            "{path}: {}",
            answer.body
        );
    }
    let streams = admin.request("GET", "/api/streams", &[], "").await.json();
    assert!(streams["rows"][0]["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{streams}");
    let lines = daemon.all_lines();
    assert!(!lines.iter().any(|line| line.contains("NOPERM") || line.contains("permission denied")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn managed_counters_and_cached_rows_work_with_the_documented_rights_and_no_other() {
    let lab = Lab::new().await;
    create_users(&lab, "managed").await;
    let program = |arguments: &[&str], user: &str| {
        let mut command = lab.program(arguments);
        command.env("VALKEY_URL", as_user(&lab.valkey.url(), user));
        command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed").env("TIDEGATE__CACHE__TOUCHED_EVERY", "20ms");
        command
    };
    let mut daemon = Daemon::start(program(&["run"], "tidegate"));
    let limit = std::time::Duration::from_secs(5);
    let address = |user: &str| Endpoint::new(as_user(&lab.valkey.url(), user).into(), limit, limit);
    let pipeline = Pipeline { mode: Mode::Managed, ..Pipeline::counters() };
    let env = [("DATABASE_URL".to_owned(), lab.database.clone())].into();
    let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES).expect("valid");
    let truth = postgres::Database::new(loaded.config.postgres.address().expect("set"), "main", &pipeline, 2);
    let options = CounterOptions { patience: limit, ..CounterOptions::default() };
    let counters = Counters::connect(&address("counting"), &pipeline, truth, options).await.expect("connected");
    eventually("a", Count::Exact(0), async || counters.get("a").await).await;
    assert_eq!(counters.incr("a", 3).await, Ok(Count::Exact(3)));
    counters.settled("a", limit).await.expect("settled");
    lab.client().await.call(&["DEL", "counter:a"]).await;
    counters.add("a", 1).await.expect("accepted");
    assert_eq!(counters.take("a", 1, 0).await, Ok(Taken::Yes(Some(3))));
    assert!(counters.add_many(&[("a", 1), ("b", 1)]).await.iter().all(Result::is_ok));
    // A stranger's entry, and all values in doubt.
    lab.client().await.add("a", 1).await;
    eventually("a", Count::Exact(5), async || counters.get("a").await).await;
    let (code, stdout, stderr) = output(&mut program(&["replay", "--since", "1h", "--yes"], "replay_operator")).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    daemon.wait_for_event("values_dropped", |event| event["why"] == "replay").await;
    eventually("a", Count::Exact(5), async || counters.get("a").await).await;
    let admin = Admin::of(&mut daemon).await;
    eventually("what cannot be evicted is told", true, async || {
        admin.scrape().await.text.contains("tidegate_valkey_memory_pinned_bytes{")
    })
    .await;

    let cache: Cache<String> = Cache::new(&address("caching"), "users", CacheOptions::default());
    let near = NearCache::new(&address("caching"), cache.clone(), NearOptions::default());
    eventually("it listens", true, async || near.is_listening()).await;
    cache.write("7", async || Ok(((), Some(Some("Ada".to_owned()))))).await.expect("written");
    let row = near.get("7", async || Err("it is in the cache".into())).await.expect("there");
    assert_eq!(row.as_deref().map(String::as_str), Some("Ada"));
    lab.execute(
        "create table public.users (id integer primary key, name text);
         create trigger touched after insert or update or delete on public.users
             for each row execute function tidegate.touched('users', 'id');
         insert into public.users values (7, 'Grace')",
    )
    .await;
    let name = async || {
        let load = async || Ok(Some("Grace".to_owned()));
        cache.get("7", load).await.ok().flatten().map(|row| row.to_string())
    };
    eventually("what psql wrote", Some("Grace".to_owned()), name).await;
    lab.execute("update public.users set id = 8 where id = 7; delete from public.users").await;
    eventually("touched rows", 0, async || lab.number("select count(*) from tidegate.touched_rows").await).await;
    let lines = daemon.all_lines();
    assert!(!lines.iter().any(|line| line.contains("NOPERM") || line.contains("permission denied")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_warms_without_the_rights_is_told_which_server_refuses_and_what_to_grant() {
    let lab = Lab::new().await;
    create_users(&lab, "managed").await;
    // What a daemon of this pipeline may do, and a role that may read the ledger and not the table.
    let reader = "create role reads_no_counters login";
    create(&mut lab.sql().await, reader).await;
    lab.execute(
        "grant usage on schema tidegate to reads_no_counters;
         grant select on tidegate.lanes, tidegate.ledger to reads_no_counters;
         insert into public.counters values ('a', 3, now())",
    )
    .await;
    let program = |arguments: &[&str], user: Option<&str>, role: Option<&str>| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed");
        command.env("VALKEY_URL", user.map_or_else(|| lab.valkey.url(), |user| as_user(&lab.valkey.url(), user)));
        command.env("DATABASE_URL", role.map_or_else(|| lab.database.clone(), |role| as_role(&lab.database, role)));
        command
    };
    let _daemon = Daemon::start(program(&["run"], None, None));
    crate::managed::is_managed(&lab).await;
    let ids = tempfile::NamedTempFile::new().expect("a file");
    let many: String = (0..450).map(|n| format!("id-{n}\n")).collect();
    std::fs::write(ids.path(), many).expect("written");
    let ids = ids.path().to_str().expect("text");
    let (of_postgresql, of_valkey) = ("grant it (docs/permissions.md", "the Valkey user lacks a permission");
    let no_table = Some("reads_no_counters");
    for (arguments, user, role, words) in [
        (&["warm", "--ids", ids][..], None, no_table, ["permission denied for table counters (42501)", of_postgresql]),
        (&["warm", "--top", "5"], None, no_table, ["permission denied for table counters (42501)", of_postgresql]),
        (&["counter", "show", "a"], None, no_table, ["permission denied for table counters (42501)", of_postgresql]),
        // Who looks may call no function; the worker may not do what a function does to bring a value.
        (&["warm", "--ids", ids], Some("observer"), None, ["NOPERM", of_valkey]),
        (&["warm", "--ids", ids], Some("tidegate"), None, ["ACL failure in script", of_valkey]),
    ] {
        let (code, stdout, stderr) = output(&mut program(arguments, user, role)).await;
        assert_eq!(code, 77, "{arguments:?} {user:?}: {stdout}{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{arguments:?} {user:?}: {stderr}");
        }
        assert!(!stderr.contains("does not answer") && !stderr.contains("catch up"), "{stderr}");
    }
    // With the rights all are there, and a server that is away is no lack of rights.
    let nobody = crate::harness::free_port();
    let mut away = program(&["warm", "--ids", ids], None, None);
    away.env("DATABASE_URL", format!("postgres://a@127.0.0.1:{nobody}/b"));
    let (code, _, stderr) = output(&mut away).await;
    assert!(code == 75 && stderr.contains("cannot reach PostgreSQL at 127.0.0.1"), "{code} {stderr}");
    let (code, stdout, stderr) = output(&mut program(&["warm", "--ids", ids], None, None)).await;
    assert_eq!((code, &*stdout), (0, "450 of 450 counters are in place\n"), "{stderr}");
}
