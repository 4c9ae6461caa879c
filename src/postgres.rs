//! Talking to PostgreSQL: one connection at a time, its session pinned down, its errors told apart.
//!
//! There is no pool. Each task that writes owns its connection, and drops it whole when its state is in doubt, so that an
//! open transaction can never be handed to the next user.

use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgDatabaseError};
use sqlx::{ConnectOptions, Connection};

use crate::retry::Fault;

/// What a network may add to `postgres.statement_timeout` before an answer is given up.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);

/// Where PostgreSQL is and how long anything may take there.
#[derive(Debug, Clone)]
pub struct Address {
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

impl Address {
    /// Opens a connection.
    pub async fn connect(&self) -> Result<PgConnection, Fault> {
        let (options, limit) = (self.options()?, self.connect_timeout);
        tokio::time::timeout(limit, PgConnection::connect_with(&options))
            .await
            .map_err(|_| Fault::PostgresLost(format!("no connection within {}", humantime::format_duration(limit))))?
            .map_err(fault)
    }

    fn options(&self) -> Result<PgConnectOptions, Fault> {
        let ms = |duration: Duration| duration.as_millis().to_string();
        // The error of the URL may quote it, password and all: it is not passed on.
        Ok(PgConnectOptions::from_str(self.url.expose_secret())
            .map_err(|_| {
                Fault::PostgresLost("postgres.url cannot be read: write postgres://user:password@host:port/db".into())
            })?
            .application_name("tidegate")
            .options([
                ("statement_timeout", ms(self.statement_timeout)),
                ("lock_timeout", ms(self.lock_timeout)),
                ("idle_in_transaction_session_timeout", ms(self.idle_in_transaction_timeout)),
                ("default_transaction_isolation", "read committed".into()),
                ("search_path", "public".into()),
                // The server notices by itself that a worker's machine is gone.
                ("tcp_keepalives_idle", "15".into()),
                ("tcp_keepalives_interval", "5".into()),
                ("tcp_keepalives_count", "3".into()),
            ])
            .disable_statement_logging())
    }
}

/// A connection that is opened when it is needed and dropped when it is in doubt.
#[derive(Debug)]
pub struct Database {
    address: Address,
    connection: Option<PgConnection>,
}

impl Database {
    /// Connects at first use.
    pub fn new(address: Address) -> Database {
        Database { address, connection: None }
    }

    /// The connection, opened if there is none.
    async fn connection(&mut self) -> Result<&mut PgConnection, Fault> {
        match self.connection.take() {
            Some(connection) => Ok(self.connection.insert(connection)),
            None => Ok(self.connection.insert(self.address.connect().await?)),
        }
    }

    /// Runs one exchange on the connection, within the limit for an answer.
    ///
    /// On time-out the connection is dropped, and without a cancel request: a COMMIT under way ends as it ends, and the
    /// ledger tells how. So is a connection whose state is in doubt.
    pub async fn run<T>(
        &mut self,
        exchange: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Fault> {
        let limit = self.answer_limit();
        let connection = self.connection().await?;
        let fault = match tokio::time::timeout(limit, exchange(connection)).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => fault(error),
            Err(_) => Fault::PostgresLost(format!("no answer within {}", humantime::format_duration(limit))),
        };
        if !leaves_session_intact(&fault) {
            self.forget();
        }
        Err(fault)
    }

    /// How long an answer may take before the connection is given up.
    fn answer_limit(&self) -> Duration {
        self.address.statement_timeout + ANSWER_MARGIN
    }

    /// Drops the connection: the server rolls back what was open on it.
    pub fn forget(&mut self) {
        self.connection = None;
    }

    /// Takes leave of the server.
    pub async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            // A courtesy: without it the server notices the closed socket.
            let _ = tokio::time::timeout(self.address.connect_timeout, connection.close()).await;
        }
    }
}

/// Whether the same session can go on after this, outside a transaction: the server refused one statement, nothing more.
fn leaves_session_intact(fault: &Fault) -> bool {
    let Fault::Postgres { sqlstate, .. } = fault else { return false };
    matches!(sqlstate.get(..2), Some("21" | "22" | "23" | "40" | "54" | "P0" | "TG"))
}

/// An error of the client library, in the words of the one who said it.
pub fn fault(error: sqlx::Error) -> Fault {
    match error {
        sqlx::Error::Database(error) => {
            let constraint = error.constraint().map(str::to_owned);
            let schema = error.try_downcast_ref::<PgDatabaseError>().and_then(|e| e.schema()).map(str::to_owned);
            Fault::Postgres {
                sqlstate: error.code().unwrap_or_default().into_owned(),
                message: error.message().to_owned(),
                schema,
                constraint,
            }
        }
        sqlx::Error::Io(error) => Fault::PostgresLost(error.to_string()),
        other => Fault::PostgresLost(other.to_string()),
    }
}
