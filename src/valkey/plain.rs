//! What went wrong with a connection, in plain words: where, what, and what to do where something can be done.
//!
//! Takes errors of sockets, of TLS and of the client library; gives a [`Fault`]. What is out of reach may come back by itself;
//! what answers and cannot be understood or trusted will not.

use std::io;
use std::time::Duration;

use fred::error::{Error, ErrorKind};

use super::command::server_error;
use crate::retry::{Fault, socket_words};

/// No connection to this place came about.
pub(super) fn cannot_reach(place: &str, error: &io::Error) -> Fault {
    tls_fault(place, error)
        .unwrap_or_else(|| Fault::ValkeyLost(format!("cannot reach {place}: {}", socket_words(error))))
}

/// A connection to this place broke.
pub(super) fn broke(place: &str, error: &io::Error) -> Fault {
    tls_fault(place, error)
        .unwrap_or_else(|| Fault::ValkeyLost(format!("the connection to {place} broke: {}", socket_words(error))))
}

/// This place did not answer in time.
pub(super) fn no_answer(place: &str, limit: Duration) -> Fault {
    Fault::ValkeyLost(format!("{place} did not answer within {}", humantime::format_duration(limit)))
}

/// This place answered something that is no reply.
pub(super) fn not_understood(place: &str, what: &str) -> Fault {
    Fault::ValkeyProtocol(format!("{place} answered what cannot be understood: {what}"))
}

/// An error of the client library, on the way to this place or later.
pub(super) fn of_library(place: &str, error: &Error) -> Fault {
    if is_reply(error) {
        return server_error(error.details());
    }
    let details = error.details();
    match error.kind() {
        ErrorKind::Tls => tls_words(place, details),
        ErrorKind::Protocol | ErrorKind::Parse => not_understood(place, details),
        ErrorKind::Config | ErrorKind::Url | ErrorKind::InvalidArgument => {
            Fault::ValkeyProtocol("valkey.url cannot be read: write valkey://user:password@host:port".into())
        }
        ErrorKind::Timeout => Fault::ValkeyLost(format!("{place} did not answer in time")),
        _ if details.contains("ertificate") => tls_words(place, details),
        _ => Fault::ValkeyLost(format!("the connection to {place} broke: {}", words_of_debug(details))),
    }
}

/// Whether the server said it; everything else the library makes up itself.
pub(super) fn is_reply(error: &Error) -> bool {
    let code = error.details().split(' ').next().unwrap_or_default();
    code.len() >= 3 && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
}

/// The first bytes of an answer to a plain greeting, where they are no reply; none if they are one.
pub(super) fn greeted_with(place: &str, answer: &[u8]) -> Option<Fault> {
    match answer {
        [] => Some(Fault::ValkeyProtocol(format!(
            "{place} closed the connection at the first word: if it expects TLS write valkeys:// in valkey.url"
        ))),
        // An alert, or a handshake, of TLS.
        [0x15 | 0x16, 0x03, ..] => {
            Some(Fault::ValkeyProtocol(format!("{place} expects TLS: write valkeys:// in valkey.url")))
        }
        [b'-' | b'+' | b'%' | b'*', ..] => None,
        _ => Some(Fault::ValkeyProtocol(format!("what answers at {place} is not Valkey"))),
    }
}

/// Errors of TLS come as errors of the socket.
fn of_tls(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Whether TLS is what failed.
pub(super) fn is_of_tls(error: &io::Error) -> bool {
    of_tls(error).is_some()
}

fn tls_fault(place: &str, error: &io::Error) -> Option<Fault> {
    Some(match of_tls(error)? {
        rustls::Error::InvalidMessage(_) => speaks_no_tls(place),
        tls => tls_words(place, &tls.to_string()),
    })
}

/// This place answers a plain greeting, and was to speak TLS.
pub(super) fn speaks_no_tls(place: &str) -> Fault {
    Fault::ValkeyProtocol(format!("{place} does not speak TLS: write valkey:// in valkey.url, or the port that does"))
}

/// What TLS says, in plain words.
pub(super) fn tls_words(place: &str, words: &str) -> Fault {
    // Another certificate of the same name is trusted: then it is the signature that does not fit.
    if words.contains("UnknownIssuer") || words.contains("BadSignature") {
        return Fault::ValkeyProtocol(format!(
            "the certificate of {place} is not trusted: its issuer is not known here; name the issuer's certificate in \
             SSL_CERT_FILE"
        ));
    }
    if words.contains("CertificateRequired") {
        return Fault::ValkeyProtocol(format!(
            "{place} asks for a certificate of its client: name one and its key in valkey.url (?sslcert=FILE&sslkey=FILE)"
        ));
    }
    if words.contains("ertificate") {
        return Fault::ValkeyProtocol(format!("the certificate of {place} is not accepted: {words}"));
    }
    Fault::ValkeyProtocol(format!("no TLS with {place}: {words}"))
}

/// The library passes the operating system's errors on as this language writes them for debugging.
fn words_of_debug(details: &str) -> String {
    let message = details.split("message: \"").nth(1).and_then(|rest| rest.split('"').next());
    match message {
        Some(message) => message.to_lowercase(),
        None if details.contains(['{', '(']) => "the other side closed the connection".into(),
        None => details.to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(fault: Fault) -> String {
        fault.to_string()
    }

    #[test]
    fn faults_name_the_place_in_plain_words() {
        let refused = io::Error::from_raw_os_error(111);
        assert_eq!(text(cannot_reach("Valkey at h:1", &refused)), "cannot reach Valkey at h:1: connection refused");
        let details = "Os { code: 104, kind: ConnectionReset, message: \"Connection reset by peer\" }";
        let broken = of_library("Valkey at h:1", &Error::new(ErrorKind::IO, details));
        assert_eq!(text(broken), "the connection to Valkey at h:1 broke: connection reset by peer");
    }

    #[test]
    fn what_answers_and_cannot_be_trusted_is_not_out_of_reach() {
        let details = "invalid peer certificate: UnknownIssuer";
        let untrusted = of_library("Valkey at h:1", &Error::new(ErrorKind::Tls, details));
        assert!(matches!(&untrusted, Fault::ValkeyProtocol(words) if words.contains("SSL_CERT_FILE")), "{untrusted}");
        assert!(greeted_with("Valkey at h:1", b"-NOAUTH").is_none());
        for answer in [&b""[..], b"\x15\x03\x01", b"HTTP/1.1 400"] {
            assert!(matches!(greeted_with("Valkey at h:1", answer), Some(Fault::ValkeyProtocol(_))));
        }
    }
}
