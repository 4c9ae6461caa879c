//! The documents, executed: a reader types each page's commands in their order, on real servers, and compares what they print with what the page shows.
//!
//! [`page`](crate::page) says how a page is read. Here is what is not typed, with the reason, and for each page what its reader finds at first.

use std::collections::BTreeSet;

use sqlx::{Connection, PgConnection};
use tidegate::model::pipeline::Identifier;
use tidegate::ops::sandbox::{Postgres, Valkey, postgres_programs};
use tidegate_lab::cluster::Cluster;
use tidegate_lab::sentinel::{SERVICE, Sentinel};

use crate::documents::{ROOT, documented, texts};
use crate::harness::{Lab, database, free_port};
use crate::page::shown;
use crate::reader::Reader;

/// Commands that are not typed: what they begin with, why, and what tries them instead.
const NOT_TYPED: &[(&str, &str)] = &[
    ("make ", "builds, measures or tests for minutes; that the Makefile has the word is compared"),
    ("docker ", "needs containers: `make compose-test`"),
    ("kubectl ", "needs a cluster of Kubernetes: `make kubernetes-test`"),
    ("helm ", "needs a cluster of Kubernetes: `make chart-test`, `make kubernetes-test`"),
    ("sudo ", "changes the machine; the package and its unit are tried in a folder: `make systemd-test`"),
    ("systemctl ", "needs a systemd: `make systemd-test`"),
    ("journalctl ", "needs a systemd: `make systemd-test`"),
    ("tidegate top", "needs a terminal: tests/it/top.rs"),
    ("tidegate bench", "measures for minutes: tests/it/measuring.rs runs a short one"),
    ("sha256sum ", "needs a release that was published: `make dist-test` checks the sums"),
    ("gh ", "needs a release that was published"),
    (
        "source <(tidegate completions ",
        "changes the shell that somebody types at: tests/it/completing.rs has a bash of its own",
    ),
    ("tidegate completions fish ", "changes the shell that somebody types at"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT=", "needs a collector: tests/it/otlp.rs, `make telemetry-test`"),
];

/// Which test types a page's commands.
const TYPED: &[(&str, &str)] = &[
    ("README.md", "pages"),
    ("docs/tutorial.md", "pages"),
    ("docs/cluster.md", "pages"),
    ("docs/configuration.md", "pages"),
    ("docs/deploy.md", "pages"),
    ("docs/doctor.md", "pages"),
    ("docs/functions.md", "functions"),
    ("docs/migrating.md", "pages"),
    ("docs/outage.md", "walkthrough"),
    ("docs/pipelines.md", "pages"),
    ("docs/producing.md", "pages"),
    ("docs/reading.md", "pages"),
    ("docs/redis.md", "pages"),
    ("docs/rename.md", "pages"),
    ("docs/restore-postgresql.md", "pages"),
    ("docs/restore-valkey.md", "pages"),
    ("docs/rotate.md", "pages"),
    ("docs/scaling.md", "pages"),
];

fn is_not_typed(command: &str) -> bool {
    NOT_TYPED.iter().any(|(begin, _)| command.starts_with(begin))
}

fn read(page: &str) -> String {
    std::fs::read_to_string(format!("{ROOT}/{page}")).unwrap_or_else(|error| panic!("{page}: {error}"))
}

/// Nothing befalls the servers of most pages.
async fn no_fault(_: &mut Lab, what: &str) {
    panic!("nobody knows how to make this fault: {what}");
}

/// Follows a page on these servers.
async fn follow(reader: &mut Reader, page: &str) {
    follow_through(reader, page, no_fault).await;
}

/// The same, where `fault` does to the servers what the page says.
async fn follow_through(reader: &mut Reader, page: &str, fault: impl AsyncFnMut(&mut Lab, &str)) {
    let followed = reader.follow(&read(page), is_not_typed, fault).await;
    followed.unwrap_or_else(|why| panic!("{page}, {why}"));
}

/// A Valkey and an empty database, and nothing else.
async fn new_lab() -> Lab {
    Lab { valkey: Valkey::start(&[]).await.expect("Valkey starts"), database: database(false).await }
}

/// A reader who begins at the beginning.
async fn newcomer() -> Reader {
    Reader::of(new_lab().await).await
}

/// A reader in the middle of a page: the shell knows the urls.
async fn user(lab: Lab) -> Reader {
    let like = lab.program_by_default(&[]);
    Reader::told(lab, &like).await
}

/// The same, whose database is migrated.
async fn experienced() -> Reader {
    user(Lab::new().await).await
}

/// A reader with a PostgreSQL of his own, whose database and user are those of the pages.
async fn owner() -> (Reader, Postgres) {
    let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    postgres.create_database(&Identifier::parse("app").expect("a name"), None).await.expect("created");
    let mut connection = PgConnection::connect(&postgres.url("app")).await.expect("connected");
    let role = "create role \"user\" superuser login password 'password'";
    sqlx::raw_sql(role).execute(&mut connection).await.expect(role);
    let place = format!("127.0.0.1:{}", postgres.port());
    let database = format!("postgres://user:password@{place}/app");
    let lab = Lab { valkey: Valkey::start(&[]).await.expect("Valkey starts"), database };
    let mut reader = user(lab).await;
    reader.instead_of("localhost:5432", &place);
    (reader, postgres)
}

/// Whether this client of PostgreSQL is there; where it is not that is said.
fn has(client: &str) -> bool {
    let beside = postgres_programs().is_ok_and(|folder| folder.join(client).is_file());
    let path = std::env::var_os("PATH").unwrap_or_default();
    // What dumps must not be older than the server.
    let is_there =
        beside || client == "psql" && std::env::split_paths(&path).any(|folder| folder.join(client).is_file());
    if !is_there {
        eprintln!("skipped: no {client} beside this PostgreSQL");
    }
    is_there
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tutorial_does_what_it_says() {
    if has("psql") {
        follow(&mut newcomer().await, "docs/tutorial.md").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_five_minutes_of_the_readme_do_what_they_say() {
    follow(&mut newcomer().await, "README.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_is_checked_as_the_page_says() {
    follow(&mut newcomer().await, "docs/configuration.md").await;
    follow(&mut experienced().await, "docs/doctor.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelines_are_made_tested_and_changed_as_the_page_says() {
    if has("psql") {
        follow(&mut experienced().await, "docs/pipelines.md").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_produced_as_the_page_says() {
    follow(&mut experienced().await, "docs/producing.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_invalidated_as_the_page_says() {
    follow(&mut experienced().await, "docs/reading.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_are_told_as_the_page_says() {
    follow(&mut newcomer().await, "docs/scaling.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deployed_without_containers_runs_as_the_page_says() {
    let mut reader = newcomer().await;
    let database = reader.lab.database.replace("postgres://", "");
    reader.instead_of("migrator:password@localhost:5432/app", &database);
    follow(&mut reader, "docs/deploy.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_written_loop_is_replaced_as_the_page_says() {
    if has("psql") {
        follow(&mut user(new_lab().await).await, "docs/migrating.md").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_and_sentinels_are_used_as_the_page_says() {
    let cluster = Cluster::start(3, 0, &[]).await;
    let primary = Valkey::start(&[]).await.expect("Valkey starts");
    let create = ["ACL", "SETUSER", "user", "on", ">password", "~*", "&*", "+@all"];
    for port in cluster.ports().into_iter().chain([primary.port()]) {
        crate::harness::Client::connect(port).await.call(&create).await;
    }
    let mut sentinels = Vec::new();
    for _ in 0..3 {
        sentinels.push(Sentinel::watching(primary.port(), free_port(), 2, &[]).await);
    }
    let mut reader = experienced().await;
    let named = |ports: Vec<u16>| ports.iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>().join(",");
    reader.instead_of("node1:6379,node2:6379,node3:6379", &named(cluster.ports()));
    reader.instead_of(
        "sentinel1:26379,sentinel2:26379,sentinel3:26379",
        &named(sentinels.iter().map(|sentinel| sentinel.port).collect()),
    );
    reader.instead_of("sentinelServiceName=primary", &format!("sentinelServiceName={SERVICE}"));
    follow(&mut reader, "docs/cluster.md").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_is_restored_from_a_backup_as_the_page_says() {
    if has("pg_dump") && has("psql") {
        let (mut reader, _postgres) = owner().await;
        follow(&mut reader, "docs/restore-postgresql.md").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_lost_its_data_is_set_right_as_the_page_says() {
    let page = "docs/restore-valkey.md";
    let mut reader = experienced().await;
    let make = async |lab: &mut Lab, what: &str| {
        let copy = lab.valkey.folder().join("dump.rdb");
        match what {
            "valkey comes back with the copy" => assert!(copy.is_file(), "a copy was made"),
            "valkey comes back empty" => std::fs::remove_file(copy).expect("removed"),
            other => panic!("{page}: {other}"),
        }
        lab.valkey.kill();
        lab.valkey.restart().await.expect("Valkey comes back");
    };
    follow_through(&mut reader, page, make).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_is_renamed_as_the_page_says() {
    if has("psql") {
        follow(&mut experienced().await, "docs/rename.md").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_rotated_as_the_page_says() {
    if has("psql") {
        let (mut reader, _postgres) = owner().await;
        follow(&mut reader, "docs/rotate.md").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_redis_the_main_job_runs_as_the_page_says() {
    follow(&mut newcomer().await, "docs/redis.md").await;
}

/// The control: what is wrong in a page is noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_or_an_answer_that_is_wrong_in_a_page_is_noticed() {
    let page = "```sh\nexport VALKEY_URL=valkey://localhost:6379\nexport DATABASE_URL=postgres://user:password@localhost:5432/app\ntidegate migrate\n\
                tidegate run\n```\n<!-- given: echo 'a 2' | tidegate produce -->\n```console\n$ tidegate wait --timeout 9s\neverything is durable, after …\n\
                $ tidegate replay --since 99999999999999-0     # exit 65\n$ tidegate audit --full\ncounters: 1 counter judged (full), none differs\n```\n";
    let typed = async |page: &str| {
        let mut reader = newcomer().await;
        reader.follow(page, is_not_typed, no_fault).await
    };
    assert_eq!(typed(page).await, Ok(()));
    for (right, wrong) in [
        ("tidegate migrate\n", "tidegate migrat\n"),
        ("tidegate migrate\n", "tidegate migrate --dry-run\n"),
        ("audit --full", "audit --fully"),
        ("localhost:6379", "localhost:1"),
        ("1 counter judged", "2 counters judged"),
        ("# exit 65", "# exit 3"),
        ("# exit 65", ""),
        ("echo 'a 2'", "echo 'a two'"),
        ("everything is durable, after …", "everything is durable, after …\neverything is durable, after …"),
    ] {
        assert!(page.contains(right), "{right}");
        let wrong = page.replace(right, wrong);
        // A daemon that cannot run is not waited for to the end of all patience.
        let runs = !wrong.contains("localhost:1\n") && !wrong.contains("--dry-run");
        let wrong = if runs { wrong } else { wrong.replace("tidegate run\n", "") };
        assert!(typed(&wrong).await.is_err(), "nobody noticed: {wrong}");
    }
}

#[test]
fn every_command_in_the_documents_is_typed_or_it_is_said_why_not() {
    let (mut faults, mut used, mut pages) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for (name, text) in texts().into_iter().filter(|(name, _)| name.ends_with(".md")) {
        for command in shown(&text) {
            match NOT_TYPED.iter().find(|(begin, _)| command.text.starts_with(begin)) {
                Some((begin, _)) => {
                    used.insert(*begin);
                }
                None => match TYPED.iter().find(|(page, _)| *page == name) {
                    Some((page, _)) => {
                        pages.insert(*page);
                    }
                    None => faults.push(format!("{name}:{}: {}", command.line, command.text)),
                },
            }
        }
    }
    assert!(faults.is_empty(), "no test types these (tests/it/pages.rs): {}", faults.join("\n"));
    for (begin, _) in NOT_TYPED {
        assert!(used.contains(begin), "no document has {begin:?} any more");
    }
    for (page, module) in TYPED {
        let test = read(&format!("tests/it/{module}.rs"));
        let uses = test.matches(&format!("{page}\"")).count();
        // Once more in the table above.
        let needed = if *module == "pages" { 2 } else { 1 };
        assert!(pages.contains(page) && uses >= needed, "{page} is not typed by {module}");
    }
}

#[test]
fn what_is_not_typed_stands_in_the_guide_for_contributors() {
    let mut table = String::from("| commands | why a test does not type them, and what tries them |\n| --- | --- |\n");
    for (begin, why) in NOT_TYPED {
        table.push_str(&format!("| `{}` | {why} |\n", begin.trim_end()));
    }
    documented("CONTRIBUTING.md", "not typed", &table);
}
