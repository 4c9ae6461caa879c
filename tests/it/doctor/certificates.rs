//! What the doctor says of the certificates of both servers, and of those that are shown to them.

use serde_json::Value;
use tidegate::ops::sandbox::Postgres;
use tidegate_lab::cluster::Cluster;
use tidegate_lab::tls::{Certificate, days};

use super::{assert_well, examine, fix, of};
use crate::harness::{Lab, Resp, eventually, free_port};
use crate::security::{install, shown};

/// A Valkey that shows one certificate after the other.
struct Showing {
    lab: Lab,
    port: u16,
}

impl Showing {
    async fn start() -> Showing {
        Showing { lab: Lab::new().await, port: free_port() }
    }

    /// Shows this one from now on, and asks clients for theirs, or does not.
    async fn show(&self, certificate: &Certificate, asks: &str) {
        let mut settings = certificate.settings(self.port);
        settings.iter_mut().filter(|(name, _)| *name == "tls-auth-clients").for_each(|(_, value)| *value = asks.into());
        let words: Vec<&str> = settings.iter().flat_map(|(name, value)| [*name, value.as_str()]).collect();
        let told = self.lab.client().await.call(&[&["CONFIG", "SET"], &words[..]].concat()).await;
        assert_eq!(told, Resp::Text(b"OK".to_vec()), "{words:?}");
    }

    async fn diagnose(&self, parameters: &str) -> Value {
        let mut command = self.lab.program(&["doctor"]);
        command.env("VALKEY_URL", format!("valkeys://localhost:{}?{parameters}", self.port));
        examine(&mut command).await
    }

    /// What the doctor says of a server that shows this one, to a client that trusts whoever vouches for it.
    async fn diagnosed(&self, certificate: &Certificate) -> Value {
        self.show(certificate, "no").await;
        self.diagnose(&format!("sslrootcert={}", certificate.trusted().display())).await
    }
}

/// Good for 90 days in all, and for so many more.
fn lasting(ahead: i32) -> Certificate {
    Certificate::good(days(90 - ahead, ahead)).expect("TLS")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_valkey_is_found_before_it_ends_and_when_no_connection_accepts_it() {
    if Certificate::for_this_machine().is_none() {
        return;
    }
    let valkey = Showing::start().await;
    let name = format!("the certificate of Valkey at localhost:{}", valkey.port);
    for well in [lasting(20), Certificate::good(days(1, 6)).expect("TLS"), lasting(80)] {
        let found = valkey.diagnosed(&well).await;
        assert_well(&found, "D29");
        assert!(of(&found, "D29")[0]["evidence"].to_string().contains(&format!("{name} is good until 2")), "{found}");
        assert_well(&found, "D1");
    }
    // One that lasts for a week is no alarm before its last days.
    for soon in [lasting(13), Certificate::good(days(6, 1)).expect("TLS")] {
        let found = valkey.diagnosed(&soon).await;
        assert!(fix(&found, "D29", "warning", &format!("{name} ends at 2")).contains("CONFIG SET tls-cert-file"));
        assert_well(&found, "D1");
    }
    for (bad, words) in
        [(lasting(-1), "ended at"), (Certificate::good(days(-2, 90)).expect("TLS"), "is not good before")]
    {
        let found = valkey.diagnosed(&bad).await;
        fix(&found, "D29", "error", &format!("{name} {words}"));
        let told = of(&found, "D29")[0]["evidence"].to_string();
        assert!(told.contains("no connection is opened with it"), "{told}");
        // That is so.
        assert_eq!(of(&found, "D1")[0]["severity"], "unknown", "{found}");
    }
    // What nobody trusts is another matter.
    let [other, shown] = [lasting(80), lasting(80)];
    valkey.show(&shown, "no").await;
    let found = valkey.diagnose(&format!("sslrootcert={}", other.trusted().display())).await;
    let told = of(&found, "D29")[0];
    assert_eq!(told["severity"], "unknown", "{told}");
    assert!(told["evidence"].to_string().contains("cannot be judged: "), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_chain_the_certificate_decides_that_ends_first_and_is_needed() {
    if Certificate::for_this_machine().is_none() {
        return;
    }
    let valkey = Showing::start().await;
    let issued = |own, intermediate| Certificate::issued(own, intermediate).expect("TLS");
    let vouches = format!("of CN=intermediate, which vouches for that of Valkey at localhost:{},", valkey.port);
    let (good, long) = (days(10, 80), days(300, 700));
    // Shown along is one that nobody needs, which ended long ago.
    let found = valkey.diagnosed(&issued(good, long)).await;
    assert_well(&found, "D29");
    assert_well(&found, "D1");
    let found = valkey.diagnosed(&issued(good, days(360, 5))).await;
    fix(&found, "D29", "warning", &format!("{vouches} ends at 2"));
    assert_well(&found, "D1");
    for (intermediate, words) in [(days(365, -1), "ended at"), (days(-1, 365), "is not good before")] {
        let found = valkey.diagnosed(&issued(good, intermediate)).await;
        fix(&found, "D29", "error", &format!("{vouches} {words}"));
        assert_eq!(of(&found, "D1")[0]["severity"], "unknown", "{found}");
    }
    // The server's own ends before the other one.
    let found = valkey.diagnosed(&issued(days(85, 5), days(360, 6))).await;
    fix(&found, "D29", "warning", &format!("the certificate of Valkey at localhost:{} ends at 2", valkey.port));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_server_of_a_cluster_is_asked_for_its_certificate() {
    let Some(certificate) = Certificate::good(days(80, 10)) else { return };
    let trusted = certificate.trusted();
    let (cluster, lab) = (Cluster::start_with(Some(certificate), 3, 0, &[]).await, Lab::new().await);
    let mut command = tidegate_lab::writers::program(&lab, &cluster.url(), &["doctor"], "flush:{one}", None);
    let found = examine(command.env("SSL_CERT_FILE", trusted)).await;
    let warned = of(&found, "D29").iter().filter(|finding| finding["severity"] == "warning").count();
    // The url may name a node by another name than the cluster does.
    assert!(warned >= 3, "{found}");
    assert_eq!(warned, of(&found, "D29").len(), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_postgresql_is_found_and_what_it_means_follows_from_sslmode() {
    if Certificate::for_this_machine().is_none() {
        return;
    }
    let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "secure").await;
    let diagnose = async |parameters: &str| {
        let mut command = lab.program(&["doctor"]);
        examine(command.env("DATABASE_URL", format!("{}?{parameters}", lab.database))).await
    };
    // It offers no TLS yet.
    let found = diagnose("sslmode=prefer").await;
    assert_well(&found, "D29");
    assert!(of(&found, "D29")[0]["evidence"].to_string().contains("no connection uses a certificate"), "{found}");

    let name = format!("the certificate of PostgreSQL at 127.0.0.1:{}", postgres.port());
    let serve = async |certificate: &Certificate, words: &str| {
        install(&postgres, certificate);
        lab.execute("alter system set ssl = on").await;
        lab.execute("select pg_reload_conf()").await;
        let is_shown = async || {
            let found = diagnose("sslmode=require").await;
            of(&found, "D29").iter().any(|finding| finding["evidence"].to_string().contains(words))
        };
        eventually("it shows the new one", true, is_shown).await;
        format!("sslrootcert={}", certificate.trusted().display())
    };
    let ended = lasting(-2);
    let trusted = serve(&ended, "ended at").await;
    for mode in ["prefer", "require"] {
        let found = diagnose(&format!("sslmode={mode}&{trusted}")).await;
        assert!(fix(&found, "D29", "warning", &format!("{name} ended at 2")).contains("pg_reload_conf()"));
        let told = of(&found, "D29")[0]["evidence"].to_string();
        assert!(told.contains("connections are opened all the same"), "{told}");
        assert_well(&found, "D26");
    }
    for mode in ["verify-ca", "verify-full"] {
        let found = diagnose(&format!("sslmode={mode}&{trusted}")).await;
        fix(&found, "D29", "error", &format!("{name} ended at 2"));
        assert_eq!(of(&found, "D26")[0]["severity"], "unknown", "{found}");
    }
    let found = diagnose("sslmode=disable").await;
    assert_well(&found, "D29");
    let found = diagnose("sslmode=verify-full&sslrootcert=/no/such/file").await;
    let told = of(&found, "D29")[0];
    assert_eq!(told["severity"], "unknown", "{told}");
    let words = "sslrootcert of postgres.url, /no/such/file, cannot be used";
    assert!(told["evidence"].to_string().contains(words), "{told}");
    // Out of reach: what is told of that is enough, and nothing is said to be well.
    let nobody = free_port();
    let mut command = lab.program(&["doctor"]);
    let found =
        examine(command.env("DATABASE_URL", format!("postgres://127.0.0.1:{nobody}/none?sslmode=prefer"))).await;
    assert!(of(&found, "D29").is_empty() && of(&found, "D26")[0]["severity"] == "unknown", "{found}");

    let issued = Certificate::issued(days(10, 80), days(360, 3)).expect("TLS");
    let trusted = serve(&issued, "is good until").await;
    let found = diagnose(&format!("sslmode=verify-full&{trusted}")).await;
    fix(&found, "D29", "warning", "of CN=intermediate, which vouches for that of PostgreSQL");
    assert_well(&found, "D26");
    // Who verifies nothing is not concerned by who vouches for it.
    assert_well(&diagnose("sslmode=require").await, "D29");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_certificate_is_found_and_whether_anybody_asks_for_it() {
    let Some(server) = Certificate::for_this_machine() else { return };
    let valkey = Showing::start().await;
    let trusted = format!("sslrootcert={}", server.trusted().display());
    let with =
        |own: &Certificate| format!("{trusted}&sslcert={}&sslkey={}", own.shown().display(), own.key().display());
    let names = |own: &Certificate| format!("valkey.url names with sslcert ({})", own.shown().display());
    let told =
        |found: &Value| of(found, "D29").iter().map(|finding| finding["evidence"].to_string()).collect::<String>();
    for asks in ["no", "yes"] {
        valkey.show(&server, asks).await;
        let own = lasting(80);
        let found = valkey.diagnose(&with(&own)).await;
        assert_well(&found, "D29");
        assert!(told(&found).contains(&names(&own)), "{found}");
        let own = lasting(10);
        let found = valkey.diagnose(&with(&own)).await;
        assert!(fix(&found, "D29", "warning", &format!("{} ends at 2", names(&own))).contains("sslkey"));
        let own = lasting(-1);
        let found = valkey.diagnose(&with(&own)).await;
        let (severity, words) = match asks {
            "no" => ("warning", "the server that was seen does not ask for it"),
            _ => ("error", "the server asks for it, and refuses the connection"),
        };
        fix(&found, "D29", severity, &format!("{} ended at 2", names(&own)));
        assert!(told(&found).contains(words), "{found}");
        // Of a chain the one that ends first.
        let own = Certificate::issued(days(10, 80), days(300, 3)).expect("TLS");
        let shown = std::fs::read_to_string(own.shown()).expect("text");
        let end = "-----END CERTIFICATE-----\n";
        let chain: String = shown.split_inclusive(end).take(2).collect();
        std::fs::write(own.shown(), chain).expect("written");
        let found = valkey.diagnose(&with(&own)).await;
        fix(&found, "D29", "warning", "that of CN=intermediate, which vouches for it, ends at 2");
    }
    let own = lasting(80);
    std::fs::write(own.shown(), "-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n")
        .expect("written");
    let found = valkey.diagnose(&with(&own)).await;
    assert!(of(&found, "D29").iter().any(|finding| finding["severity"] == "unknown"), "{found}");
    assert!(told(&found).contains("cannot be read"), "{found}");

    // PostgreSQL asks where it has authorities for its clients.
    let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "secure").await;
    install(&postgres, &server);
    let own = lasting(-1);
    let diagnose = async |shown: &str| {
        let mut command = lab.program(&["doctor"]);
        examine(command.env("DATABASE_URL", format!("{}?sslmode=verify-full&{shown}", lab.database))).await
    };
    lab.execute("alter system set ssl = on").await;
    for (setting, severity, words) in [
        ("", "warning", "the server that was seen does not ask for it"),
        ("server.crt", "error", "the server asks for it, and refuses the connection"),
    ] {
        lab.execute(&format!("alter system set ssl_ca_file = '{setting}'")).await;
        lab.execute("select pg_reload_conf()").await;
        let is_told = async || told(&diagnose(&with(&own)).await).contains(words);
        eventually("the setting is read", true, is_told).await;
        let found = diagnose(&with(&own)).await;
        fix(
            &found,
            "D29",
            severity,
            &format!("postgres.url names with sslcert ({}) ended at 2", own.shown().display()),
        );
    }
    // The text itself, in place of a file, is judged, too, and not repeated.
    let text = std::fs::read_to_string(own.shown()).expect("text");
    let encoded: String = url::form_urlencoded::byte_serialize(text.as_bytes()).collect();
    let key = own.key().display().to_string();
    let found = diagnose(&format!("{trusted}&sslcert={encoded}&sslkey={key}")).await;
    fix(&found, "D29", "error", "postgres.url names with sslcert (the text) ended at 2");
    assert_well(&diagnose(&shown(&server)).await, "D29");
}
