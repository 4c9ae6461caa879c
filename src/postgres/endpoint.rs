//! Where PostgreSQL is, how long anything may take there, and what its errors mean.
//!
//! Takes a URL and limits; gives sessions in which the limits hold, straight or through a pooler. Fails with a [`Fault`] in
//! plain words that names the place, and never the password.

use std::io;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgDatabaseError};
use sqlx::{ConnectOptions, Connection, Row};

use super::session::Session;
use crate::retry::{Fault, socket_words};

/// With this code a pooler refuses settings at the start ("unsupported startup parameter").
const PROTOCOL_VIOLATION: &str = "08P01";
/// A setting of our own, unknown to servers and poolers. Who does not give it back did not take the others either.
const MARK: &str = "tidegate.session";
/// Whether it was taken, and after how many milliseconds the server closes an idle session; 0 is never.
const OPENED: &str = "select current_setting('tidegate.session', true),
    coalesce((extract(epoch from current_setting('idle_session_timeout', true)::interval) * 1000)::bigint, 0)";

/// Where PostgreSQL is and how long anything may take there.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// `postgres://` or `postgresql://`.
    pub url: SecretString,
    /// The limit for opening a connection.
    pub connect_timeout: Duration,
    /// The server's limit for one statement.
    pub statement_timeout: Duration,
    /// The server's limit for one wait for a lock.
    pub lock_timeout: Duration,
    /// After this the server ends a transaction whose client is silent: a stopped worker must not hold up its peers.
    pub idle_in_transaction_timeout: Duration,
}

impl Endpoint {
    /// Opens a session.
    pub async fn connect(&self) -> Result<Session, Fault> {
        let (options, limit) = (self.options()?, self.connect_timeout);
        match tokio::time::timeout(limit, self.open(&options)).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => Err(self.not_opened(error)),
            Err(_) => Err(Fault::PostgresLost(format!(
                "cannot reach {}: no connection within {}",
                self.place(),
                humantime::format_duration(limit)
            ))),
        }
    }

    /// Straight, if everything that is set at the start is taken; else a pooler stands between.
    async fn open(&self, options: &PgConnectOptions) -> Result<Session, sqlx::Error> {
        let mark = format!("{:016x}", rand::random::<u64>());
        let settings = self.limits().into_iter().chain([
            ("default_transaction_isolation", "read committed".to_owned()),
            // The server notices by itself that a worker's machine is gone.
            ("tcp_keepalives_idle", "15".to_owned()),
            ("tcp_keepalives_interval", "5".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
            (MARK, mark.clone()),
        ]);
        let limits: Vec<String> =
            self.limits().iter().map(|(name, value)| format!("set local {name} = {value}")).collect();
        let pooled = |connection| Session::pooled(connection, &limits.join("; "));
        match PgConnection::connect_with(&options.clone().options(settings)).await {
            Ok(mut connection) => {
                // In the simple protocol, which is safe whatever stands between.
                let row = sqlx::raw_sql(OPENED).fetch_one(&mut connection).await?;
                let taken = row.try_get::<Option<String>, _>(0)?.as_ref() == Some(&mark);
                let idle_limit = row.try_get::<i64, _>(1)?.try_into().ok().filter(|ms| *ms > 0);
                let idle_limit = idle_limit.map(Duration::from_millis);
                Ok(if taken { Session::straight(connection, idle_limit) } else { pooled(connection) })
            }
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(PROTOCOL_VIOLATION) => {
                let bare = options.clone().extra_float_digits(None);
                PgConnection::connect_with(&bare).await.map(pooled)
            }
            Err(error) => Err(error),
        }
    }

    /// What holds in every transaction.
    fn limits(&self) -> [(&'static str, String); 4] {
        let ms = |duration: Duration| duration.as_millis().to_string();
        [
            ("statement_timeout", ms(self.statement_timeout)),
            ("lock_timeout", ms(self.lock_timeout)),
            ("idle_in_transaction_session_timeout", ms(self.idle_in_transaction_timeout)),
            ("search_path", "public".into()),
        ]
    }

    pub(super) fn options(&self) -> Result<PgConnectOptions, Fault> {
        // The error of the URL may quote it, password and all: it is not passed on.
        Ok(PgConnectOptions::from_str(self.url.expose_secret())
            .map_err(|_| {
                Fault::PostgresProtocol(
                    "postgres.url cannot be read: write postgres://user:password@host:port/db".into(),
                )
            })?
            .application_name("tidegate")
            .disable_statement_logging())
    }

    /// Host and port, or the socket's folder; for people.
    pub(super) fn place(&self) -> String {
        let Ok(options) = self.options() else { return "PostgreSQL".into() };
        let host = options.get_host();
        match options.get_socket() {
            Some(socket) => format!("PostgreSQL at {}", socket.display()),
            None if host.contains(':') => {
                format!("PostgreSQL at [{}]:{}", host.trim_matches(['[', ']']), options.get_port())
            }
            None => format!("PostgreSQL at {host}:{}", options.get_port()),
        }
    }

    /// An error before a session was there.
    fn not_opened(&self, error: sqlx::Error) -> Fault {
        match error {
            sqlx::Error::Io(error) if tls_error(&error).is_none() => {
                Fault::PostgresLost(format!("cannot reach {}: {}", self.place(), socket_words(&error)))
            }
            error => match self.fault(error) {
                Fault::Postgres { sqlstate, message, schema, constraint, routine } => {
                    let message = format!("{message}, says {}", self.place());
                    Fault::Postgres { sqlstate, message, schema, constraint, routine }
                }
                fault => fault,
            },
        }
    }

    /// An error of the client library, in plain words.
    pub(crate) fn fault(&self, error: sqlx::Error) -> Fault {
        let place = self.place();
        match error {
            sqlx::Error::Database(error) => refusal(&*error),
            sqlx::Error::Io(error) => match tls_error(&error) {
                Some(tls) => Fault::PostgresProtocol(tls_in_plain_words(&place, &tls.to_string())),
                None => Fault::PostgresLost(format!("the connection to {place} broke: {}", socket_words(&error))),
            },
            sqlx::Error::Tls(error) => Fault::PostgresProtocol(tls_in_plain_words(&place, &error.to_string())),
            other => Fault::PostgresProtocol(format!("{place} answered what cannot be understood: {other}")),
        }
    }
}

/// What the server refused, in its own words.
pub fn refusal(error: &dyn DatabaseError) -> Fault {
    Fault::Postgres {
        sqlstate: error.code().unwrap_or_default().into_owned(),
        message: error.message().to_owned(),
        schema: error.try_downcast_ref::<PgDatabaseError>().and_then(|e| e.schema()).map(str::to_owned),
        constraint: error.constraint().map(str::to_owned),
        routine: error.try_downcast_ref::<PgDatabaseError>().and_then(|e| e.routine()).map(Into::into),
    }
}

/// The client library passes errors of TLS on as errors of the socket.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn tls_in_plain_words(place: &str, words: &str) -> String {
    if words.contains("does not support TLS") {
        return format!("{place} offers no TLS, and postgres.url asks for it (sslmode)");
    }
    if words.contains("UnknownIssuer") {
        return format!(
            "the certificate of {place} is not trusted: its issuer is not known here; name the issuer's certificate in \
             SSL_CERT_FILE, or in postgres.url (sslrootcert)"
        );
    }
    if words.contains("certificate") {
        return format!("the certificate of {place} is not accepted: {words}");
    }
    format!("no TLS with {place}: {words}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str) -> Endpoint {
        let second = Duration::from_secs(1);
        Endpoint {
            url: SecretString::from(url.to_owned()),
            connect_timeout: second,
            statement_timeout: second,
            lock_timeout: second,
            idle_in_transaction_timeout: second,
        }
    }

    #[test]
    fn the_place_is_named_and_the_password_never() {
        assert_eq!(endpoint("postgres://u:hunter2@db:6000/app").place(), "PostgreSQL at db:6000");
        assert_eq!(endpoint("postgres://u:hunter2@[::1]:6000/app").place(), "PostgreSQL at [::1]:6000");
        let unreadable = endpoint("postgres://u:hunter2@db:port/app").options().expect_err("no port");
        assert!(!unreadable.to_string().contains("hunter2"), "{unreadable}");
    }

    #[test]
    fn errors_of_the_socket_and_of_tls_are_told_apart_and_in_plain_words() {
        let at = endpoint("postgres://db:6000/app");
        let refused = sqlx::Error::Io(io::Error::from_raw_os_error(111));
        assert_eq!(at.not_opened(refused).to_string(), "cannot reach PostgreSQL at db:6000: connection refused");
        let issuer = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let untrusted = at.not_opened(sqlx::Error::Io(io::Error::new(io::ErrorKind::InvalidData, issuer)));
        assert!(matches!(&untrusted, Fault::PostgresProtocol(words) if words.contains("SSL_CERT_FILE")), "{untrusted}");
        let plain = at.not_opened(sqlx::Error::Tls("server does not support TLS".into()));
        assert!(matches!(&plain, Fault::PostgresProtocol(words) if words.contains("offers no TLS")), "{plain}");
        let odd = io::Error::from_raw_os_error(113);
        assert!(!at.not_opened(sqlx::Error::Io(odd)).to_string().contains("os error"));
    }
}
