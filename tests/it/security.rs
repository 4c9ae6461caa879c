//! Encrypted connections, named users, other databases: on every connection, the reader's own included.

use std::io::Write;
use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::NamedTempFile;
use tidegate::ops::sandbox::Postgres;
use tidegate_lab::tls::Certificate;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::harness::{Daemon, Lab, Resp, eventually, free_port, output};

/// A door of TLS in front of a local port, and the file with the certificate to trust.
pub(crate) async fn tls_in_front_of(upstream: u16) -> (u16, NamedTempFile) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).expect("made");
    let mut trusted = NamedTempFile::new().expect("a file");
    trusted.write_all(cert.pem().as_bytes()).expect("written");
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("known");
    let config = config.with_no_client_auth().with_single_cert(vec![cert.der().clone()], key).expect("a pair");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut client = acceptor.accept(client).await?;
                let mut server = TcpStream::connect(("127.0.0.1", upstream)).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    (port, trusted)
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_read_over_tls_by_a_named_user_from_another_database() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["ACL", "SETUSER", "tide", "on", ">s3cret", "~*", "+@all"]).await;
    client.call(&["CONFIG", "SET", "requirepass", "another"]).await;
    client.call(&["SELECT", "3"]).await;
    client.add_many("a", 5_000).await;
    let (port, trusted) = tls_in_front_of(lab.valkey.port()).await;
    let url = format!("valkeys://tide:s3cret@localhost:{port}/3");
    let mut command = lab.program(&["run", "--until-empty"]);
    let (code, _, stderr) = output(command.env("VALKEY_URL", &url).env("SSL_CERT_FILE", trusted.path())).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.value("a").await, Some(5_000));
    assert!(!stderr.contains("s3cret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_nobody_vouches_for_is_refused() {
    let lab = Lab::new().await;
    let (port, _) = tls_in_front_of(lab.valkey.port()).await;
    let (_, other) = tls_in_front_of(lab.valkey.port()).await;
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", format!("valkeys://localhost:{port}")).env("SSL_CERT_FILE", other.path());
    let mut daemon = Daemon::start(command);
    let line = daemon.wait_for("reading is halted").await;
    let fault = line["fault"].as_str().unwrap_or_default();
    assert!(fault.starts_with(&format!("the certificate of Valkey at localhost:{port} is not trusted")), "{line}");
    assert!(fault.contains("SSL_CERT_FILE"), "{line}");
}

/// The parameters of a url that name what is trusted and shown; both servers' urls have the same.
pub(crate) fn shown(certificate: &Certificate) -> String {
    let (root, cert, key) = (certificate.trusted(), certificate.shown(), certificate.key());
    format!("sslrootcert={}&sslcert={}&sslkey={}", root.display(), cert.display(), key.display())
}

/// Puts a certificate where PostgreSQL looks for its own when it reads its configuration.
pub(crate) fn install(postgres: &Postgres, certificate: &Certificate) {
    let data = postgres.data();
    // Its key must be its user's own.
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&data).expect("there"));
    for (from, name) in [(certificate.shown(), "server.crt"), (certificate.key(), "server.key")] {
        let to = data.join(name);
        std::fs::copy(from, &to).expect("copied");
        std::os::unix::fs::chown(&to, Some(owner), None).expect("given");
        std::fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("set");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_asks_for_its_clients_certificate_is_shown_one() {
    let Some(certificate) = Certificate::for_this_machine() else { return };
    let lab = Lab::new().await;
    let port = free_port();
    let mut client = lab.client().await;
    client.add_many("a", 1_000).await;
    for (name, value) in certificate.settings(port) {
        let value = if name == "tls-auth-clients" { "yes".into() } else { value };
        let told = client.call(&["CONFIG", "SET", name, &value]).await;
        // The port comes first, and has nothing to show yet.
        assert!(name == "tls-port" || told == Resp::Text(b"OK".to_vec()), "{name}: {told:?}");
    }
    client.call(&["CONFIG", "SET", "tls-port", &port.to_string()]).await;
    let run = async |parameters: &str| {
        let mut command = lab.program(&["run", "--until-empty"]);
        command.env("VALKEY_URL", format!("valkeys://localhost:{port}?{parameters}"));
        // Of no meaning where the url names authorities.
        command.env("SSL_CERT_FILE", "/no/such/store");
        output(&mut command).await
    };
    let (code, _, stderr) = run(&format!("sslrootcert={}", certificate.trusted().display())).await;
    assert!(code != 0 && stderr.contains("asks for a certificate of its client"), "{code}: {stderr}");
    let (code, _, stderr) = run("sslrootcert=/no/such/file").await;
    assert!(
        code != 0 && stderr.contains("sslrootcert of valkey.url, /no/such/file, cannot be used"),
        "{code}: {stderr}"
    );
    let own = format!("sslcert={}&sslkey={}", certificate.trusted().display(), certificate.key().display());
    let (code, _, stderr) = run(&own).await;
    assert!(code != 0 && stderr.contains("/no/such/store"), "{code}: {stderr}");
    let (code, _, stderr) = run(&shown(&certificate)).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.value("a").await, Some(1_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_that_asks_for_its_clients_certificate_is_shown_one() {
    let Some(certificate) = Certificate::for_this_machine() else { return };
    let mut postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "secure").await;
    install(&postgres, &certificate);
    let data = postgres.data();
    lab.execute("alter system set ssl_ca_file = 'server.crt'").await;
    lab.execute("alter system set ssl = on").await;
    let rules = "host all all 127.0.0.2/32 trust\nhostssl all all 127.0.0.1/32 trust clientcert=verify-ca\n";
    lab.execute("select pg_reload_conf()").await;
    lab.client().await.add_many("a", 1_000).await;
    std::fs::write(data.join("pg_hba.conf"), rules).expect("written");
    lab.execute("select pg_reload_conf()").await;
    let run = async |parameters: &str| {
        let mut command = lab.program(&["run", "--until-empty", "--timeout", "3s"]);
        command.env("DATABASE_URL", format!("{}?{parameters}", lab.database));
        output(&mut command).await
    };
    let trusted = certificate.trusted();
    let refused = async || run(&format!("sslmode=verify-full&sslrootcert={}", trusted.display())).await.0 != 0;
    eventually("without a certificate it is refused", true, refused).await;
    let (code, _, stderr) = run(&format!("sslmode=verify-full&{}", shown(&certificate))).await;
    assert_eq!(code, 0, "{stderr}");
    std::fs::write(data.join("pg_hba.conf"), "host all all 127.0.0.1/32 trust\n").expect("written");
    postgres.stop();
    postgres.restart().await.expect("PostgreSQL comes back");
    assert_eq!(lab.value("a").await, Some(1_000));
}

/// The first fault that a daemon meets on this url.
async fn fault(lab: &Lab, url: &str, message: &str) -> String {
    let mut command = lab.program(&["run"]);
    command.env("VALKEY_URL", url).env("TIDEGATE__VALKEY__CONNECT_TIMEOUT", "1s");
    command.env("TIDEGATE__VALKEY__COMMAND_TIMEOUT", "1s");
    let line = Daemon::start(command).wait_for(message).await;
    line["fault"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_out_of_reach_and_what_is_not_valkey_is_said_in_plain_words_with_its_address() {
    let lab = Lab::new().await;
    let (plain, nobody) = (lab.valkey.port(), free_port());
    let (tls, _) = tls_in_front_of(plain).await;
    for (url, message, expected) in [
        (
            format!("valkey://127.0.0.1:{nobody}"),
            "reading is interrupted",
            format!("cannot reach Valkey at 127.0.0.1:{nobody}: connection refused"),
        ),
        (
            "valkey://no-such-host.invalid:6379".into(),
            "reading is interrupted",
            "cannot reach Valkey at no-such-host.invalid:6379: the host's name is not known".into(),
        ),
        (
            format!("valkeys://localhost:{plain}"),
            "reading is halted",
            format!("Valkey at localhost:{plain} does not speak TLS: write valkey:// in valkey.url"),
        ),
        (format!("valkey://localhost:{tls}"), "reading is halted", format!("Valkey at localhost:{tls} ")),
        (
            format!("valkey://localhost:{}", lab.postgres_port()),
            "reading is halted",
            format!("at localhost:{}", lab.postgres_port()),
        ),
    ] {
        let fault = fault(&lab, &url, message).await;
        assert!(fault.contains(&expected), "{url}: {fault:?}, expected {expected:?}");
        assert!(!fault.contains("Os {") && !fault.contains("Custom {"), "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_and_a_password_may_hold_any_character() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 100).await;
    let password = r#"a b%@:/ü"c'\"#;
    client.call(&["ACL", "SETUSER", "tide@ü", "on", &format!(">{password}"), "~*", "+@all"]).await;
    client.call(&["CONFIG", "SET", "requirepass", password]).await;
    let encoded = "a%20b%25%40%3A%2F%C3%BC%22c%27%5C";
    for (user, expected) in [("tide%40%C3%BC", 100), ("", 200)] {
        let url = format!("valkey://{user}:{encoded}@127.0.0.1:{}", lab.valkey.port());
        let mut command = lab.program(&["run", "--until-empty"]);
        let (code, _, stderr) = output(command.env("VALKEY_URL", &url)).await;
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(lab.value("a").await, Some(expected));
        assert!(!stderr.contains("a b%") && !stderr.contains(encoded), "{stderr}");
        client.add_many("a", 100).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_be_named_by_its_ipv6_address() {
    let Ok(listener) = TcpListener::bind(("::1", 0)).await else { return };
    let lab = Lab::new().await;
    let (port, upstream) = (listener.local_addr().expect("bound").port(), lab.valkey.port());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", upstream)).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    lab.client().await.add_many("a", 100).await;
    let mut command = lab.program(&["run", "--until-empty"]);
    let (code, _, stderr) = output(command.env("VALKEY_URL", format!("valkey://[::1]:{port}"))).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.value("a").await, Some(100));
}
