//! Database: the [`Truth`] by sqlx.
//!
//! Takes where PostgreSQL is and which pipeline; gives snapshots of its table and its ledger, on connections that are used again. Fails in plain words. A
//! standby is refused by its own words: it cannot tell where its log ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::truth::{Standing, Truth, TruthError, View};
use crate::model::entry::EntryId;
use crate::model::pipeline::Pipeline;
use crate::postgres::Endpoint;

/// Opens snapshots of a pipeline's table. Its clones share their connections.
#[derive(Debug, Clone)]
pub struct Database {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    address: Endpoint,
    turns: Arc<Semaphore>,
    idle: Mutex<Vec<PgConnection>>,
    begin: String,
    values: String,
    source: String,
    pipeline: String,
}

impl Database {
    /// `source` is the daemon's `valkey.source`; `connections` is how many are open at once at the most.
    pub fn new(address: Endpoint, source: &str, pipeline: &Pipeline, connections: usize) -> Database {
        let (key, value) = (pipeline.key.quoted(), pipeline.value.quoted());
        let table = pipeline.table.quoted();
        let values = format!(
            "select coalesce(t.{value}, 0)::text from unnest($1::text[]) with ordinality as k (id, n) \
             left join {table} t on t.{key} = k.id order by k.n"
        );
        // Set in the transaction, so that they hold through a pooler, too.
        let begin = format!(
            "begin isolation level repeatable read, read only; set local statement_timeout = {}; set local lock_timeout = {}; \
             set local search_path = public",
            address.statement_timeout.as_millis(),
            address.lock_timeout.as_millis()
        );
        let shared = Shared {
            address,
            turns: Arc::new(Semaphore::new(connections.max(1))),
            idle: Mutex::default(),
            begin,
            values,
            source: source.to_owned(),
            pipeline: pipeline.name.clone(),
        };
        Database { shared: Arc::new(shared) }
    }
}

impl Shared {
    fn error(&self, error: sqlx::Error) -> TruthError {
        TruthError(self.address.fault(error))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<PgConnection>> {
        // Whoever held it did nothing but push or pop.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Truth for Database {
    type View = Snapshot;

    async fn view(&self) -> Result<Snapshot, TruthError> {
        // The semaphore is never closed.
        let turn = Arc::clone(&self.shared.turns)
            .acquire_owned()
            .await
            .map_err(|closed| TruthError::lost(closed.to_string()))?;
        loop {
            let idle = self.shared.idle().pop();
            let is_idle = idle.is_some();
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.shared.address.connect().await.map_err(TruthError)?.into_connection(),
            };
            match sqlx::raw_sql(AssertSqlSafe(self.shared.begin.as_str())).execute(&mut connection).await {
                Ok(_) => {
                    let shared = Arc::clone(&self.shared);
                    return Ok(Snapshot { shared, connection: Some(connection), _turn: turn });
                }
                // The server, or what stands between, has closed it meanwhile: so are the others.
                Err(_) if is_idle => self.shared.idle().clear(),
                Err(error) => return Err(self.shared.error(error)),
            }
        }
    }
}

/// A snapshot: a transaction that only reads. Dropped before its end, its connection is closed.
#[derive(Debug)]
pub struct Snapshot {
    shared: Arc<Shared>,
    connection: Option<PgConnection>,
    _turn: OwnedSemaphorePermit,
}

/// Which PostgreSQL this is: its system, and its timeline, which a promotion and a restore change. Refused by a standby.
const LINEAGE: &str = "(select system_identifier from pg_control_system())::text || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8)";

/// Which PostgreSQL this is, and by how many shards a pipeline's counters are divided: what hydrated values belong to.
#[cfg(feature = "daemon")]
pub(crate) async fn lineage(connection: &mut PgConnection, shards: u16) -> Result<String, sqlx::Error> {
    let lineage = sqlx::query_scalar::<_, String>(AssertSqlSafe(format!("select {LINEAGE}")));
    Ok(super::lineage_of(&lineage.fetch_one(connection).await?, shards))
}

const LANE: &str = "(select lane from tidegate.lanes where source = $1 and pipeline = $2 and stream = $3)";

impl Snapshot {
    fn connection(&mut self) -> Result<&mut PgConnection, TruthError> {
        self.connection.as_mut().ok_or_else(|| TruthError::lost("the snapshot has ended"))
    }
}

impl View for Snapshot {
    async fn read(&mut self, stream: &str, ids: &[&str], witness: Option<EntryId>) -> Result<Standing, TruthError> {
        let shared = Arc::clone(&self.shared);
        let standing = format!(
            "select {LINEAGE}, $4::numeric is null or exists (
                 select from tidegate.ledger where lane = {LANE} and ids @> $4::numeric)"
        );
        let connection = self.connection()?;
        let row = sqlx::query(AssertSqlSafe(standing))
            .bind(&shared.source)
            .bind(&shared.pipeline)
            .bind(stream)
            .bind(witness.map(|entry| entry.number().to_string()))
            .persistent(false)
            .fetch_one(&mut *connection)
            .await
            .map_err(|error| shared.error(error))?;
        let (lineage, has_witness) = (
            row.try_get(0).map_err(|error| shared.error(error))?,
            row.try_get(1).map_err(|error| shared.error(error))?,
        );
        let texts: Vec<String> = sqlx::query_scalar(AssertSqlSafe(shared.values.as_str()))
            .bind(ids)
            .persistent(false)
            .fetch_all(connection)
            .await
            .map_err(|error| shared.error(error))?;
        let whole = |text: &String| {
            text.parse()
                .map_err(|_| TruthError::lost(format!("a row holds {text}, which is no whole number of 64 bits")))
        };
        Ok(Standing { values: texts.iter().map(whole).collect::<Result<_, _>>()?, lineage, has_witness })
    }

    async fn holds(&mut self, stream: &str, entries: &[EntryId]) -> Result<Vec<bool>, TruthError> {
        let shared = Arc::clone(&self.shared);
        let statement = format!(
            "select exists (select from tidegate.ledger where lane = {LANE} and ids @> e.id::numeric)
             from unnest($4::text[]) with ordinality as e (id, n) order by e.n"
        );
        let numbers: Vec<String> = entries.iter().map(|entry| entry.number().to_string()).collect();
        sqlx::query_scalar(AssertSqlSafe(statement))
            .bind(&shared.source)
            .bind(&shared.pipeline)
            .bind(stream)
            .bind(numbers)
            .persistent(false)
            .fetch_all(self.connection()?)
            .await
            .map_err(|error| shared.error(error))
    }

    async fn end(mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if sqlx::raw_sql("commit").execute(&mut connection).await.is_ok() {
            self.shared.idle().push(connection);
        }
    }
}
