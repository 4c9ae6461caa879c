//! What the doctor says of Valkey's servers and of the way to them.

use std::net::{SocketAddr, UdpSocket};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use sqlx::{Connection as _, PgConnection};
use tidegate::ops::sandbox::{Postgres, Valkey};

use super::{assert_well, doctor, examine, fix, of};
use crate::cluster::cluster;
use crate::harness::{Client, Lab, database, eventually, output};
use crate::rights::{as_user, blocks};

/// What INFO says.
async fn info(client: &mut Client, name: &str) -> Option<String> {
    let text = client.call(&["INFO", "everything"]).await.text();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(|value| value.trim().to_owned())
}

/// Sends the command that a fix begins with.
async fn order(client: &mut Client, fix: &str) {
    let command = fix.split(", and the same").next().expect("a command");
    let words: Vec<&str> = command.split(' ').collect();
    assert_eq!(client.call(&words).await, crate::harness::Resp::Text(b"OK".to_vec()), "{command}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_valkey_may_evict_and_lose_is_found_and_each_command_corrects_it() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let found = doctor(&lab).await;
    order(&mut client, &fix(&found, "D1", "error", "maxmemory-policy is allkeys-lru")).await;
    order(&mut client, &fix(&found, "D2", "warning", "appendonly is no")).await;
    client.call(&["CONFIG", "SET", "appendfsync", "no"]).await;
    let found = doctor(&lab).await;
    assert_well(&found, "D1");
    order(&mut client, &fix(&found, "D2", "warning", "appendfsync is no")).await;
    assert_well(&doctor(&lab).await, "D2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_writes_need_no_replica_is_found_and_one_that_refuses_writes_without() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    assert_well(&doctor(&lab).await, "D3");
    let of_primary = format!("127.0.0.1 {}", lab.valkey.port());
    let replica =
        Valkey::start(&["--replicaof", &of_primary, "--repl-diskless-sync-delay", "0"]).await.expect("starts");
    client.call(&["CONFIG", "SET", "repl-diskless-sync-delay", "0"]).await;
    let is_up = async || info(&mut Client::connect(replica.port()).await, "master_link_status").await;
    eventually("the replica", Some("up".to_owned()), is_up).await;
    let told = fix(&doctor(&lab).await, "D3", "warning", "1 replica is connected, and no write needs one");
    order(&mut client, &told).await;
    // The number of good replicas is counted once a second.
    let near = async || info(&mut lab.client().await, "min_slaves_good_slaves").await;
    eventually("a replica that is near", Some("1".to_owned()), near).await;
    assert_well(&doctor(&lab).await, "D3");
    // Whoever may not read the settings is told the same.
    for line in blocks("acl").into_iter().filter(|line| line.contains("SETUSER observer")) {
        order(&mut client, line).await;
    }
    let mut as_observer = lab.program(&["doctor"]);
    as_observer.env("VALKEY_URL", as_user(&lab.valkey.url(), "observer"));
    assert_well(&examine(&mut as_observer).await, "D3");

    drop(replica);
    eventually("no replica", Some("0".to_owned()), near).await;
    let told = fix(&doctor(&lab).await, "D3", "error", "every write is refused");
    assert!(
        matches!(client.call(&["SET", "a", "1"]).await, crate::harness::Resp::Error(e) if e.starts_with("NOREPLICAS"))
    );
    order(&mut client, told.split(": ").nth(1).expect("a command")).await;
    assert_well(&doctor(&lab).await, "D3");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_user_is_found_and_the_documented_one_may_ask_enough() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.settle_everything().await;
    let told = fix(&doctor(&lab).await, "D4", "warning", "as the user default");
    assert!(told.contains("docs/permissions.md"), "{told}");
    for line in blocks("acl").into_iter().filter(|line| line.contains("SETUSER observer")) {
        order(&mut client, line).await;
    }
    let mut command = lab.program(&["doctor", "--output", "json"]);
    let (code, stdout, stderr) = output(command.env("VALKEY_URL", as_user(&lab.valkey.url(), "observer"))).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let found = serde_json::from_str(&stdout).expect("JSON");
    assert_well(&found, "D4");
    // Settings are not for this user, and that is said.
    assert!(fix(&found, "D11", "info", "may not ask").contains("config|get"));
    assert!(!stdout.contains("\"unknown\""), "{stdout}");
}

/// An address of this machine that is not the loopback's; none where it has no network. Nothing is sent.
fn beyond_the_loopback() -> Option<String> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect(("192.0.2.1", 9)).ok()?;
    let address = socket.local_addr().as_ref().map(SocketAddr::ip).ok()?;
    (!address.is_loopback() && !address.is_unspecified()).then(|| address.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_loopback_are_found_where_nothing_requires_encryption() {
    let Some(address) = beyond_the_loopback() else {
        eprintln!("skipped: this machine has no address but the loopback's");
        return;
    };
    // Both servers speak TLS, too, with one certificate.
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| folder.path().join(name).display().to_string();
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([address.clone()]).expect("made");
    std::fs::write(file("cert.pem"), cert.pem()).expect("written");
    let tls_port = crate::harness::free_port().to_string();
    std::fs::write(file("key.pem"), signing_key.serialize_pem()).expect("written");
    let has_tls = tidegate_lab::tls::Certificate::for_this_machine().is_some();
    let (cert_file, key_file) = (file("cert.pem"), file("key.pem"));
    let mut arguments = vec!["--bind", "127.0.0.1", address.as_str(), "--protected-mode", "no"];
    if has_tls {
        arguments.extend(["--tls-port", &tls_port, "--tls-cert-file", &cert_file, "--tls-key-file", &key_file]);
        arguments.extend(["--tls-ca-cert-file", &cert_file, "--tls-auth-clients", "no"]);
    }
    let valkey = Valkey::start(&arguments).await.expect("Valkey starts");
    let lab = Lab { valkey, database: database(true).await };
    let mut command = lab.program(&["doctor"]);
    command.env("VALKEY_URL", format!("valkey://{address}:{}", lab.valkey.port()));
    let found = examine(&mut command).await;
    assert!(of(&found, "D1").iter().all(|finding| finding["severity"] == "ok"), "it is there: {found}");
    let told = fix(&found, "D5", "warning", &format!("valkey.url names {address}"));
    assert_eq!(told, "write valkeys:// in valkey.url");
    if has_tls {
        let mut command = lab.program(&["doctor"]);
        command.env("VALKEY_URL", format!("valkeys://{address}:{tls_port}")).env("SSL_CERT_FILE", &cert_file);
        let found = examine(&mut command).await;
        assert_well(&found, "D1");
        assert_well(&found, "D5");
    }

    let mut postgres = Postgres::start(&["listen_addresses=*"]).await.expect("PostgreSQL starts");
    let hba = postgres.data().join("pg_hba.conf");
    let lines = std::fs::read_to_string(&hba).expect("text");
    std::fs::write(&hba, format!("{lines}\nhost all all {address}/32 trust\n")).expect("written");
    postgres.restart().await.expect("PostgreSQL comes back");
    let url = postgres.url("postgres").replace("127.0.0.1", &address);
    crate::harness::migrate(&url).await;
    let mut command = lab.program(&["doctor"]);
    let found = examine(command.env("DATABASE_URL", &url)).await;
    assert_well(&found, "D26");
    let told = fix(&found, "D5", "warning", &format!("postgres.url names {address}"));
    assert_eq!(told, "add sslmode=verify-full to postgres.url");
    // That this server does not speak TLS is another matter: it can no longer be reached in the open.
    let mut command = lab.program(&["doctor"]);
    let found = examine(command.env("DATABASE_URL", format!("{url}?sslmode=verify-full"))).await;
    assert_well(&found, "D5");
    assert_eq!(of(&found, "D26")[0]["severity"], "unknown", "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_judged_by_its_version() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let found = doctor(&lab).await;
    let of_valkey: Vec<_> =
        of(&found, "D6").into_iter().filter(|f| !f["evidence"].to_string().contains("PostgreSQL")).collect();
    let evidence = of_valkey[0]["evidence"].as_str().expect("text");
    match info(&mut client, "valkey_version").await {
        Some(version) => {
            assert_eq!(evidence, format!("this is Valkey {version}"));
            assert_well(&found, "D6");
        }
        None => {
            let version = info(&mut client, "redis_version").await.expect("a version");
            let told = fix(&found, "D6", "info", &format!("this is Redis {version}"));
            assert!(told.contains("docs/redis.md"), "{told}");
            let mut command = lab.program(&["doctor"]);
            let found = examine(command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed")).await;
            assert_eq!(fix(&found, "D6", "warning", "are tested with Valkey alone"), "use Valkey 8.0 or newer");
        }
    }
    let version =
        format!("PostgreSQL {}.", lab.number("select current_setting('server_version_num')::bigint / 10000").await);
    assert!(
        of(&found, "D6").iter().any(|f| f["severity"] == "ok" && f["evidence"].to_string().contains(&version)),
        "{found}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_time_outs_of_both_servers_are_found() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "timeout", "5"]).await;
    let name = lab.database.rsplit('/').next().expect("a name");
    lab.execute(&format!("alter database {name} set idle_session_timeout = '10s'")).await;
    let found = doctor(&lab).await;
    let told = fix(&found, "D11", "warning", "closes connections that are idle for 5 s");
    order(&mut client, told.split(", or").next().expect("a command")).await;
    assert!(fix(&found, "D11", "info", "idle_session_timeout is 10s").starts_with("nothing: "));
    lab.execute(&format!("alter database {name} reset idle_session_timeout")).await;
    assert_well(&doctor(&lab).await, "D11");
    // Long enough to be kept busy.
    client.call(&["CONFIG", "SET", "timeout", "10"]).await;
    assert_well(&doctor(&lab).await, "D11");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_that_is_nearly_full_is_found_unless_something_may_be_evicted() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["SETRANGE", "filler", "33554432", "x"]).await;
    let used: u64 = info(&mut client, "used_memory").await.and_then(|used| used.parse().ok()).expect("a number");
    client.call(&["CONFIG", "SET", "maxmemory", &(used / 10 * 11).to_string()]).await;
    let told = fix(&doctor(&lab).await, "D25", "warning", "are used, and nothing is evicted");
    assert_eq!(told, "raise maxmemory, or lower trim.retention");
    // Full of what may be evicted is how a cache is meant to be.
    client.call(&["CONFIG", "SET", "maxmemory-policy", "volatile-lru"]).await;
    assert!(fix(&doctor(&lab).await, "D25", "info", "volatile-lru makes room").contains("tidegate memory"));
    client.call(&["CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", &(used * 2).to_string()]).await;
    assert_well(&doctor(&lab).await, "D25");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_nearly_used_up_are_found_at_both_servers() {
    let postgres = Postgres::start(&["max_connections=20"]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "busy").await;
    assert_well(&doctor(&lab).await, "D28");
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxclients", "20"]).await;
    let mut clients = Vec::new();
    let mut sessions = Vec::new();
    for _ in 0..16 {
        clients.push(lab.client().await);
        sessions.push(PgConnection::connect(&lab.database).await.expect("connected"));
    }
    let found = doctor(&lab).await;
    let fix_of_valkey = fix(&found, "D28", "warning", "of 20 connections to Valkey are open");
    fix(&found, "D28", "warning", "of 17 connections to PostgreSQL are open");
    assert!(fix_of_valkey.starts_with("CONFIG SET maxclients"), "{fix_of_valkey}");
    client.call(&["CONFIG", "SET", "maxclients", "1000"]).await;
    drop(sessions);
    let is_well = async || of(&doctor(&lab).await, "D28").iter().all(|finding| finding["severity"] == "ok");
    eventually("both have room", true, is_well).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_cluster_a_stream_without_a_hash_tag_is_found_and_each_stream_is_asked_where_it_is() {
    let (cluster, lab) = (cluster().await, Lab::new().await);
    let program = |arguments: &[&str], stream: &str| {
        tidegate_lab::writers::program(&lab, &cluster.url(), arguments, stream, None)
    };
    let found = examine(&mut program(&["doctor"], "flush:bare")).await;
    let told = fix(&found, "D12", "warning", "the stream flush:bare and its counters counter:… lie in different slots");
    assert!(told.contains("such as {flush:bare}"), "{told}");
    // As it says; and one of as many slots as it takes to have streams on every primary.
    for stream in ["{flush:bare}", "well:{1}", "well:{2}", "well:{3}"] {
        let mut client = cluster.client_of(stream).await;
        client.call(&["XADD", stream, "*", "id", "k", "amount", "1", "op", "1"]).await;
        assert_eq!(output(&mut program(&["run", "--until-empty"], stream)).await.0, 0);
        let found = examine(&mut program(&["doctor"], stream)).await;
        for check in ["D7", "D12", "D13", "D16"] {
            assert_well(&found, check);
        }
        client.call(&["DEL", stream]).await;
        // A pipeline is registered with one stream at a time.
        lab.execute("truncate tidegate.lanes, tidegate.ledger").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_primary_of_several_is_found_by_its_address() {
    let (cluster, lab) = (cluster().await, Lab::new().await);
    let node = &cluster.nodes()[cluster.other_primaries("{3}").await[0]];
    node.ask(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let mut command = tidegate_lab::writers::program(&lab, &cluster.url(), &["doctor"], "flush:{one}", None);
    let found = examine(&mut command).await;
    node.ask(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    let address = format!("127.0.0.1:{}: maxmemory-policy is allkeys-lru", node.valkey.port());
    fix(&found, "D1", "error", &address);
    assert_eq!(of(&found, "D1").iter().filter(|finding| finding["severity"] == "ok").count(), 2, "{found}");
}
