//! Truth: how the reading side asks PostgreSQL, whatever library does it.
//!
//! A hydration asks two questions of one snapshot: what the rows' values are, and, if increments arrived meanwhile, which of their entries the ledger
//! holds. Both answers must come from the same snapshot (repeatable read), or an increment is counted twice or not at all. With the feature `postgres`
//! [`super::postgres::Database`] does all of it; the statements that another implementation needs are in docs/reading.md.

use crate::model::entry::EntryId;
use crate::retry::Fault;

/// Opens snapshots of the primary. A standby must be refused: it may lag.
pub trait Truth: Send + Sync {
    /// A snapshot.
    type View: View;

    /// Opens a snapshot.
    fn view(&self) -> impl Future<Output = Result<Self::View, TruthError>> + Send;
}

/// One snapshot of PostgreSQL. Dropped, it is ended.
pub trait View: Send {
    /// Reads the rows of these counters, and where this PostgreSQL stands: does its ledger hold `witness`, an entry of `stream` that Valkey knows to be
    /// settled? Where there is none, it does.
    fn read(
        &mut self,
        stream: &str,
        ids: &[&str],
        witness: Option<EntryId>,
    ) -> impl Future<Output = Result<Standing, TruthError>> + Send;

    /// Which of these entries of `stream` the ledger holds, in their order.
    fn holds(
        &mut self,
        stream: &str,
        entries: &[EntryId],
    ) -> impl Future<Output = Result<Vec<bool>, TruthError>> + Send;

    /// Ends the snapshot, so that its connection can be used again.
    fn end(self) -> impl Future<Output = ()> + Send;
}

/// What a snapshot tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The values of the rows asked for, in their order; 0 where there is none.
    pub values: Vec<i64>,
    /// Which PostgreSQL this is: `system identifier/timeline`. Another one after a promotion or a restore.
    pub lineage: String,
    /// Whether its ledger holds the witness.
    pub has_witness: bool,
}

/// Why PostgreSQL could not be asked: what it refused, or that it did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TruthError(pub Fault);

impl TruthError {
    /// It did not answer, in these words, or what it answered cannot be understood.
    pub fn lost(words: impl Into<String>) -> TruthError {
        TruthError(Fault::PostgresLost(words.into()))
    }
}

/// For applications that only add to counters and never ask for a value: nothing is ever brought from PostgreSQL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoTruth;

impl Truth for NoTruth {
    type View = NoTruth;

    async fn view(&self) -> Result<NoTruth, TruthError> {
        Err(TruthError::lost("this client was made without a way to PostgreSQL"))
    }
}

impl View for NoTruth {
    async fn read(&mut self, _: &str, _: &[&str], _: Option<EntryId>) -> Result<Standing, TruthError> {
        Err(TruthError::lost("this client was made without a way to PostgreSQL"))
    }

    async fn holds(&mut self, _: &str, _: &[EntryId]) -> Result<Vec<bool>, TruthError> {
        Err(TruthError::lost("this client was made without a way to PostgreSQL"))
    }

    async fn end(self) {}
}
