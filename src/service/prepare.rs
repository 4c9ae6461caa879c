//! Prepare: makes sure of everything that the daemon needs before it starts.
//!
//! Takes the configuration; gives the flows that can be started, each with its lane in the ledger. Fails with a [`Refusal`] that
//! says what to do; waits for a PostgreSQL that is out of reach.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;
use tracing::{info, warn};

use super::accept::NotAccepted;
use super::pauses;
use super::presence::this_process;
use crate::care::setup::CaretakerSetup;
use crate::care::sweep::{Standings, SweeperSetup};
use crate::config::{Config, Problems};
use crate::flow::bisect::Refusals;
use crate::flow::flush::{Lane, Statements};
use crate::flow::lease::Shares;
use crate::flow::pause::Pause;
use crate::flow::read::Limits;
use crate::flow::reclaim::Patience;
use crate::flow::rows::NoZone;
use crate::flow::setup::WorkerSetup;
use crate::flow::source;
use crate::flow::turn::Turn;
use crate::lanes::{self, Identity, Record, Unregistered};
use crate::model::names;
use crate::model::pipeline::{Delivery, Mode, Pipeline, Shard};
use crate::postgres::{Database, place, schema};
use crate::presence::{self, Presence};
use crate::retry::{Fault, Incident, Verdict, advised};
use crate::target::{self, Unfit, Writing};
use crate::telemetry::contract::Metrics;
use crate::telemetry::recorder::Labels;
use crate::valkey::{self, Link, Links, info};

/// What is asked of this run of the daemon.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Stop when everything is settled.
    pub until_empty: bool,
    /// Migrate the database first.
    pub migrate: bool,
    /// With `until_empty`: how long to wait for a server, or for anything to be settled, before giving up.
    pub timeout: Duration,
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
    /// A managed counter is brought back from its row and the ledger as of one moment, which a distributed table does not have.
    #[error(
        "pipeline {0} is managed, and its table is distributed over servers: a reader may see one server's part of a flush before another's, and then \
         a counter would be brought back wrong. Write mode = \"plain\", or use a table of one server"
    )]
    DistributedOfManaged(String),
    /// A time zone of its keys is not known here.
    #[error(transparent)]
    Zone(#[from] NoZone),
    /// In a cluster a managed counter and its stream are changed by one function: they must be on one server.
    #[error(
        "pipeline {0} is managed, and in a cluster its stream {1} and its counters {2} lie in different slots: give the stream a hash tag, \
         such as {{{1}}}, or the pipeline several shards"
    )]
    SlotsOfManaged(String, String, String),
    /// The ledger tells of another configuration.
    #[error("{0}")]
    Unregistered(#[from] Unregistered),
    /// Daemons at work on a pipeline flush into another PostgreSQL: each would get a part of the increments.
    #[error(
        "pipeline {pipeline} is being flushed by {process} into another PostgreSQL (system identifier and database {there}; this one is {here}): each would \
         have a part of the increments. Correct postgres.url; or, if it is to be flushed into this one from now on, stop all daemons that flush into the other one first"
    )]
    OtherPostgres {
        /// The pipeline.
        pipeline: String,
        /// One of those daemons.
        process: String,
        /// Where it flushes into.
        there: String,
        /// Where this one would.
        here: String,
    },
    /// Valkey would have no connections left for anybody else.
    #[error(
        "{streams} streams that are read each by itself take {needed} connections to Valkey, and it allows {allowed} in all (maxclients), of which one \
         process may take half: set delivery = \"exclusive\" where Valkey is no cluster, fewer shards or run.workers, or raise maxclients"
    )]
    TooManyConnections {
        /// Streams with workers of their own.
        streams: usize,
        /// What their workers take.
        needed: usize,
        /// What all primaries allow together.
        allowed: usize,
    },
    /// Data may be lost, and the configuration does not accept that, or no longer, or for too long.
    #[error("{0}")]
    NotAccepted(#[from] NotAccepted),
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

/// What the same workers read, ready to flow: all shards of a pipeline where each is read alone, else one of them.
pub(super) struct Flow {
    /// The pipeline, or as much of it as one shard is.
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) lanes: Arc<[Lane]>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) refusals: Arc<Mutex<Refusals>>,
    pub(super) shares: Arc<Shares>,
    pub(super) pause: Pause,
    /// How many shards the whole pipeline has.
    pub(super) shards: u16,
}

impl Flow {
    fn new(pipeline: &Pipeline, lanes: Vec<Lane>, shards: u16, metrics: Arc<Metrics>, pause: Pause) -> Flow {
        Flow {
            pipeline: Arc::new(pipeline.clone()),
            metrics,
            refusals: Arc::default(),
            pause,
            shares: Arc::new(Shares::of(lanes.len())),
            lanes: lanes.into(),
            shards,
        }
    }
}

/// Makes sure that the database is what the daemon needs; waits for one that is out of reach.
pub(super) async fn prepare(config: &Config, places: &Places, options: Options) -> Result<Vec<Flow>, Refusal> {
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

/// One for reading and one for all else.
const CONNECTIONS_OF_A_WORKER: usize = 2;
/// From so many connections on it is asked how many the server allows.
const WORTH_ASKING_FROM: usize = 32;

/// Makes sure that the workers leave enough connections to everybody else. A server that does not say is none that refuses.
async fn check_connections(config: &Config, valkey: &valkey::Endpoint) -> Result<(), Refusal> {
    let is_alone = |pipeline: &&Pipeline| pipeline.delivery == Delivery::Group || valkey.is_cluster();
    let streams = |pipeline: &Pipeline| usize::from(pipeline.shards);
    let workers = |pipeline: &Pipeline| if pipeline.delivery == Delivery::Group { config.run.workers } else { 1 };
    let alone = || config.pipelines.iter().filter(is_alone);
    let needed: usize = alone().map(|pipeline| streams(pipeline) * workers(pipeline) * CONNECTIONS_OF_A_WORKER).sum();
    if needed < WORTH_ASKING_FROM {
        return Ok(());
    }
    let allowed = allowed_connections(valkey).await.unwrap_or(usize::MAX);
    if needed > allowed / 2 {
        return Err(Refusal::TooManyConnections { streams: alone().map(streams).sum(), needed, allowed });
    }
    Ok(())
}

/// How many connections all primaries together allow.
async fn allowed_connections(valkey: &valkey::Endpoint) -> Result<usize, Fault> {
    let mut allowed = 0;
    for primary in valkey.homes().await? {
        let link = Link::open(&valkey.at(&primary), "tidegate:start").await?;
        allowed += info::most_clients(link.commands()).await?;
    }
    Ok(allowed)
}

/// Checks everything once. `record`: whether the lanes are registered, too.
pub(super) async fn try_prepare(
    config: &Config,
    places: &Places,
    options: Options,
    record: Record,
) -> Result<Vec<Flow>, Refusal> {
    check_connections(config, &places.valkey).await?;
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
    let mut links = Links::to(&places.valkey, "tidegate:start");
    let here = place(database).await;
    let (mut flows, mut turns) = (Vec::new(), HashMap::new());
    for pipeline in &config.pipelines {
        let fits = database.run(async |c| target::check_tables(c, pipeline).await).await.map_err(Refusal::Fault)??;
        if pipeline.is_managed() && fits[0].is_grouped {
            return Err(Refusal::KeyOfManaged(pipeline.name.clone(), fits[0].keys[0].clone()));
        }
        if pipeline.is_managed() && fits[0].writing == Writing::UpsertAlone {
            return Err(Refusal::DistributedOfManaged(pipeline.name.clone()));
        }
        if places.valkey.is_cluster() && pipeline.is_managed() && !pipeline.is_in_one_slot() {
            let (stream, counter) = (pipeline.stream_of(0), pipeline.counter_of("…"));
            return Err(Refusal::SlotsOfManaged(pipeline.name.clone(), stream, counter));
        }
        let source = &config.valkey.source;
        let shards = database.run(async |c| lanes::shards(c, source, pipeline).await).await.map_err(Refusal::Fault)?;
        let (statements, pause) = (Statements::of(pipeline, &fits)?, Pause::default());
        // What one worker reads of many streams it counts together. In a cluster each stream may be on another server.
        let is_together = pipeline.delivery == Delivery::Exclusive && !places.valkey.is_cluster();
        let (mut lanes, per_stream) = (Vec::new(), config.telemetry.per_stream);
        let together = is_together.then(|| Arc::new(Metrics::of(labels(pipeline, per_stream))));
        let identities: Vec<Identity> = shards.iter().map(|shard| Identity::of(source, shard)).collect();
        known_by_its_name(&mut links, database, &shards, &identities).await?;
        if let Some(here) = &here {
            flushed_into_one(&mut links, &shards[0], here).await?;
        }
        let remapped = database.run(async |c| lanes::remapped(c, &identities).await).await.map_err(Refusal::Fault)?;
        let mut others_alive = BTreeSet::new();
        for n in remapped {
            if others_are_alive(&mut links, &shards[n], config.reclaim.dead_after).await {
                others_alive.insert(n);
            }
        }
        let register = async |c: &mut _| lanes::register(c, &identities, &others_alive, record).await;
        let ids = database.run(register).await.map_err(Refusal::Fault)??;
        for ((shard, identity), id) in shards.into_iter().zip(identities).zip(ids) {
            let number = names::shard_number(&pipeline.stream, &shard.stream);
            let turn: &Turn =
                turns.entry((&pipeline.table, number)).or_insert_with(|| Turn::of(&pipeline.table, number));
            let (shards, letter_bytes) = (pipeline.shards, config.dead_letters.max_bytes);
            let mut pipeline = Pipeline::clone(&shard.pipeline);
            // A stream from when there was another number of shards: nobody could manage counters beside it.
            if places.valkey.is_cluster() && !pipeline.is_in_one_slot() {
                pipeline.mode = Mode::Plain;
            }
            let metrics = match &together {
                Some(metrics) => Arc::clone(metrics),
                None => Arc::new(Metrics::of(labels(&pipeline, per_stream))),
            };
            let turn = turn.of_lane(metrics.clone());
            let lane = Lane::new(pipeline, statements.clone(), id, identity, turn, letter_bytes);
            match &together {
                Some(_) => lanes.push(lane),
                None => {
                    let pipeline = lane.pipeline().clone();
                    flows.push(Flow::new(&pipeline, vec![lane], shards, metrics, pause.clone()));
                }
            }
        }
        if let Some(metrics) = together {
            flows.push(Flow::new(pipeline, lanes, pipeline.shards, metrics, pause));
        }
    }
    // Before a worker reads: it may have been paused while no daemon was there.
    pauses::look(database, &config.valkey.source, &flows).await;
    Ok(flows)
}

/// Makes sure that no stream is flushed under another name of its Valkey, or was: the ledger would not know what it holds.
async fn known_by_its_name(
    links: &mut Links,
    database: &Database,
    shards: &[Shard],
    identities: &[Identity],
) -> Result<(), Refusal> {
    let refusal = |n: usize, before: String| {
        let Identity { source, pipeline, stream, .. } = identities[n].clone();
        Refusal::Unregistered(Unregistered::OtherSource { pipeline, stream, before, now: source })
    };
    // Each server is asked once who is connected: with many streams that must not become its work.
    let mut strangers: HashMap<String, Vec<source::Stranger>> = HashMap::new();
    for (n, (shard, identity)) in shards.iter().zip(identities).enumerate() {
        // Where Valkey is out of reach nobody is seen.
        let server = links.look(&shard.stream, async |link| Ok(link.generation().run_id.clone())).await;
        let Ok(server) = server else { break };
        if !strangers.contains_key(&server) {
            let look = async |link: &Link| source::strangers(link, &identity.pipeline, &identity.source).await;
            let Ok(told) = links.look(&shard.stream, look).await else { break };
            strangers.insert(server.clone(), told);
        }
        let strangers = strangers.get(&server).filter(|strangers| !strangers.is_empty());
        let Some(strangers) = strangers else { continue };
        let look = async |link: &Link| source::of_the_living(link, shard, strangers).await;
        if let Some(before) = links.look(&shard.stream, look).await.map_err(Refusal::Fault)? {
            return Err(refusal(n, before));
        }
    }
    let others = database.run(async |c| lanes::of_other_sources(c, identities).await).await.map_err(Refusal::Fault)?;
    for others in others.chunk_by(|a, b| a.0 == b.0) {
        let (n, lanes) = (others[0].0, others.iter().map(|(_, lane, name)| (*lane, name.clone())).collect::<Vec<_>>());
        let look = async |link: &Link| source::of_the_ledger(link, database, &shards[n], &lanes).await;
        // Without an answer it must not begin.
        if let Some(before) = links.look(&shards[n].stream, look).await.map_err(Refusal::Fault)? {
            return Err(refusal(n, before));
        }
    }
    Ok(())
}

/// Makes sure that nobody at work on a pipeline flushes it into another PostgreSQL than this. Each daemon speaks beside the first of its streams.
async fn flushed_into_one(links: &mut Links, first: &Shard, here: &str) -> Result<(), Refusal> {
    let look = async |link: &Link| presence::of_the_living(link, first, info::time_ms(link.commands()).await?).await;
    // Where Valkey is out of reach, or does not say, nobody is seen.
    let living = links.look(&first.stream, look).await.unwrap_or_default();
    let own = this_process();
    for Presence { process, postgres, .. } in living.into_iter().filter(|presence| presence.process != own) {
        if let Some(there) = postgres.filter(|there| there != here) {
            // Whoever may write to Valkey may have said it.
            let [process, there] = [process, there].map(|text| text.escape_debug().to_string());
            let (pipeline, here) = (first.pipeline.name.clone(), here.to_owned());
            return Err(Refusal::OtherPostgres { pipeline, process, there, here });
        }
    }
    Ok(())
}

/// What tells a shard's metrics from others'.
pub(super) fn labels(pipeline: &Pipeline, per_stream: bool) -> Labels {
    let Pipeline { name, stream, table, delivery, .. } = pipeline;
    let (pipeline, stream, table) = (name.clone(), stream.clone(), table.to_string());
    Labels { pipeline, stream, table, delivery: delivery.word(), per_stream }
}

/// Whether daemons other than this process are at work on a shard. Where Valkey does not say, none is seen.
async fn others_are_alive(links: &mut Links, shard: &Shard, dead_after: Duration) -> bool {
    let look = async |link: &Link| info::consumers(link.commands(), &shard.stream, &shard.pipeline.group()).await;
    let consumers = links.look(&shard.stream, look).await.unwrap_or_default();
    let own = names::consumers_of(&names::host(), std::process::id());
    consumers.iter().any(|consumer| consumer.idle < dead_after && !consumer.name.starts_with(&own))
}

pub(super) fn worker_setup(config: &Config, places: &Places, flow: &Flow, regrouped: Arc<Notify>) -> WorkerSetup {
    WorkerSetup {
        // Where there are many streams, one server has them all.
        valkey: places.valkey.of_stream(&flow.lanes[0].pipeline().stream),
        database: places.database.clone(),
        pipeline: flow.pipeline.clone(),
        lanes: flow.lanes.clone(),
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
        pause: flow.pause.clone(),
        refusals: flow.refusals.clone(),
        metrics: flow.metrics.clone(),
        regrouped,
    }
}

/// Of each shard of a flow whose counters Tidegate answers for; of none where it does not.
pub(super) fn sweeper_setups(config: &Config, places: &Places, flow: &Flow) -> Vec<SweeperSetup> {
    let managed = || flow.lanes.iter().filter(|lane| lane.pipeline().is_managed());
    let standings = Arc::new(Standings::of(managed().count(), flow.metrics.clone()));
    let setup = |(slot, lane): (usize, &Lane)| SweeperSetup {
        valkey: places.valkey.of_stream(&lane.pipeline().stream),
        database: places.database.clone(),
        lane: lane.clone(),
        shards: flow.shards,
        ttl: config.managed.ttl,
        every: config.managed.sweep_every,
        batch: config.managed.sweep_batch,
        standings: standings.clone(),
        slot,
        metrics: flow.metrics.clone(),
    };
    managed().enumerate().map(setup).collect()
}

pub(super) fn caretaker_setup(
    config: &Config,
    places: &Places,
    stream: &str,
    lanes: &[(&Lane, &Flow)],
) -> CaretakerSetup {
    CaretakerSetup {
        database: places.database.clone(),
        source: config.valkey.source.clone(),
        stream: stream.to_owned(),
        lanes: lanes.iter().map(|(lane, flow)| (Lane::clone(lane), flow.metrics.clone())).collect(),
        retention: config.trim.retention,
        trim_every: config.trim.every,
        compact_margin: config.compact.margin,
        compact_every: config.compact.every,
    }
}
