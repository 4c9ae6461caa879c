//! The admin port tells nobody a password or the console's token: not its pages, its metrics or its health, not an answer of the API, not what it
//! says to a request that it refuses or does not understand; while all is well, and while both servers refuse the daemon.

use std::path::Path;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, STREAM};

/// Part of every secret of this test, with characters that a url writes otherwise, so that neither spelling may appear.
const CANARY: &str = "c4n4ry";
const TOKEN: &str = "c4n4ry-token-0123456789";

/// What is asked for: all that the port serves, and what it does not.
const PATHS: [&str; 28] = [
    "/",
    "/metrics",
    "/live",
    "/ready",
    "/startup",
    "/health",
    "/console",
    "/console/",
    "/console/console.js",
    "/console/../../etc/passwd",
    "/api/session",
    "/api/status",
    "/api/streams",
    "/api/workers",
    "/api/consumers",
    "/api/history",
    "/api/config?limit=500",
    "/api/config?limit=many",
    "/api/dead",
    "/api/dead?since=soon",
    "/api/dead/letter?id=1-1",
    "/api/dead/redrive",
    "/api/dead/discard",
    "/api/dead/reopen",
    "/api/pause",
    "/api/resume",
    "/api/audit",
    "/api/actions",
];

/// Bodies of changes: some make sense, some do not.
const BODIES: [&str; 6] = [
    "",
    "not json",
    "[]",
    r#"{"pipeline": "counters"}"#,
    r#"{"all": true, "dry_run": true}"#,
    r#"{"pipeline": "nobody", "everything": 7}"#,
];

/// Asks for everything in every way, and gives all that was answered.
async fn everything(admin: &Admin) -> Vec<String> {
    let mut told = Vec::new();
    let right = format!("Bearer {TOKEN}");
    let headers: [&[(&str, &str)]; 6] = [
        &[],
        &[("Authorization", "Bearer wrong-token-0123456789")],
        &[("Authorization", &right)],
        &[("Authorization", &right), ("Host", "evil.example")],
        &[("Authorization", &right), ("Sec-Fetch-Site", "cross-site")],
        &[("Authorization", &right), ("Authorization", &right)],
    ];
    for path in PATHS {
        for headers in headers {
            let answer = admin.request("GET", path, headers, "").await;
            told.push(format!("GET {path}: {answer:?}"));
        }
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"] {
            let answer = admin.request(method, path, headers[2], "").await;
            told.push(format!("{method} {path}: {answer:?}"));
        }
        for body in BODIES {
            let json = [headers[2], &[("Content-Type", "application/json")]].concat();
            let answer = admin.request("POST", path, &json, body).await;
            told.push(format!("POST {path} {body}: {answer:?}"));
        }
    }
    let page = admin.request("GET", "/console", &[], "").await;
    for file in page.body.split('"').filter(|text| text.starts_with("/console/")) {
        told.push(format!("{:?}", admin.request("GET", file, &[], "").await));
    }
    // What is no HTTP, or breaks off.
    for garbage in [
        format!("GET /metrics HTTP/9.9\r\nAuthorization: {right}\r\n\r\n"),
        format!("nonsense {TOKEN}\r\n\r\n"),
        format!(
            "POST /api/pause HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {right}\r\nContent-Length: minus\r\n\r\n"
        ),
        format!(
            "GET /api/status HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {right}\u{1}\r\nConnection: close\r\n\r\n"
        ),
    ] {
        let mut stream = TcpStream::connect(&admin.address).await.expect("connected");
        stream.write_all(garbage.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        // It may be cut off.
        let _ = stream.read_to_end(&mut answer).await;
        told.push(String::from_utf8_lossy(&answer).into_owned());
    }
    told
}

fn assert_silent(told: &[String], when: &str) {
    for text in told {
        assert!(!text.contains(CANARY), "{when}: {text}");
    }
}

/// The daemon, with its secrets in files or in variables.
fn daemon(lab: &Lab, folder: &Path, access: &str, secrets: &[(&str, String)], in_files: bool) -> Command {
    let mut command = lab.program(&["run"]);
    command.env_remove("VALKEY_URL").env_remove("DATABASE_URL").env("TIDEGATE__ADMIN__CONSOLE", access);
    for (key, secret) in secrets {
        let variable = format!("TIDEGATE__{}", key.to_uppercase().replace('.', "__"));
        if in_files {
            let file = folder.join(key);
            std::fs::write(&file, format!("{secret}\n")).expect("written");
            command.env(format!("{variable}_FILE"), file);
        } else {
            command.env(variable, secret);
        }
    }
    command
}

async fn no_secret_is_told(access: &str, in_files: bool, role: &str) {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let password = format!("{CANARY}/v@lue:1");
    let encoded = format!("{CANARY}%2Fv%40lue%3A1");
    client.call(&["ACL", "SETUSER", "tide", "on", &format!(">{password}"), "~*", "&*", "+@all"]).await;
    lab.execute(&format!("drop role if exists {role}; create role {role} login superuser password '{password}'")).await;
    let (_, place) = lab.database.split_once('@').expect("a user in the url");
    let secrets = [
        ("valkey.url", lab.valkey.url().replace("://", &format!("://tide:{encoded}@"))),
        ("postgres.url", format!("postgres://{role}:{encoded}@{place}")),
        ("admin.token", TOKEN.to_owned()),
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let mut daemon = Daemon::start(daemon(&lab, folder.path(), access, &secrets, in_files));
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("running", |_| true).await;
    client.add("a", 1).await;
    client.call(&["XADD", STREAM, "*", "id", "a", "amount", "bad"]).await;
    lab.await_value("a", 1).await;
    let told = everything(&admin).await;
    // It was understood, and something was answered that could hold a secret.
    assert!(told.iter().any(|text| text.starts_with("GET /api/config") && text.contains("***")), "no configuration");
    assert!(told.iter().any(|text| text.starts_with("POST /api/pause") && text.contains("status: 200")), "no change");
    assert_silent(&told, "while all is well");
    let resume = [("Authorization", &*format!("Bearer {TOKEN}")), ("Content-Type", "application/json")];
    let resumed = admin.request("POST", "/api/resume", &resume, r#"{"pipeline": "counters"}"#).await;
    assert_eq!(resumed.status, 200, "{resumed:?}");

    // Both servers refuse the daemon.
    lab.execute(&format!("alter role {role} password 'another'")).await;
    lab.execute("alter table public.counters rename to away").await;
    client.add("a", 1).await;
    client.call(&["ACL", "SETUSER", "tide", ">another", &format!("<{password}")]).await;
    client.call(&["CLIENT", "KILL", "USER", "tide"]).await;
    daemon.wait_for("reading is halted").await;
    let pids = format!("select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = '{role}'");
    lab.number(&pids).await;
    assert_silent(&everything(&admin).await, "while both servers refuse");
    // A reload that is refused, because of what stands in the files.
    if in_files {
        std::fs::write(folder.path().join("valkey.url"), format!("valkey://tide:{encoded}@[bad")).expect("written");
        std::fs::write(folder.path().join("postgres.url"), format!("mysql://u:{encoded}@db")).expect("written");
        std::fs::write(folder.path().join("admin.token"), CANARY).expect("written");
        daemon.signal(Signal::HUP);
        daemon.wait_for_event("reload_refused", |_| true).await;
        assert_silent(&everything(&admin).await, "after a reload that was refused");
    }
    daemon.signal(Signal::TERM);
    daemon.signal(Signal::TERM);
    daemon.exit().await;
    assert_silent(&daemon.all_lines(), "in the log");
    lab.execute(&format!("drop role {role}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_console_and_its_port_tell_no_secret_that_stands_in_a_file() {
    no_secret_is_told("open", true, "canary_open").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_console_and_its_port_tell_no_secret_that_stands_in_a_variable() {
    no_secret_is_told("locked", false, "canary_locked").await;
}
