//! Encryption: whether what goes over the network is encrypted, as the two urls say.
//!
//! Takes the configuration; puts findings. Asks no server: an address is as open while its server is away.

use std::net::IpAddr;
use std::str::FromStr;

use secrecy::ExposeSecret;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::{Findings, Severity};
use crate::config::Config;

pub(super) fn examine(config: &Config, findings: &mut Findings) {
    let hosts = config.valkey.address().map(|address| address.hosts_in_the_open()).unwrap_or_default();
    if let Some(host) = hosts.iter().find(|host| !is_loopback(host)) {
        found("valkey.url", host, "write valkeys:// in valkey.url", findings);
    }
    let postgres = config.postgres.url.as_ref().and_then(|url| PgConnectOptions::from_str(url.expose_secret()).ok());
    if let Some(host) = postgres.as_ref().and_then(host_in_the_open).filter(|host| !is_loopback(host)) {
        found("postgres.url", host, "add sslmode=verify-full to postgres.url", findings);
    }
    findings.rest(&[("D5", "what leaves the loopback is encrypted, or nothing leaves it")]);
}

fn found(key: &str, host: &str, fix: &str, findings: &mut Findings) {
    let evidence = format!("{key} names {host}, which is not the loopback, and does not require encryption");
    findings.of_server("D5", Severity::Warning, evidence, fix);
}

/// The host, where encryption is not required; none where it is, or where the connection is a socket of this machine.
fn host_in_the_open(options: &PgConnectOptions) -> Option<&str> {
    let is_required =
        matches!(options.get_ssl_mode(), PgSslMode::Require | PgSslMode::VerifyCa | PgSslMode::VerifyFull);
    Some(options.get_host()).filter(|_| !is_required && options.get_socket().is_none())
}

/// Whether what is sent there stays on this machine. Only what is certain: another name may mean anything.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_the_loopback_is_near_and_nothing_else() {
        for near in
            ["localhost", "LOCALHOST", "db.localhost", "127.0.0.1", "127.3.2.1", "::1", "[::1]", "::ffff:127.0.0.1"]
        {
            assert!(is_loopback(near), "{near}");
        }
        for far in ["", "db", "localhost.example.com", "10.0.0.1", "192.0.2.1", "fe80::1", "0.0.0.0", "128.0.0.1"] {
            assert!(!is_loopback(far), "{far}");
        }
    }

    #[test]
    fn a_socket_and_each_mode_that_requires_encryption_leave_nothing_in_the_open() {
        let open = |url: &str| host_in_the_open(&PgConnectOptions::from_str(url).expect("a url")).map(str::to_owned);
        for mode in ["require", "verify-ca", "verify-full"] {
            assert_eq!(open(&format!("postgres://u:p@db/app?sslmode={mode}")), None);
            assert_eq!(open(&format!("postgres://u:p@db/app?ssl-mode={mode}")), None);
        }
        assert_eq!(open("postgres://u:p@%2Fvar%2Frun%2Fpostgresql/app"), None);
        assert_eq!(open("postgres:///app?host=/var/run/postgresql"), None);
        assert_eq!(open("postgres://u:sslmode=require@db/app").as_deref(), Some("db"), "words of a password");
        assert_eq!(open("postgres://u:p@db/app?sslmode=prefer").as_deref(), Some("db"));
        assert_eq!(open("postgres:///app?host=db").as_deref(), Some("db"));
    }
}
