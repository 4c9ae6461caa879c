//! Certificates: until when those are good that servers show, and those that are shown to them.
//!
//! Takes the configuration; makes a handshake with each server that is reached by TLS, and puts findings. It cannot fail: a server that is out
//! of reach, and what is not trusted, are told by the checks that need the connection.

use std::fmt::Display;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;

use super::{Findings, Severity};
use crate::certificate::{Shown, Standing, Validity, of_client};
use crate::config::Config;
use crate::ops::columns::lasting;
use crate::retry::Fault;

/// The check.
const ID: &str = "D29";

/// What is done about a server's certificate.
const RENEW: &str = "renew it, and have the server read it: Valkey with CONFIG SET tls-cert-file, PostgreSQL with select pg_reload_conf() (docs/rotate.md)";
/// What is done about a client's.
const RENEW_OWN: &str = "put a new certificate and its key into the files that sslcert and sslkey name; they are read for each connection anew";
/// What is done about one that is not good yet.
const WAIT: &str = "compare the clocks of this machine and of the one that issued it; or issue it anew";

pub(super) async fn examine(config: &Config, findings: &mut Findings) {
    let now = Timestamp::now();
    // Whether everything was seen that there is to be seen.
    let mut is_whole = true;
    if let Ok(valkey) = config.valkey.address() {
        let servers = valkey.certificates().await;
        is_whole &= servers.as_ref().is_ok_and(|servers| servers.iter().all(|(_, shown)| shown.is_some()));
        let seen = servers.into_iter().flatten().filter_map(|(name, shown)| Some((name, shown?)));
        let servers: Vec<(String, Shown)> = seen.collect();
        servers.iter().for_each(|(name, shown)| of_server(name, shown, now, findings));
        let own = valkey.own_certificates().map(|own| own.map(|(path, own)| (path.display().to_string(), own)));
        of_own("valkey.url", own, servers.iter().any(|(_, shown)| shown.asks), now, findings);
    }
    if let Ok(postgres) = config.postgres.address() {
        let server = postgres.certificates().await;
        is_whole &= server.is_ok();
        let server = server.ok().flatten();
        server.iter().for_each(|(name, shown)| of_server(name, shown, now, findings));
        let asks = server.is_some_and(|(_, shown)| shown.asks);
        of_own("postgres.url", postgres.own_certificates(), asks, now, findings);
    }
    if is_whole {
        findings.rest(&[(ID, "no connection uses a certificate")]);
    }
}

/// What a server shows.
fn of_server(name: &str, shown: &Shown, now: Timestamp, findings: &mut Findings) {
    let validity = match shown.validity(now) {
        Ok(validity) => validity,
        Err(why) => {
            let evidence = format!("the certificate of {name} cannot be judged: {why}");
            return findings.put(ID, None, Severity::Unknown, evidence, None);
        }
    };
    let whose = match validity.is_own {
        true => format!("the certificate of {name}"),
        false => format!("the certificate of {}, which vouches for that of {name},", validity.subject),
    };
    let (worst, follows) = match shown.is_verified() {
        true => (Severity::Error, "no connection is opened with it"),
        false => (Severity::Warning, "connections are opened all the same, for sslmode does not verify it"),
    };
    judge(&whose, &validity, worst, follows, RENEW, now, findings);
}

/// What is shown to servers.
fn of_own(
    key: &str,
    own: Result<Option<(String, Vec<CertificateDer<'static>>)>, Fault>,
    is_asked_for: bool,
    now: Timestamp,
    findings: &mut Findings,
) {
    let (file, validity) = match own {
        Ok(None) => return,
        Ok(Some((file, chain))) => (file, of_client(&chain, now)),
        Err(fault) => return findings.unknown(ID, &fault),
    };
    let whose = format!("the certificate that {key} names with sslcert ({file})");
    let validity = match validity {
        Ok(validity) => validity,
        Err(why) => return findings.put(ID, None, Severity::Unknown, format!("{whose} cannot be read: {why}"), None),
    };
    let whose = match validity.is_own {
        true => whose,
        false => format!("of {whose} that of {}, which vouches for it,", validity.subject),
    };
    let (worst, follows) = match is_asked_for {
        true => (Severity::Error, "the server asks for it, and refuses the connection"),
        false => (Severity::Warning, "the server that was seen does not ask for it"),
    };
    judge(&whose, &validity, worst, follows, RENEW_OWN, now, findings);
}

/// Tells how a certificate stands; `worst` and `follows` where it is not good.
fn judge(
    whose: &str,
    validity: &Validity,
    worst: Severity,
    follows: &str,
    renew: &str,
    now: Timestamp,
    findings: &mut Findings,
) {
    let apart = |one: Timestamp, other: Timestamp| lasting(one.duration_since(other).unsigned_abs());
    let told = |words: &str, at: &dyn Display, apart: String| format!("{whose} {words} {at}, {apart}");
    match validity.standing(now) {
        Standing::Good(until) => findings.well(ID, format!("{whose} is good until {until}")),
        Standing::EndsSoon(until) => {
            let evidence = told("ends at", &until, format!("in {}", apart(until, now)));
            findings.of_server(ID, Severity::Warning, evidence, renew);
        }
        Standing::Ended(until) => {
            let evidence = told("ended at", &until, format!("{} ago: {follows}", apart(now, until)));
            findings.of_server(ID, worst, evidence, renew);
        }
        Standing::NotYet(from) => {
            let evidence = told("is not good before", &from, format!("in {}: {follows}", apart(from, now)));
            findings.of_server(ID, worst, evidence, WAIT);
        }
    }
}
