//! Talking to PostgreSQL: a bounded number of connections, their sessions pinned down, their errors told apart.
//!
//! All that a process does there, it does over a few connections that everybody takes in turn, so that a thousand streams
//! do not need a thousand of them. A connection whose state is in doubt is dropped whole, so that an open transaction can
//! never be handed to the next user; that is why this is not a pool of the client library.

pub mod schema;

use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgDatabaseError};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::Semaphore;

use crate::retry::Fault;

/// What a network may add to `postgres.statement_timeout` before an answer is given up.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);

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

/// Connections that are opened when they are needed, taken in turn, and dropped when they are in doubt. Its clones share them.
#[derive(Debug, Clone)]
pub struct Database {
    address: Endpoint,
    turns: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<PgConnection>>>,
}

impl Database {
    /// Connects at first use, `connections` times at the most.
    pub fn new(address: Endpoint, connections: usize) -> Database {
        Database { address, turns: Arc::new(Semaphore::new(connections)), idle: Arc::default() }
    }

    /// Where it connects to.
    pub fn address(&self) -> &Endpoint {
        &self.address
    }

    /// Runs one exchange of single statements, within the limit for an answer; before that it waits for its turn.
    ///
    /// On time-out the connection is dropped, and without a cancel request: a COMMIT under way ends as it ends, and the
    /// ledger tells how. So is a connection whose state is in doubt.
    pub async fn run<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Fault> {
        self.exchange(exchange, leaves_session_intact).await
    }

    /// Runs a transaction of several statements: whatever its error is, it may still be open, and its connection is dropped.
    pub async fn transact<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Fault> {
        self.exchange(exchange, |_| false).await
    }

    async fn exchange<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
        is_intact_after: fn(&Fault) -> bool,
    ) -> Result<T, Fault> {
        // Nobody closes it.
        let _turn = self.turns.acquire().await;
        let idle = self.idle().pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => self.address.connect().await?,
        };
        let limit = self.address.statement_timeout + ANSWER_MARGIN;
        let outcome = match tokio::time::timeout(limit, exchange(&mut connection)).await {
            Ok(outcome) => outcome.map_err(fault),
            Err(_) => Err(Fault::PostgresLost(format!("no answer within {}", humantime::format_duration(limit)))),
        };
        match &outcome {
            // The others were to the same server: if it is gone, so are they.
            Err(Fault::PostgresLost(_)) => self.idle().clear(),
            Err(fault) if !is_intact_after(fault) => {}
            _ => self.idle().push(connection),
        }
        outcome
    }

    fn idle(&self) -> MutexGuard<'_, Vec<PgConnection>> {
        // Whoever held it did nothing but push or pop.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes leave of the server, on the connections that nobody uses now.
    pub async fn close(&self) {
        let idle = std::mem::take(&mut *self.idle());
        for connection in idle {
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
