//! Connections: a bounded number of sessions that everybody in the process takes in turn.
//!
//! Takes exchanges; gives what they give. Fails with a [`Fault`]. A thousand streams do not need a thousand connections. A
//! session whose state is in doubt is dropped whole, so that an open transaction can never be handed to the next user; that
//! is why this is not a pool of the client library.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use tokio::sync::Semaphore;

use super::{Endpoint, Session};
use crate::retry::Fault;

/// What a network may add to `postgres.statement_timeout` before an answer is given up.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);
/// How long a sign of life may take.
const PING_WITHIN: Duration = Duration::from_secs(2);

/// Sessions that are opened when they are needed, taken in turn, and dropped when they are in doubt. Its clones share them.
#[derive(Debug, Clone)]
pub struct Database {
    address: Endpoint,
    turns: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Idle>>>,
    most: usize,
}

#[derive(Debug)]
struct Idle {
    session: Session,
    since: Instant,
}

impl Database {
    /// Connects at first use, `connections` times at the most.
    pub fn new(address: Endpoint, connections: usize) -> Database {
        Database { address, turns: Arc::new(Semaphore::new(connections)), idle: Arc::default(), most: connections }
    }

    /// Where it connects to.
    pub fn address(&self) -> &Endpoint {
        &self.address
    }

    /// How many connections are used now, those that are being opened included, and how many are open and idle.
    pub fn open_connections(&self) -> (usize, usize) {
        (self.most.saturating_sub(self.turns.available_permits()), self.idle().len())
    }

    /// How many may be used at once.
    pub fn most_connections(&self) -> usize {
        self.most
    }

    /// How long one exchange may take at the most, once it has its turn: opening a connection, a sign of life, and the answer.
    pub fn longest_exchange(&self) -> Duration {
        self.address.connect_timeout + PING_WITHIN + self.address.statement_timeout + ANSWER_MARGIN
    }

    /// Runs one exchange of single statements, within the limit for an answer; before that it waits for its turn.
    ///
    /// On time-out the session is dropped, and without a cancel request: a COMMIT under way ends as it ends, and the
    /// ledger tells how. So is a session whose state is in doubt.
    pub async fn run<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Fault> {
        self.run_top(async |connection, _| exchange(connection).await).await
    }

    /// The same; the exchange is told whether each of its statements is a transaction of its own, as a procedure that commits needs it.
    pub async fn run_top<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut PgConnection, bool) -> Result<T, sqlx::Error>,
    ) -> Result<T, Fault> {
        let exchange = async |session: &mut Session| {
            let is_top = !session.is_pooled();
            session.run(async |connection| exchange(connection, is_top).await).await
        };
        self.exchange(exchange, leaves_session_intact).await
    }

    /// Runs a transaction of several statements, which the exchange begins and ends: whatever its error is, it may still be
    /// open, and its session is dropped.
    pub async fn transact<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, Fault> {
        self.exchange(exchange, |_| false).await
    }

    async fn exchange<T>(
        &self,
        exchange: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
        is_intact_after: fn(&Fault) -> bool,
    ) -> Result<T, Fault> {
        // The semaphore is never closed.
        let _turn = self.turns.acquire().await;
        let mut session = match self.take_idle().await {
            Some(session) => session,
            None => self.address.connect().await?,
        };
        let limit = self.address.statement_timeout + ANSWER_MARGIN;
        let outcome = match tokio::time::timeout(limit, exchange(&mut session)).await {
            Ok(outcome) => outcome.map_err(|error| self.address.fault(error)),
            Err(_) => {
                let limit = humantime::format_duration(limit);
                Err(Fault::PostgresLost(format!("no answer from PostgreSQL within {limit}")))
            }
        };
        match &outcome {
            // The others were to the same server: if it is gone, so are they.
            Err(Fault::PostgresLost(_) | Fault::PostgresProtocol(_)) => self.idle().clear(),
            Err(fault) if !is_intact_after(fault) => {}
            _ => self.idle().push(Idle { session, since: Instant::now() }),
        }
        outcome
    }

    /// The session that was used last, if it is still alive. If it is not, the others, idle for longer, are dropped too.
    async fn take_idle(&self) -> Option<Session> {
        let Idle { mut session, since } = self.idle().pop()?;
        if since.elapsed() <= session.trusted_for() {
            return Some(session);
        }
        if let Ok(Ok(())) = tokio::time::timeout(PING_WITHIN, session.ping()).await {
            return Some(session);
        }
        self.idle().clear();
        None
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        // Whoever held it did nothing but push or pop.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes leave of the server, on the sessions that nobody uses now.
    pub async fn close(&self) {
        let idle = std::mem::take(&mut *self.idle());
        for Idle { session, .. } in idle {
            let _ = tokio::time::timeout(self.address.connect_timeout, session.close()).await;
        }
    }
}

/// Whether the same session can go on after this, outside a transaction: the server refused one statement, nothing more.
fn leaves_session_intact(fault: &Fault) -> bool {
    let Fault::Postgres { sqlstate, .. } = fault else { return false };
    matches!(sqlstate.get(..2), Some("21" | "22" | "23" | "40" | "54" | "P0" | "TG"))
}
