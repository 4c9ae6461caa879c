//! A session with PostgreSQL, straight or through a pooler, in which the limits of its [`super::Endpoint`] hold.
//!
//! Takes exchanges; gives what they give. Fails as the client library does.
//!
//! A straight session's limits were set when it was opened. A pooler in transaction mode (pgbouncer) lends a server's
//! connection for one transaction only, and refuses settings at the start: there every exchange is a transaction of its own,
//! which begins with its limits (`set local`) and closes its prepared statements before it ends, so that nothing of it is
//! left in the pool. The statements need no support by the pooler: none outlives its transaction.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};

/// Servers and proxies close what is idle, most of them after minutes.
const TRUSTED_FOR: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct Session {
    connection: PgConnection,
    /// What begins a transaction.
    begin: Arc<str>,
    pooled: bool,
    trusted_for: Duration,
}

impl Session {
    /// One whose limits are set. `idle_limit`: after how long without a statement the server closes it.
    pub(super) fn straight(connection: PgConnection, idle_limit: Option<Duration>) -> Session {
        let trusted_for = idle_limit.map_or(TRUSTED_FOR, |limit| TRUSTED_FOR.min(limit / 2));
        Session { connection, begin: BEGIN.into(), pooled: false, trusted_for }
    }

    /// One through a pooler; `limits` are statements that set them for one transaction.
    pub(super) fn pooled(connection: PgConnection, limits: &str) -> Session {
        Session { connection, begin: format!("{BEGIN}; {limits}").into(), pooled: true, trusted_for: TRUSTED_FOR }
    }

    /// Idle for longer, it is asked for a sign of life before it is used.
    pub(super) fn trusted_for(&self) -> Duration {
        self.trusted_for
    }

    /// Whether a pooler stands between.
    pub fn is_pooled(&self) -> bool {
        self.pooled
    }

    /// Runs single statements: each commits by itself in a straight session, all of them together through a pooler.
    pub async fn run<T>(
        &mut self,
        exchange: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        if !self.pooled {
            return exchange(&mut self.connection).await;
        }
        let mut transaction = self.begin().await?;
        match exchange(&mut transaction).await {
            Ok(value) => {
                transaction.commit().await?;
                Ok(value)
            }
            Err(error) => {
                // Where this fails as well, the first error says more.
                let _ = transaction.rollback().await;
                Err(error)
            }
        }
    }

    /// Begins a transaction.
    pub async fn begin(&mut self) -> Result<Transaction<'_>, sqlx::Error> {
        let pooled = self.pooled;
        let inner = self.connection.begin_with(AssertSqlSafe(self.begin.clone())).await?;
        Ok(Transaction { inner, pooled })
    }

    /// Whether the server still answers.
    pub(super) async fn ping(&mut self) -> Result<(), sqlx::Error> {
        self.connection.ping().await
    }

    /// Takes leave of the server.
    pub(super) async fn close(self) {
        // A courtesy: without it the server notices the closed socket.
        let _ = self.connection.close().await;
    }

    /// The connection of a straight session, for what begins its own transactions.
    pub fn into_connection(self) -> PgConnection {
        self.connection
    }
}

const BEGIN: &str = "begin isolation level read committed";

/// A transaction of several statements; dropped, it is rolled back.
#[derive(Debug)]
pub struct Transaction<'c> {
    inner: sqlx::Transaction<'c, sqlx::Postgres>,
    pooled: bool,
}

impl Transaction<'_> {
    /// Commits it.
    pub async fn commit(mut self) -> Result<(), sqlx::Error> {
        self.close_statements().await?;
        self.inner.commit().await
    }

    /// Rolls it back.
    pub async fn rollback(mut self) -> Result<(), sqlx::Error> {
        self.close_statements().await?;
        self.inner.rollback().await
    }

    /// Before the transaction ends: behind it, this server's connection may be somebody else's.
    async fn close_statements(&mut self) -> Result<(), sqlx::Error> {
        if self.pooled { self.inner.clear_cached_statements().await } else { Ok(()) }
    }
}

impl Deref for Transaction<'_> {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.inner
    }
}

impl DerefMut for Transaction<'_> {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.inner
    }
}
