//! Health: what supervisors are told, by HTTP, by the verb, and by systemd's socket.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tokio::net::UnixDatagram;

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, eventually, free_port, output, within_limit};
use crate::proxy::Proxy;

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_either_server_leaves_it_live_and_ready_and_says_degraded() {
    let lab = Lab::new().await;
    let (valkey, postgres) = (Proxy::start(lab.valkey.port()).await, Proxy::start(lab.postgres_port()).await);
    let mut daemon = lab.daemon_through(Some(valkey.port()), Some(postgres.port()));
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("running", |_| true).await;
    assert_eq!(admin.health("/startup").await, (true, serde_json::json!({ "status": "started" })));
    let ready = async || {
        let (is_ready, body) = admin.health("/ready").await;
        (is_ready, body["degraded"].as_bool())
    };
    assert_eq!(ready().await, (true, Some(false)));
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    postgres.cut();
    client.add_many("a", 10).await;
    eventually("ready and degraded", (true, Some(true)), ready).await;
    assert!(admin.health("/live").await.0);
    let (_, body) = admin.health("/ready").await;
    assert_eq!(
        (&body["pipelines"][0]["pipeline"], &body["pipelines"][0]["failing_workers"]),
        (&"counters".into(), &1.into())
    );
    valkey.cut();
    assert!(admin.health("/live").await.0 && admin.health("/ready").await.0);
    postgres.heal();
    valkey.heal();
    lab.await_value("a", 11).await;
    eventually("ready and well", (true, Some(false)), ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_not_ready_before_its_start_nor_in_a_stop_and_live_in_both() {
    let lab = Lab::new().await;
    let postgres = Proxy::start(lab.postgres_port()).await;
    postgres.cut();
    let mut daemon = lab.daemon_through(None, Some(postgres.port()));
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for("cannot start yet").await;
    for (path, is_yes) in [("/live", true), ("/startup", false), ("/ready", false)] {
        assert_eq!(admin.health(path).await.0, is_yes, "{path} at the start");
    }
    postgres.heal();
    eventually("ready", true, async || admin.health("/ready").await.0).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    // What is held cannot be settled: the stop lasts.
    postgres.cut();
    client.add("a", 1).await;
    daemon.wait_for_event("interrupted", |_| true).await;
    daemon.signal(Signal::TERM);
    daemon.wait_for("stopping").await;
    for (path, is_yes) in [("/live", true), ("/startup", true), ("/ready", false)] {
        assert_eq!(admin.health(path).await.0, is_yes, "{path} in a stop");
    }
    postgres.heal();
    assert!(daemon.exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_pipeline_is_told_as_such() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let admin = Admin::of(&mut daemon).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    lab.execute("alter table public.counters rename to away").await;
    client.add("a", 1).await;
    eventually("halted, over HTTP and as a metric", (true, Some(1.0)), async || {
        let (_, body) = admin.health("/ready").await;
        let halted = body["pipelines"][0]["halted"] == true;
        (halted, admin.scrape().await.sum("tidegate_halted", &[("pipeline", "counters")]))
    })
    .await;
    assert!(admin.health("/live").await.0);
    lab.execute("alter table public.away rename to counters").await;
    lab.await_value("a", 2).await;
    eventually("no longer halted", Some(0.0), async || admin.scrape().await.sum("tidegate_halted", &[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_host_is_refused_and_listed_ones_are_served() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__ADMIN__HOSTS", "tidegate.prod.svc");
    let mut daemon = Daemon::start(command);
    let admin = Admin::of(&mut daemon).await;
    for (host, status) in [
        ("127.0.0.1", 200),
        ("localhost:1234", 200),
        ("tidegate.prod.svc:9464", 200),
        ("[::1]:9464", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
    ] {
        for path in ["/metrics", "/live", "/nothing"] {
            let expected = if path == "/nothing" && status == 200 { 404 } else { status };
            let (answered, body) = admin.ask(path, host).await.expect("an answer");
            assert_eq!(answered, expected, "{path} as {host}: {body}");
        }
    }
    // No Host at all, two of them, and what is no request: refused, and the next one is served.
    for request in [
        "GET /live HTTP/1.1\r\n\r\n",
        "GET /live HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        "GET http://evil.example/live HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "\x16\x03\x01 not http\r\n\r\n",
    ] {
        let answer = raw(&admin.address, request).await;
        assert!(!answer.contains("200 OK"), "{request:?}: {answer}");
    }
    assert!(admin.health("/live").await.0);
    assert_eq!(
        raw(&admin.address, "POST /live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .await
            .get(9..12),
        Some("405")
    );
}

/// The first bytes of the answer, with its status; nothing when the server ends the connection without one.
async fn raw(address: &str, request: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("connected");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = [0; 1024];
    let length = within_limit("an answer, or an end", stream.read(&mut answer)).await.unwrap_or(0);
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_verb_asks_the_daemon_and_its_exit_code_tells() {
    let lab = Lab::new().await;
    let listen = format!("127.0.0.1:{}", free_port());
    let postgres = Proxy::start(lab.postgres_port()).await;
    postgres.cut();
    let ask = async |question: &str| {
        let mut command = lab.program(&["health", question]);
        output(command.env("TIDEGATE__ADMIN__LISTEN", &listen)).await
    };
    let (code, stdout, stderr) = ask("--live").await;
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains(&format!("no daemon answers at {listen}: connection refused")), "{stderr}");
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__ADMIN__LISTEN", &listen);
    let mut daemon = lab.start_through(command, None, Some(postgres.port()));
    daemon.wait_for_event("listening", |_| true).await;
    assert_eq!(ask("--live").await.0, 0);
    assert_eq!(ask("--startup").await.0, 1);
    assert_eq!(ask("--ready").await.0, 1);
    postgres.heal();
    daemon.wait_for_event("running", |_| true).await;
    assert_eq!(ask("--startup").await.0, 0);
    let (code, stdout, _) = ask("--ready").await;
    let body: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, &body["status"]), (0, &"ready".into()));
    // Whoever asks needs no urls, and may be told that nobody is to be asked.
    let mut command = lab.program(&["health"]);
    command.env_remove("VALKEY_URL").env_remove("DATABASE_URL").env("TIDEGATE__ADMIN__LISTEN", "");
    let (code, _, stderr) = output(&mut command).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("admin.listen is empty"), "{stderr}");
    // What answers may be something else.
    let mut command = lab.program(&["health", "--timeout", "2s"]);
    let (code, _, stderr) =
        output(command.env("TIDEGATE__ADMIN__LISTEN", format!("127.0.0.1:{}", lab.valkey.port()))).await;
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("no daemon answers"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_keeps_nothing_from_being_flushed_and_is_taken_over() {
    let lab = Lab::new().await;
    let mut first = lab.daemon();
    let admin = Admin::of(&mut first).await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__ADMIN__LISTEN", &admin.address);
    let mut second = Daemon::start(command);
    let event = second.wait_for_event("not_listening", |_| true).await;
    assert_eq!(event["address"], *admin.address);
    second.wait_for_event("running", |_| true).await;
    first.signal(Signal::TERM);
    assert!(first.exit().await.success());
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 1).await;
    second.wait_for_event("listening", |_| true).await;
    assert!(admin.health("/ready").await.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_on_which_nothing_comes_are_closed_and_keep_no_probe_waiting() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    let admin = Admin::of(&mut daemon).await;
    let mut idle = Vec::new();
    for n in 0..300 {
        let mut stream = tokio::net::TcpStream::connect(&admin.address).await.expect("connected");
        if n % 2 == 0 {
            stream.write_all(b"GET /live HT").await.expect("sent");
        }
        idle.push(stream);
    }
    // More than are served at once: this one waits for a place, and gets it.
    assert!(within_limit("an answer", admin.health("/live")).await.0);
    for mut stream in idle {
        let _ = within_limit("the end of an idle connection", stream.read_to_end(&mut Vec::new())).await;
    }
}

/// A service manager's end of the socket.
struct Manager {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    socket: UnixDatagram,
    told: Vec<String>,
}

impl Manager {
    fn listen() -> Manager {
        let directory = tempfile::TempDir::new().expect("a directory");
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("bound");
        Manager { _directory: directory, path, socket, told: Vec::new() }
    }

    /// Waits for a message that has this line, or one that begins so.
    async fn wait_for(&mut self, line: &str) {
        loop {
            let mut buffer = vec![0; 4096];
            let length = within_limit(line, self.socket.recv(&mut buffer)).await.expect("a message");
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            self.told.push(message.clone());
            if message.lines().any(|told| told.starts_with(line)) {
                return;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_is_told_ready_state_reload_and_stop_and_its_watchdog_is_fed_in_an_outage() {
    let lab = Lab::new().await;
    let postgres = Proxy::start(lab.postgres_port()).await;
    let mut manager = Manager::listen();
    let mut command = lab.program(&["run"]);
    command.env("NOTIFY_SOCKET", &manager.path).env("WATCHDOG_USEC", "900000");
    let mut daemon = lab.start_through(command, None, Some(postgres.port()));
    manager.wait_for("READY=1").await;
    manager.wait_for("STATUS=running: 0 entries to settle").await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    postgres.cut();
    client.add_many("a", 5).await;
    manager.wait_for("STATUS=degraded (counters): 5 entries to settle").await;
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1").await;
    }
    postgres.heal();
    lab.await_value("a", 6).await;
    daemon.signal(Signal::HUP);
    manager.wait_for("RELOADING=1").await;
    assert!(
        manager.told.last().is_some_and(|message| message.contains("MONOTONIC_USEC=")),
        "{:?}",
        manager.told.last()
    );
    manager.wait_for("READY=1").await;
    daemon.signal(Signal::TERM);
    manager.wait_for("STOPPING=1").await;
    assert!(daemon.exit().await.success());
    assert!(!manager.told.iter().any(|message| message.contains("postgres://")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_waits_for_a_server_asks_the_service_manager_for_more_time() {
    let lab = Lab::new().await;
    let postgres = Proxy::start(lab.postgres_port()).await;
    postgres.cut();
    let mut manager = Manager::listen();
    let mut command = lab.program(&["run"]);
    command
        .env("NOTIFY_SOCKET", &manager.path)
        .env("WATCHDOG_USEC", Duration::from_millis(300).as_micros().to_string());
    let _daemon = lab.start_through(command, None, Some(postgres.port()));
    for _ in 0..3 {
        manager.wait_for("EXTEND_TIMEOUT_USEC=").await;
    }
    assert!(!manager.told.iter().any(|message| message.contains("READY=1")));
    postgres.heal();
    manager.wait_for("READY=1").await;
}
