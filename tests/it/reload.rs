//! What a SIGHUP changes while a daemon runs: the level of the log, credentials, certificates, the admin port; and what is told of it.

use std::path::Path;

use rustix::process::Signal;

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, eventually};
use crate::security::tls_in_front_of;

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_level_of_the_log_and_the_admin_port_follow_and_the_difference_is_told() {
    let lab = Lab::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tidegate.toml");
    let (first, second) = (crate::harness::free_port(), crate::harness::free_port());
    let configure = |level: &str, port: u16, entries: u32, per_stream: bool| {
        let admin = format!("[admin]\nlisten = \"127.0.0.1:{port}\"\n");
        let others = format!("[batch]\nmax_entries = {entries}\n[telemetry]\nper_stream = {per_stream}\n");
        write(&file, &format!("[log]\nlevel = \"{level}\"\n{admin}{others}"));
    };
    configure("info", first, 5_000, false);
    let mut command = lab.program(&["run"]);
    command.env_remove("TIDEGATE__LOG__LEVEL").env_remove("TIDEGATE__ADMIN__LISTEN").env("TIDEGATE_CONFIG", &file);
    let mut daemon = Daemon::start(command);
    daemon.wait_for_event("running", |_| true).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    assert_eq!(daemon.count("flushed"), 0, "a line of the level debug");

    configure("debug", second, 6_000, true);
    daemon.forget();
    daemon.signal(Signal::HUP);
    let told = daemon.wait_for_event("reloaded", |_| true).await;
    let changes = format!(
        "batch.max_entries: 5000 -> 6000; log.level: info -> debug; admin.listen: 127.0.0.1:{first} -> 127.0.0.1:{second}"
    );
    assert_eq!(told["changes"], *changes, "{told}");
    assert_eq!(told["after_restart"], "telemetry.per_stream: false -> true");
    daemon.wait_for_event("running", |_| true).await;
    client.add("a", 1).await;
    daemon.wait_for("flushed").await;
    let (before, after) = (format!("127.0.0.1:{first}"), format!("127.0.0.1:{second}"));
    daemon.wait_for_event("listening", |event| event["address"] == *after).await;
    let scrape = Admin { address: after.clone() }.scrape().await;
    assert_eq!(scrape.sum("tidegate_reloads_total", &[("outcome", "followed")]), Some(1.0));
    assert_eq!(scrape.sum("tidegate_flushes_total", &[]), Some(2.0), "counting goes on");
    assert!(Admin { address: before }.ask("/live", "localhost").await.is_err(), "the port before is free");

    // One that is not valid changes nothing, and is counted.
    write(&file, "[log]\nlevel = \"loud\"\n");
    daemon.forget();
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("reload_refused", |_| true).await;
    let scrape = Admin { address: after }.scrape().await;
    assert_eq!(scrape.sum("tidegate_reloads_total", &[("outcome", "refused")]), Some(1.0));
    client.add("a", 1).await;
    daemon.wait_for("flushed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_from_files_are_changed_under_load_and_never_told() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (valkey, postgres) = (folder.path().join("valkey"), folder.path().join("postgres"));
    let port = lab.valkey.port();
    let (_, place) = lab.database.split_once('@').expect("a user in the url");
    let user = format!("rotating_{}", std::process::id());
    let urls = |password: &str| {
        write(&valkey, &format!("valkey://tide:{password}@127.0.0.1:{port}\n"));
        write(&postgres, &format!("postgres://{user}:{password}@{place}\n"));
    };
    client.call(&["ACL", "SETUSER", "tide", "on", ">hunter2-old", "~*", "+@all"]).await;
    lab.execute(&format!("create role {user} login superuser password 'hunter2-old'")).await;
    urls("hunter2-old");
    let mut command = lab.program(&["run"]);
    command.env_remove("VALKEY_URL").env_remove("DATABASE_URL");
    command.env("TIDEGATE__VALKEY__URL_FILE", &valkey).env("TIDEGATE__POSTGRES__URL_FILE", &postgres);
    let mut daemon = Daemon::start(command);
    client.add_many("a", 5_000).await;
    daemon.wait_for("flushed").await;

    // The new password is valid beside the old one until everybody has it, as it is done.
    client.call(&["ACL", "SETUSER", "tide", ">hunter2-new"]).await;
    lab.execute(&format!("alter role {user} password 'hunter2-new'")).await;
    urls("hunter2-new");
    client.add_many("a", 5_000).await;
    daemon.forget();
    daemon.signal(Signal::HUP);
    let told = daemon.wait_for_event("reloaded", |_| true).await;
    let changes = told["changes"].as_str().expect("text").to_owned();
    assert!(changes.contains("valkey.url: another secret in valkey://tide:***@127.0.0.1"), "{changes}");
    assert!(changes.contains(&format!("postgres.url: another secret in postgres://{user}:***@")), "{changes}");
    daemon.wait_for_event("running", |_| true).await;
    client.call(&["ACL", "SETUSER", "tide", "<hunter2-old"]).await;
    client.call(&["CLIENT", "KILL", "USER", "tide"]).await;
    client.add_many("a", 5_000).await;
    lab.await_value("a", 15_000).await;
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
    for line in daemon.all_lines() {
        assert!(!line.contains("hunter2"), "{line}");
    }
    lab.execute(&format!("drop role {user}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_was_replaced_is_trusted_after_a_reload() {
    let lab = Lab::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (url, trusted) = (folder.path().join("url"), folder.path().join("trusted.pem"));
    let (first, first_authority) = tls_in_front_of(lab.valkey.port()).await;
    let (second, second_authority) = tls_in_front_of(lab.valkey.port()).await;
    let point_to = |port: u16, authority: &Path| {
        write(&url, &format!("valkeys://localhost:{port}"));
        std::fs::copy(authority, &trusted).expect("copied");
    };
    point_to(first, first_authority.path());
    let mut command = lab.program(&["run"]);
    command.env_remove("VALKEY_URL").env("TIDEGATE__VALKEY__URL_FILE", &url).env("SSL_CERT_FILE", &trusted);
    let mut daemon = Daemon::start(command);
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    point_to(second, second_authority.path());
    daemon.forget();
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("running", |_| true).await;
    client.add("a", 1).await;
    lab.await_value("a", 2).await;
    // It reads by the new one: the name of its connection is seen there, and no fault was met.
    eventually("faults", 0, async || daemon.count("reading is")).await;
}
