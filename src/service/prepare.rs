//! Prepare: makes sure of everything that the daemon needs before it starts.
//!
//! Takes the configuration; gives the flows that can be started, each with its lane in the ledger. Fails with a [`Refusal`] that
//! says what to do; waits for a PostgreSQL that is out of reach.

use std::sync::Arc;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::care::caretaker::CaretakerSetup;
use crate::config::{Config, Faults};
use crate::flow::flush::Lane;
use crate::flow::read::{self, Limits};
use crate::flow::worker::WorkerSetup;
use crate::lanes::{self, Identity};
use crate::postgres::{Database, schema};
use crate::retry::{Fault, Incident, Verdict};
use crate::target::{self, Checked, Unfit};
use crate::telemetry::contract::Metrics;
use crate::valkey::{self, Link};

/// What is asked of this run of the daemon.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Stop when everything is settled.
    pub until_empty: bool,
    /// Migrate the database first.
    pub migrate: bool,
    /// Start although Valkey may evict the stream.
    pub accept_eviction: bool,
}

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The schema is not there, or is older.
    #[error("the database lacks {0} migrations: run `tidegate migrate`, or start with `tidegate run --migrate`")]
    NotMigrated(usize),
    /// The migration failed.
    #[error("{0}")]
    Migration(#[from] schema::Error),
    /// A pipeline's table does not fit.
    #[error("{0}")]
    Table(#[from] Unfit),
    /// A pipeline seems to have a new name.
    #[error("{0}")]
    Renamed(String),
    /// Valkey would throw the stream away to make room.
    #[error(
        "this Valkey evicts any key when its memory is full (maxmemory-policy {0}), undelivered entries included: set \
         noeviction or a volatile-* policy, or start with --accept-eviction"
    )]
    Evicting(String),
    /// A server's place is not configured.
    #[error("{0}")]
    Config(#[from] Faults),
    /// A server refuses.
    #[error("{0}: {1}")]
    Fault(Fault, &'static str),
    /// The operating system refuses.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// A worker has two sockets, a caretaker one: with many pipelines that is more than the 1,024 files many systems begin with.
pub(super) fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // If it is refused, the workers that find no socket say so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Where the two servers are.
pub(super) struct Places {
    pub(super) valkey: valkey::Endpoint,
    pub(super) database: Database,
}

impl Places {
    pub(super) fn named_in(config: &Config) -> Result<Places, Faults> {
        let database = Database::new(config.postgres.address()?, config.postgres.connections);
        Ok(Places { valkey: config.valkey.address()?, database })
    }
}

/// One pipeline, ready to flow.
pub(super) struct Flow {
    pub(super) lane: Lane,
    pub(super) metrics: Arc<Metrics>,
}

/// Makes sure that the database is what the daemon needs; waits for one that is out of reach.
pub(super) async fn prepare(config: &Config, places: &Places, options: Options) -> Result<Vec<Flow>, Refusal> {
    // Out of reach, or not allowed to say: the workers will meet it, and tell.
    if let Ok(link) = Link::open(&places.valkey, "tidegate:start").await
        && let Ok(Some(policy)) = read::evicts_anything(&link).await
        && !options.accept_eviction
    {
        return Err(Refusal::Evicting(policy));
    }
    let mut incident = Incident::default();
    loop {
        let fault = match try_prepare(config, &places.database, options).await {
            Err(Refusal::Fault(fault, _) | Refusal::Migration(schema::Error::Fault(fault))) => fault,
            done => return done,
        };
        let response = incident.met(&fault, Instant::now());
        if response.judgement.verdict != Verdict::Retry {
            return Err(Refusal::Fault(fault, response.judgement.advice));
        }
        if response.tell {
            warn!(%fault, advice = response.judgement.advice, "cannot start yet");
        }
        tokio::time::sleep(response.wait).await;
    }
}

pub(super) async fn try_prepare(config: &Config, database: &Database, options: Options) -> Result<Vec<Flow>, Refusal> {
    let postgres = database.address();
    if options.migrate {
        let applied = schema::apply(postgres).await?;
        info!(applied, "the database is migrated");
    }
    let missing = schema::missing(postgres).await?.len();
    if missing > 0 {
        return Err(Refusal::NotMigrated(missing));
    }
    let refused = |fault| Refusal::Fault(fault, "");
    let mut flows = Vec::new();
    for pipeline in &config.pipelines {
        let source = &config.valkey.source;
        let form = match database.run(async |c| target::check_table(c, pipeline).await).await.map_err(refused)? {
            Checked::Fits(form) => form,
            Checked::Unfit(unfit) => return Err(Refusal::Table(unfit)),
        };
        let namesake = database.run(async |c| lanes::namesake(c, source, pipeline).await).await.map_err(refused)?;
        if let Some(before) = namesake.filter(|name| !config.pipelines.iter().any(|p| p.name == *name)) {
            return Err(Refusal::Renamed(schema::renamed(pipeline, &before)));
        }
        let identity = Identity::of(source, pipeline);
        let id = database.run(async |c| lanes::lane(c, &identity).await).await.map_err(refused)?;
        flows.push(Flow { lane: Lane::new(pipeline.clone(), id, identity, &form), metrics: Arc::default() });
    }
    Ok(flows)
}

pub(super) fn worker_setup(config: &Config, places: &Places, flow: &Flow, regrouped: Arc<Notify>) -> WorkerSetup {
    WorkerSetup {
        valkey: places.valkey.clone(),
        database: places.database.clone(),
        lane: flow.lane.clone(),
        limits: Limits {
            max_entries: config.batch.max_entries,
            max_bytes: config.batch.max_bytes,
            read_count: config.batch.read_count,
            max_entry_bytes: config.batch.max_entry_bytes,
        },
        dead_after: config.reclaim.dead_after,
        sweep_every: config.reclaim.sweep_every,
        max_deliveries: config.reclaim.max_deliveries,
        metrics: flow.metrics.clone(),
        regrouped,
    }
}

pub(super) fn caretaker_setup(
    config: &Config,
    places: &Places,
    stream: &str,
    flows: &[&Flow],
    regrouped: Arc<Notify>,
) -> CaretakerSetup {
    CaretakerSetup {
        valkey: places.valkey.clone(),
        database: places.database.clone(),
        source: config.valkey.source.clone(),
        stream: stream.to_owned(),
        lanes: flows.iter().map(|flow| (flow.lane.clone(), flow.metrics.clone())).collect(),
        retention: config.trim.retention,
        trim_every: config.trim.every,
        compact_margin: config.compact.margin,
        compact_every: config.compact.every,
        regrouped,
    }
}
