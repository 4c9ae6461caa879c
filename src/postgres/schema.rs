//! The database's schema: what of it is missing, and how it comes there.
//!
//! The migrations are embedded in the binary and recorded in `tidegate.migrations`. They run under an advisory lock, so two
//! that start at once wait for each other; they only add, so the workers of the version before go on meanwhile.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migration, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Row};

use crate::failpoint;
use crate::postgres::Endpoint;
use crate::retry::{Fault, advised};

/// A migration may wait for another one, or rewrite a table: far longer than a flush may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// PostgreSQL is out of reach or refuses.
    #[error("{}", advised(.0))]
    Fault(#[from] Fault),
    /// A migration failed, or was changed after it had been applied.
    #[error("{0}; nothing of the failed migration was applied")]
    Migration(#[from] MigrateError),
    /// A pooler lends a connection for one transaction; the lock that keeps migrations apart is held for longer.
    #[error(
        "postgres.url leads to a connection pooler, and migrations must not go through one: connect to PostgreSQL itself for \
         `tidegate migrate`"
    )]
    Pooler,
}

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    // A newer version's migrations only add: this one goes on beside them.
    migrator.set_ignore_missing(true);
    migrator
}

/// The migrations that the database lacks, in order.
pub async fn missing(address: &Endpoint) -> Result<Vec<Migration>, Error> {
    let mut session = address.connect().await?;
    let applied = session.run(async |c| applied(c).await).await.map_err(|error| address.fault(error))?;
    session.close().await;
    let changed = |m: &&Migration| applied.get(&m.version).is_some_and(|checksum| *checksum != *m.checksum);
    if let Some(migration) = migrator().iter().find(changed) {
        return Err(MigrateError::VersionMismatch(migration.version).into());
    }
    Ok(migrator().iter().filter(|m| !applied.contains_key(&m.version)).cloned().collect())
}

/// The versions that were applied, with their checksums; none in a database that was never migrated.
async fn applied(connection: &mut PgConnection) -> Result<HashMap<i64, Vec<u8>>, sqlx::Error> {
    let known: bool =
        sqlx::query_scalar("select to_regclass('tidegate.migrations') is not null").fetch_one(&mut *connection).await?;
    if !known {
        return Ok(HashMap::new());
    }
    let rows =
        sqlx::query("select version, checksum from tidegate.migrations where success").fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Applies what is missing; gives how many.
pub async fn apply(address: &Endpoint) -> Result<usize, Error> {
    let address = Endpoint { statement_timeout: STATEMENT_TIMEOUT, lock_timeout: STATEMENT_TIMEOUT, ..address.clone() };
    let count = missing(&address).await?.len();
    if count > 0 {
        let session = address.connect().await?;
        if session.is_pooled() {
            return Err(Error::Pooler);
        }
        let mut connection = session.into_connection();
        failpoint::during("migrate.sent", migrator().run_direct(None, &mut connection, false)).await?;
        let _ = connection.close().await;
    }
    Ok(count)
}
