//! Setup: what a caretaker is made of.

use std::sync::Arc;
use std::time::Duration;

use crate::flow::flush::Lane;
use crate::postgres::Database;
use crate::telemetry::contract::Metrics;

/// What a caretaker is made of.
#[derive(Debug, Clone)]
pub struct CaretakerSetup {
    /// PostgreSQL.
    pub database: Database,
    /// The Valkey deployment's name.
    pub source: String,
    /// The stream.
    pub stream: String,
    /// The lanes of all configured pipelines that read it, with their counters.
    pub lanes: Vec<(Lane, Arc<Metrics>)>,
    /// How long settled entries stay.
    pub retention: Duration,
    /// How often it trims.
    pub trim_every: Duration,
    /// How old ledger rows are when they lose their digests.
    pub compact_margin: Duration,
    /// How often it merges ledger rows.
    pub compact_every: Duration,
}
