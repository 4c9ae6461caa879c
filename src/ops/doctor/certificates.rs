//! Certificates: until when those are good that servers show, and those that are shown to them.
//!
//! Takes the configuration; makes a handshake with each server that is reached by TLS, and puts findings. It cannot fail: that a server is out
//! of reach is told by the checks that need the connection, and what is not trusted or cannot be read is a finding that was not made.

use std::fmt::Display;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;

use super::{Findings, Severity};
use crate::certificate::{Shown, Standing, Validity, of_client};
use crate::config::Config;
use crate::ops::columns::{cut, lasting};
use crate::retry::Fault;

/// What is shown to servers, and the name of the file that it is in.
type Own = (String, Vec<CertificateDer<'static>>);

/// The check.
const ID: &str = "D29";

/// How much is told of whose a certificate is: its owner may write what he likes.
const LONGEST_SUBJECT: usize = 120;
/// What is done about a server's certificate.
const RENEW: &str = "renew it, and have the server read it: Valkey with CONFIG SET tls-cert-file, PostgreSQL with select pg_reload_conf() (docs/rotate.md)";
/// What is done about a client's.
const RENEW_OWN: &str = "put a new certificate and its key into the files that sslcert and sslkey name; they are read for each connection anew";
/// What is done about one that is not good yet.
const WAIT: &str = "compare the clocks of this machine and of the one that issued it; or issue it anew";

pub(super) async fn examine(config: &Config, findings: &mut Findings) {
    let now = Timestamp::now();
    let mut is_whole = true;
    if let Ok(valkey) = config.valkey.address() {
        let own = valkey.own_certificates().map(|own| own.map(|(path, own)| (path.display().to_string(), own)));
        is_whole &= both_ends("valkey.url", valkey.certificates().await, own, now, findings);
    }
    if let Ok(postgres) = config.postgres.address() {
        let own = postgres.own_certificates();
        is_whole &= both_ends("postgres.url", postgres.certificates().await, own, now, findings);
    }
    if is_whole {
        findings.rest(&[(ID, "no connection uses a certificate")]);
    }
}

/// What the servers of a url show, and what is shown to them. Whether each of them was seen.
fn both_ends(
    key: &str,
    servers: Result<Vec<(String, Option<Shown>)>, Fault>,
    own: Result<Option<Own>, Fault>,
    now: Timestamp,
    findings: &mut Findings,
) -> bool {
    let servers = servers.unwrap_or_else(|fault| {
        findings.unknown(ID, &fault);
        Vec::new()
    });
    let seen = servers.iter().filter_map(|(name, shown)| Some((name, shown.as_ref()?)));
    seen.for_each(|(name, shown)| of_server(name, shown, now, findings));
    let is_asked_for = servers.iter().any(|(_, shown)| shown.as_ref().is_some_and(|shown| shown.asks));
    of_own(key, own, is_asked_for, now, findings);
    servers.iter().all(|(_, shown)| shown.is_some())
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
        false => {
            format!("the certificate of {}, which vouches for that of {name},", cut(&validity.subject, LONGEST_SUBJECT))
        }
    };
    let (worst, follows) = match shown.is_verified() {
        true => (Severity::Error, "no connection is opened with it"),
        false => (Severity::Warning, "connections are opened all the same, for sslmode does not verify it"),
    };
    judge(&whose, &validity, worst, follows, RENEW, now, findings);
}

/// What is shown to servers.
fn of_own(key: &str, own: Result<Option<Own>, Fault>, is_asked_for: bool, now: Timestamp, findings: &mut Findings) {
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
        false => format!("of {whose} that of {}, which vouches for it,", cut(&validity.subject, LONGEST_SUBJECT)),
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
