//! Sentinels: a failover under load, a majority that is gone, users and TLS. What a failover loses, and two primaries alive at once, are in
//! `failover.rs`.

use std::collections::BTreeSet;

use rustix::process::Signal;
use tidegate::ops::sandbox::Valkey;
use tidegate_lab::sentinel::{SERVICE, Sentinel};
use tidegate_lab::tls::Certificate;
use tidegate_lab::writers::{Writer, both_go_on, lab, program, rows};

use crate::harness::{Client, Daemon, Lab, Resp, eventually, free_port, output, valkey};
use crate::rights::{as_user, blocks};

/// A primary, a replica, and three sentinels of whom two must agree.
struct Watched {
    servers: [Valkey; 2],
    sentinels: Vec<Sentinel>,
    url: String,
}

/// What a server answers to `INFO replication` has this line.
async fn says(server: &Valkey, line: &str) -> bool {
    let Ok(mut client) = Client::try_connect(server.port()).await else { return false };
    match client.try_pipeline(&[["INFO", "replication"]]).await {
        Ok(answers) => answers[0].text().lines().any(|told| told.trim() == line),
        Err(_) => false,
    }
}

impl Watched {
    async fn new() -> Watched {
        let primary = valkey(&[]).await;
        let of = primary.port().to_string();
        let replica = ["--replicaof", "127.0.0.1", &of, "--repl-diskless-sync-delay", "0"];
        let servers = [primary, valkey(&replica).await];
        eventually("replicating", true, async || says(&servers[1], "master_link_status:up").await).await;
        let mut sentinels = Vec::new();
        // Where their votes are split they try again after twice this time. A server that is slow for a moment is not dead.
        let impatient = [
            format!("sentinel failover-timeout {SERVICE} 2000"),
            format!("sentinel down-after-milliseconds {SERVICE} 1500"),
        ];
        for _ in 0..3 {
            sentinels.push(Sentinel::watching(servers[0].port(), free_port(), 2, &impatient).await);
        }
        let ports: Vec<String> = sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port)).collect();
        let url = format!("valkey-sentinel://{}?sentinelServiceName={SERVICE}", ports.join(","));
        let watched = Watched { servers, sentinels, url };
        for sentinel in &watched.sentinels {
            let knows = async |what: &str| match sentinel.ask(&["SENTINEL", what, SERVICE]).await {
                Resp::Array(known) => known.len(),
                _ => 0,
            };
            eventually("it knows the replica", 1, async || knows("REPLICAS").await).await;
            eventually("it knows the other sentinels", 2, async || knows("SENTINELS").await).await;
        }
        watched
    }

    fn ports(&self) -> Vec<u16> {
        self.servers.iter().map(Valkey::port).collect()
    }

    /// All sentinels say that this server is the primary.
    async fn await_primary(&self, number: usize) {
        let port = self.servers[number].port().to_string();
        for sentinel in &self.sentinels {
            let told = async || match sentinel.ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]).await {
                Resp::Array(address) => address.get(1).map(Resp::text),
                _ => None,
            };
            eventually("the sentinel says so", Some(port.clone()), told).await;
        }
        eventually("it is the primary", true, async || says(&self.servers[number], "role:master").await).await;
    }
}

/// Every entry that this server's streams hold has landed, and none twice.
async fn assert_exact(lab: &Lab, server: &Valkey, streams: [(&str, &str); 2]) {
    for (stream, table) in streams {
        let entries = Client::connect(server.port()).await.call(&["XRANGE", stream, "-", "+"]).await.array();
        let held: BTreeSet<String> =
            entries.into_iter().map(|entry| entry.array().remove(1).array()[1].text()).collect();
        let missing = async || {
            let rows = rows(lab, table).await;
            held.iter().filter(|key| !rows.contains_key(*key)).count()
        };
        eventually("entries that have not landed", 0, missing).await;
        assert!(!held.is_empty() && rows(lab, table).await.values().all(|value| *value == 1), "{stream}: doubled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_under_load_is_followed_and_so_is_the_way_back() {
    let (mut watched, lab) = (Watched::new().await, lab().await);
    let (group, alone) = ("flush:counters", "flush:alone");
    let mut daemon = Daemon::start(program(&lab, &watched.url, &["run"], group, Some(alone)));
    let writers = [group, alone].map(|stream| Writer::to(&watched.ports(), stream));
    both_go_on(&lab).await;
    watched.servers[0].kill();
    watched.await_primary(1).await;
    both_go_on(&lab).await;
    // The old primary is back, and is told that it is a replica.
    watched.servers[0].restart().await.expect("it starts");
    eventually("a replica", true, async || says(&watched.servers[0], "master_link_status:up").await).await;
    both_go_on(&lab).await;
    // Refused for a while after the failover before, and given up if the replica is too slow to become the primary: asked for until it is one.
    let back = watched.servers[0].port().to_string();
    let promoted = async || {
        let told = watched.sentinels[0].ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]).await;
        let is_back = matches!(told, Resp::Array(address) if address.get(1).map(Resp::text).as_ref() == Some(&back));
        if !is_back {
            watched.sentinels[0].ask(&["SENTINEL", "FAILOVER", SERVICE]).await;
        }
        is_back
    };
    eventually("it is back", true, promoted).await;
    watched.await_primary(0).await;
    both_go_on(&lab).await;
    for writer in writers {
        writer.stop().await;
    }
    assert_exact(&lab, &watched.servers[0], [(group, "public.counters"), (alone, "public.alone")]).await;
    assert_eq!(daemon.count("reading is halted"), 0, "{}", daemon.last_lines());
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_of_sentinels_the_old_primary_is_waited_for() {
    let (mut watched, lab) = (Watched::new().await, lab().await);
    let (group, alone) = ("flush:counters", "flush:alone");
    let mut command = program(&lab, &watched.url, &["run"], group, Some(alone));
    command.env("TIDEGATE__VALKEY__COMMAND_TIMEOUT", "1s").env("TIDEGATE__VALKEY__CONNECT_TIMEOUT", "1s");
    let mut daemon = Daemon::start(command);
    let writers = [group, alone].map(|stream| Writer::to(&watched.ports(), stream));
    both_go_on(&lab).await;
    watched.sentinels.truncate(1);
    watched.servers[0].pause();
    let place = format!("Valkey at 127.0.0.1:{}", watched.servers[0].port());
    let told = |line: &serde_json::Value| line["fault"].as_str().is_some_and(|fault| fault.contains(&place));
    daemon.wait_for_event("interrupted", told).await;
    assert!(says(&watched.servers[1], "role:slave").await, "nobody is promoted");
    watched.servers[0].resume();
    both_go_on(&lab).await;
    // With no sentinel at all: whoever is connected stays so; whoever comes is told who does not answer.
    let last = watched.sentinels.remove(0).port;
    let mut late = Daemon::start(program(&lab, &watched.url, &["run"], group, None));
    let line = late.wait_for("reading is interrupted").await;
    let fault = line["fault"].as_str().unwrap_or_default();
    assert!(fault.starts_with("no sentinel answers: ") && fault.contains(&format!("127.0.0.1:{last}")), "{line}");
    both_go_on(&lab).await;
    for writer in writers {
        writer.stop().await;
    }
    assert_exact(&lab, &watched.servers[0], [(group, "public.counters"), (alone, "public.alone")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn as_the_documented_users_of_sentinels_and_servers_over_tls() {
    let (certificate, lab) = (Certificate::for_this_machine(), lab().await);
    if certificate.is_none() {
        eprintln!("without TLS: this Valkey was built without it");
    }
    let settings = |port: u16| certificate.as_ref().map(|c| c.settings(port)).unwrap_or_default();
    let primary_tls = free_port();
    let words: Vec<String> =
        settings(primary_tls).into_iter().flat_map(|(name, value)| [format!("--{name}"), value]).collect();
    let primary = Valkey::start(&words.iter().map(String::as_str).collect::<Vec<_>>()).await.expect("it starts");
    let mut client = Client::connect(primary.port()).await;
    for line in blocks("acl").into_iter().filter(|line| !line.contains("+cluster|")) {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(client.call(&words).await, Resp::Text(b"OK".to_vec()), "{line}");
    }
    let (port, tls_port) = (free_port(), free_port());
    let mut lines: Vec<String> =
        settings(tls_port).into_iter().map(|(name, value)| format!("{name} {value}")).collect();
    let user = |line: &str| line.replace(">secret", "\">of the sentinels\"");
    lines.extend(blocks("sentinel").into_iter().map(user));
    lines.push("user default off".into());
    let watches = if certificate.is_some() { primary_tls } else { primary.port() };
    let _sentinel = Sentinel::watching(watches, port, 1, &lines).await;

    let (scheme, at) = if certificate.is_some() { ("valkeys", tls_port) } else { ("valkey", port) };
    let sentinel_user = "sentinelUsername=tidegate&sentinelPassword=of%20the%20sentinels";
    let url =
        |service: &str, who: &str| format!("{scheme}-sentinel://localhost:{at}?sentinelServiceName={service}{who}");
    let program = |url: &str, arguments: &[&str], user: &str| {
        let mut command = program(&lab, &as_user(url, user), arguments, "flush:counters", Some("flush:alone"));
        if let Some(certificate) = &certificate {
            command.env("SSL_CERT_FILE", certificate.trusted());
        }
        command
    };
    let good = url(SERVICE, &format!("&{sentinel_user}"));
    let lines = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(lines.path(), "k 5\n").expect("written");
    let (code, _, stderr) =
        output(&mut program(&good, &["produce", lines.path().to_str().expect("text")], "producer")).await;
    assert_eq!(code, 0, "{stderr}");
    let (code, _, stderr) = output(&mut program(&good, &["run", "--until-empty"], "tidegate")).await;
    assert_eq!((code, lab.value("k").await), (0, Some(5)), "{stderr}");
    assert!(!stderr.contains("NOPERM"), "{stderr}");

    if certificate.is_some() {
        let (_, stdout, _) = output(&mut program(&good, &["doctor", "--all"], "tidegate")).await;
        for port in [tls_port, primary_tls] {
            let (certificate, port) = ("the certificate of Valkey at ", format!(":{port} is good until"));
            let is_it = |line: &str| line.starts_with("D29  ok") && line.contains(certificate) && line.contains(&port);
            assert!(stdout.lines().any(is_it), "{port}: {stdout}");
        }
    }
    for (wrong, user, code, words) in [
        (
            url("another", &format!("&{sentinel_user}")),
            "tidegate",
            78,
            "knows no primary named another: correct sentinelServiceName",
        ),
        (url(SERVICE, "&sentinelUsername=tidegate&sentinelPassword=hunter2"), "tidegate", 77, "WRONGPASS"),
        (url(SERVICE, ""), "tidegate", 77, "NOAUTH"),
        (good, "nobody", 77, "WRONGPASS"),
    ] {
        let (found, _, stderr) = output(&mut program(&wrong, &["run", "--until-empty"], user)).await;
        assert!(found == code && stderr.contains(words) && !stderr.contains("hunter2"), "{words}: {found}: {stderr}");
    }
}
