//! Prepare: makes sure of everything that the daemon needs before it starts.
//!
//! Takes the configuration; gives the flows that can be started, each with its lane in the ledger. Fails with a [`Refusal`] that
//! says what to do; waits for a PostgreSQL that is out of reach.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::care::setup::CaretakerSetup;
use crate::care::sweep::SweeperSetup;
use crate::config::{Config, Problems};
use crate::flow::bisect::Refusals;
use crate::flow::flush::Lane;
use crate::flow::lease::Shares;
use crate::flow::read::{self, Limits};
use crate::flow::reclaim::Patience;
use crate::flow::setup::WorkerSetup;
use crate::flow::turn::Turn;
use crate::lanes::{self, Identity, Record, Unregistered};
use crate::model::names;
use crate::model::pipeline::{Pipeline, Shard};
use crate::postgres::{Database, schema};
use crate::retry::{Fault, Incident, Verdict, advised, judge};
use crate::target::{self, KeyOrder, Unfit};
use crate::telemetry::contract::Metrics;
use crate::valkey::{self, Link, info};

/// What is asked of this run of the daemon.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Stop when everything is settled.
    pub until_empty: bool,
    /// Migrate the database first.
    pub migrate: bool,
    /// With `until_empty`: how long to wait for a server, or for anything to be settled, before giving up.
    pub timeout: Duration,
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
    /// Two counters of Valkey may be one row.
    #[error(
        "pipeline {0} is managed, and its table's key has the type {1}: texts that differ may be the same row, and then a counter would \
         lack the other one's deltas. Use a text column without a collation of its own, or write mode = \"plain\""
    )]
    KeyOfManaged(String, String),
    /// The ledger tells of another configuration.
    #[error("{0}")]
    Unregistered(#[from] Unregistered),
    /// Valkey would throw the stream away to make room.
    #[error(
        "this Valkey evicts any key when its memory is full (maxmemory-policy {0}), undelivered entries included: set \
         noeviction or a volatile-* policy, or start with --accept-eviction"
    )]
    Evicting(String),
    /// A server's place is not configured.
    #[error("{0}")]
    Config(#[from] Problems),
    /// A server refuses.
    #[error("{}", advised(.0))]
    Fault(Fault),
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
    pub(super) fn named_in(config: &Config) -> Result<Places, Problems> {
        let database = Database::new(config.postgres.address()?, config.postgres.connections);
        Ok(Places { valkey: config.valkey.address()?, database })
    }
}

/// One pipeline, ready to flow.
pub(super) struct Flow {
    pub(super) lane: Lane,
    pub(super) metrics: Arc<Metrics>,
    pub(super) refusals: Arc<Mutex<Refusals>>,
    pub(super) shares: Arc<Shares>,
    /// Rung when something of it was acknowledged.
    pub(super) acknowledged: Arc<Notify>,
    /// How many shards its pipeline has.
    pub(super) shards: u16,
}

/// Makes sure that the database is what the daemon needs; waits for one that is out of reach.
pub(super) async fn prepare(config: &Config, places: &Places, options: Options) -> Result<Vec<Flow>, Refusal> {
    match Link::open(&places.valkey, "tidegate:start").await {
        Ok(link) => {
            let policy = read::evicts_anything(&link).await.unwrap_or_default().filter(|_| !options.accept_eviction);
            policy.map_or(Ok(()), |policy| Err(Refusal::Evicting(policy)))?;
        }
        Err(fault) if options.until_empty && judge(&fault, 1).verdict == Verdict::Halt => {
            return Err(Refusal::Fault(fault));
        }
        // Out of reach, or not allowed to say: the workers will meet it, and tell.
        Err(_) => {}
    }
    let (mut incident, began) = (Incident::default(), Instant::now());
    loop {
        let fault = match try_prepare(config, places, options, Record::Yes).await {
            Err(Refusal::Fault(fault) | Refusal::Migration(schema::Error::Fault(fault))) => fault,
            done => return done,
        };
        let response = incident.met(&fault, Instant::now());
        let is_over = options.until_empty && began.elapsed() >= options.timeout;
        if response.judgement.verdict != Verdict::Retry || is_over {
            return Err(Refusal::Fault(fault));
        }
        if incident.is_news(response.judgement.verdict, Instant::now()) {
            warn!(%fault, advice = response.judgement.advice, "cannot start yet");
        }
        tokio::time::sleep(response.wait).await;
    }
}

/// Checks everything once. `record`: whether the lanes are registered, too.
pub(super) async fn try_prepare(
    config: &Config,
    places: &Places,
    options: Options,
    record: Record,
) -> Result<Vec<Flow>, Refusal> {
    let database = &places.database;
    let postgres = database.address();
    if options.migrate {
        let applied = schema::apply(postgres).await?;
        info!(applied, "the database is migrated");
    }
    let missing = schema::missing(postgres).await?.len();
    if missing > 0 {
        return Err(Refusal::NotMigrated(missing));
    }
    let link = Link::open(&places.valkey, "tidegate:start").await.ok();
    let (mut flows, mut turns) = (Vec::new(), HashMap::new());
    for pipeline in &config.pipelines {
        let order = database.run(async |c| target::check_table(c, pipeline).await).await.map_err(Refusal::Fault)??;
        if let (true, KeyOrder::Typed(sql_type)) = (pipeline.is_managed(), &order) {
            return Err(Refusal::KeyOfManaged(pipeline.name.clone(), sql_type.clone()));
        }
        let source = &config.valkey.source;
        let shards = database.run(async |c| lanes::shards(c, source, pipeline).await).await.map_err(Refusal::Fault)?;
        let shares = Arc::new(Shares::of(shards.len()));
        for shard in shards {
            let identity = Identity::of(source, &shard);
            let others_alive = others_are_alive(link.as_ref(), &shard, config.reclaim.dead_after).await;
            let register = async |c: &mut _| lanes::register(c, &identity, others_alive, record).await;
            let id = database.run(register).await.map_err(Refusal::Fault)??;
            let number = names::shard_number(&pipeline.stream, &shard.stream);
            let turn: &Turn =
                turns.entry((&pipeline.table, number)).or_insert_with(|| Turn::of(&pipeline.table, number));
            let shards = pipeline.shards;
            let pipeline = Pipeline::clone(&shard.pipeline);
            flows.push(Flow {
                lane: Lane::new(pipeline, &order, id, identity, turn.of_lane(), config.dead_letters.max_bytes),
                metrics: Arc::default(),
                refusals: Arc::default(),
                shares: shares.clone(),
                acknowledged: Arc::default(),
                shards,
            });
        }
    }
    Ok(flows)
}

/// Whether daemons other than this process are at work on a shard. Where Valkey does not say, none is seen.
async fn others_are_alive(link: Option<&Link>, shard: &Shard, dead_after: Duration) -> bool {
    let Some(link) = link else { return false };
    let consumers = info::consumers(link.commands(), &shard.stream, &shard.pipeline.group()).await.unwrap_or_default();
    let own = names::consumers_of(&names::host(), std::process::id());
    consumers.iter().any(|consumer| consumer.idle < dead_after && !consumer.name.starts_with(&own))
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
            max_letter_bytes: config.dead_letters.max_bytes,
        },
        patience: Patience {
            gone_after: config.reclaim.gone_after,
            dead_after: config.reclaim.dead_after,
            max_deliveries: config.reclaim.max_deliveries,
        },
        sweep_every: config.reclaim.sweep_every,
        settlers: config.run.workers,
        lease: config.exclusive.lease,
        shares: flow.shares.clone(),
        refusals: flow.refusals.clone(),
        metrics: flow.metrics.clone(),
        acknowledged: flow.acknowledged.clone(),
        regrouped,
    }
}

/// Of a shard whose counters Tidegate answers for.
pub(super) fn sweeper_setup(config: &Config, places: &Places, flow: &Flow) -> SweeperSetup {
    SweeperSetup {
        valkey: places.valkey.clone(),
        database: places.database.clone(),
        lane: flow.lane.clone(),
        shards: flow.shards,
        ttl: config.managed.ttl,
        every: config.managed.sweep_every,
        batch: config.managed.sweep_batch,
        acknowledged: flow.acknowledged.clone(),
        metrics: flow.metrics.clone(),
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
