//! The daemon: configuration, connections, tasks, wait, drain. The only place that spawns.

mod accept;
mod admin;
mod drain;
mod notify;
mod pauses;
mod prepare;
mod presence;
mod report;
mod rooms;
mod supervise;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use self::accept::{Findings, admit};
pub use self::accept::{NotAccepted, in_term};
use self::admin::Admin;
use self::drain::{Drain, Drained, Emptied, drain, until_empty};
use self::notify::Notifier;
use self::prepare::{
    Flow, Places, caretaker_setup, labels, prepare, raise_file_limit, sweeper_setups, try_prepare, worker_setup,
};
pub use self::prepare::{Options, Refusal};
use self::presence::Herald;
use self::report::Reporter;
use self::supervise::{keep, supervise, supervise_soloist};
use crate::care::caretaker::Caretaker;
use crate::care::library::Library;
use crate::care::schedule::Schedule;
use crate::care::sweep::Sweeper;
use crate::care::touched::Touched;
use crate::config::{Change, Config, Loaded, Problems, hide};
use crate::failpoint;
use crate::flow::flush::Lane;
use crate::lanes::Record;
use crate::model::pipeline::Pipeline;
use crate::retry::Fault;
use crate::shutdown::{Hangups, Signals, Stop};
use crate::telemetry::admin::Pages;
use crate::telemetry::contract::Snapshot;
use crate::telemetry::health::Phase;
use crate::telemetry::log;
use crate::telemetry::registry::{Registry, Shard, Shown};

/// How the daemon ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Everything that was held is settled.
    Settled,
    /// Told twice, or out of time: what was held is pending.
    LeftPending,
    /// A task died too often in a row to be started again.
    Died,
    /// The streams are empty, and so many entries were lost upstream: deleted before anybody could flush them.
    Lost(u64),
    /// The streams are empty, and so many entries are dead letters.
    Buried(u64),
    /// The streams are not empty, and waiting does not help, or has not helped for so long.
    Stuck(Option<Fault>),
}

/// Runs the daemon until a signal, or until the stream is empty. At SIGHUP it goes on with what `reload` gives. `pages`: what it shows of
/// itself on the admin port meanwhile.
pub async fn run(
    loaded: Loaded,
    options: Options,
    pages: Pages,
    reload: impl Fn() -> Result<Loaded, Problems>,
) -> Result<Ending, Refusal> {
    raise_file_limit();
    let (mut signals, mut hangups) = (Signals::listen()?, Hangups::listen()?);
    let places = Places::named_in(&loaded.config)?;
    let registry = pages.registry.clone();
    // Before anything else: while it waits for a server it is live, and has not started.
    let mut admin = Admin::start(&loaded, pages);
    let _notifier = Notifier::start(&registry);
    let (findings, flows) = {
        let preparing = async {
            let findings = admit(&loaded.config, &places.valkey, options, &registry).await?;
            Ok::<_, Refusal>((findings, prepare(&loaded.config, &places, options).await?))
        };
        tokio::select! {
            prepared = preparing => prepared?,
            signal = signals.next() => {
                info!(signal, "stopped before the start");
                return Ok(Ending::Settled);
            }
        }
    };
    let mut running = Running::start(loaded, places, flows, findings, &registry);
    notify::ready(&registry);
    loop {
        let watched = tokio::select! {
            watched = running.watch(options, &mut signals, &mut hangups) => watched,
            () = admin.died() => Watched::Died,
        };
        let reason = match watched {
            Watched::Stop(reason) => reason,
            Watched::Died => {
                error!(
                    "a task died too often in a row: ending, for whoever supervises this process to start another one"
                );
                running.stop(&mut signals, Drain::ToStop).await;
                return Ok(Ending::Died);
            }
            Watched::Stuck(fault) => {
                let why = fault.as_ref().map_or_else(|| "nothing was settled for a while".into(), Fault::to_string);
                error!(why, "giving up: what is not settled stays in Valkey");
                running.stop(&mut signals, Drain::ToStop).await;
                return Ok(Ending::Stuck(fault));
            }
            Watched::Hangup => {
                notify::reloading();
                let Some(mut loaded) = running.next(&reload, options).await else {
                    notify::ready(&registry);
                    continue;
                };
                tell_changes(&running.loaded, &loaded);
                // It was started with the process.
                loaded.config.telemetry = running.loaded.config.telemetry.clone();
                log::set_level(&loaded.config.log.level);
                admin.follow(&loaded);
                failpoint::reached("reload.read");
                match running.stop(&mut signals, Drain::ToReload).await {
                    // What could not be settled in time stays pending: the new configuration's workers take it up.
                    Drained::Settled | Drained::OutOfTime => {}
                    Drained::Signalled(signal) => {
                        info!(event = "stopped", reason = signal, phase = "settled", "stopped");
                        return Ok(Ending::Settled);
                    }
                    Drained::SignalledTwice => return Ok(Ending::LeftPending),
                }
                running = running.followed_by(loaded, options).await?;
                admin.follow(&running.loaded);
                log::set_level(&running.loaded.config.log.level);
                notify::ready(&registry);
                failpoint::reached("reload.started");
                continue;
            }
        };
        info!(reason, "stopping: reading no more, settling what is held");
        failpoint::reached("stop.asked");
        return Ok(match running.stop(&mut signals, Drain::ToStop).await {
            Drained::Settled => {
                info!(event = "stopped", phase = "settled", "stopped");
                if options.until_empty { running.result() } else { Ending::Settled }
            }
            _ => {
                warn!(
                    event = "stopped",
                    phase = "left pending",
                    "stopped; what was held is delivered again, and recognised where it was flushed"
                );
                Ending::LeftPending
            }
        });
    }
}

/// The daemon at work with one configuration.
struct Running {
    loaded: Loaded,
    places: Places,
    flows: Vec<Flow>,
    registry: Registry,
    findings: Findings,
    reporter: Reporter,
    herald: Herald,
    stop: Stop,
    workers: JoinSet<()>,
    caretakers: JoinSet<()>,
}

/// Why the watch over a running daemon ended.
enum Watched {
    Stop(&'static str),
    Stuck(Option<Fault>),
    Died,
    Hangup,
}

impl Running {
    fn start(loaded: Loaded, places: Places, flows: Vec<Flow>, findings: Findings, registry: &Registry) -> Running {
        let config = &loaded.config;
        let (stop, mut workers, mut caretakers) = (Stop::default(), JoinSet::new(), JoinSet::new());
        for flows in by_caretaker(&flows, places.valkey.is_cluster()) {
            let regrouped = Arc::new(Notify::new());
            let streams = by_stream(&flows);
            let valkey = places.valkey.of_stream(&flows[0].lanes[0].pipeline().stream);
            let first = &flows[0].lanes[0].pipeline().stream;
            let setup = |(stream, lanes): (&str, Vec<_>)| caretaker_setup(config, &places, stream, &lanes);
            let setups: Vec<_> = streams.into_iter().map(setup).collect();
            let care = {
                let (stop, regrouped) = (stop.clone(), regrouped.clone());
                move || {
                    let caretakers = setups.iter().cloned().map(Caretaker::new).collect();
                    Schedule::new(valkey.clone(), caretakers, regrouped.clone()).run(stop.clone())
                }
            };
            caretakers.spawn(keep(format!("caretaker of {first}"), care, stop.clone()));
            for flow in flows {
                for parts in sweeper_setups(config, &places, flow) {
                    let name = format!("sweeper of {}", parts.lane.pipeline().stream);
                    let at = stop.clone();
                    caretakers.spawn(keep(name, move || Sweeper::new(parts.clone()).run(at.clone()), stop.clone()));
                }
                let parts = worker_setup(config, &places, flow, regrouped.clone());
                if parts.is_exclusive() {
                    workers.spawn(supervise_soloist(parts, stop.clone()));
                    continue;
                }
                for slot in 0..config.run.workers {
                    workers.spawn(supervise(slot, parts.clone(), stop.clone()));
                }
            }
        }
        if let (false, Some(flow)) = (config.cache.touched_every.is_zero(), flows.first()) {
            let (valkey, database, every) =
                (places.valkey.clone(), places.database.clone(), config.cache.touched_every);
            let touched = Touched { valkey, database, every, metrics: flow.metrics.clone() };
            let at = stop.clone();
            caretakers.spawn(keep("touched rows".into(), move || touched.clone().run(at.clone()), stop.clone()));
        }
        let needs_functions =
            !config.cache.touched_every.is_zero() || config.pipelines.iter().any(Pipeline::is_managed);
        if places.valkey.is_cluster() && needs_functions {
            let (valkey, at) = (places.valkey.clone(), stop.clone());
            caretakers.spawn(keep("functions".into(), move || Library::of(&valkey).run(at.clone()), stop.clone()));
        }
        let shard = |flow: &Flow| {
            let labels = labels(&flow.pipeline, config.telemetry.per_stream);
            Shard { labels, metrics: flow.metrics.clone(), streams: flow.lanes.len() }
        };
        let stuck_after = stuck_after(config, &places, flows.len());
        registry.at_work(
            flows.iter().map(shard).collect(),
            turns_waiting(&flows),
            places.database.clone(),
            stuck_after,
        );
        info!(
            event = "running", workers = config.run.workers, pipelines = flows.len(), valkey = %shown(&config.valkey.url),
            postgres = %shown(&config.postgres.url), version = env!("CARGO_PKG_VERSION"), "running"
        );
        let reporter = Reporter::new(&places.valkey, &places.database, registry, &flows);
        let herald = Herald::new(&places, &flows, config.run.workers, &findings);
        let registry = registry.clone();
        Running { places, flows, registry, findings, reporter, herald, stop, workers, caretakers, loaded }
    }

    /// Watches until there is something to be done.
    async fn watch(&mut self, options: Options, signals: &mut Signals, hangups: &mut Hangups) -> Watched {
        let mut reports = std::pin::pin!(self.reporter.run(&self.flows));
        let mut presence = std::pin::pin!(self.herald.run(&self.flows));
        let mut rooms = std::pin::pin!(rooms::watch(&self.places.valkey, &self.flows, &self.findings));
        let source = &self.loaded.config.valkey.source;
        let mut pauses = std::pin::pin!(pauses::watch(&self.places.database, source, &self.flows));
        let mut findings = std::pin::pin!(self.findings.watch());
        let empty = until_empty(&self.places.valkey, &self.flows, options);
        let mut empty = std::pin::pin!(empty);
        tokio::select! {
            signal = signals.next() => Watched::Stop(signal),
            () = hangups.next() => Watched::Hangup,
            emptied = &mut empty => match emptied {
                Emptied::Settled => Watched::Stop("everything is settled"),
                Emptied::Stuck(fault) => Watched::Stuck(fault),
            },
            never = &mut reports => match never {},
            never = &mut presence => match never {},
            never = &mut rooms => match never {},
            never = &mut pauses => match never {},
            never = &mut findings => match never {},
            // Without a stop they end only where they have given up.
            _ = self.workers.join_next() => Watched::Died,
            _ = self.caretakers.join_next() => Watched::Died,
        }
    }

    /// What to go on with; nothing if that is not fit to be gone on with. Nothing is registered yet: the flows at work still are.
    async fn next(&self, reload: impl Fn() -> Result<Loaded, Problems>, options: Options) -> Option<Loaded> {
        let checked = async {
            let loaded = reload()?;
            Findings::may_follow(&self.loaded.config.accepted, &loaded.config.accepted)?;
            let places = Places::named_in(&loaded.config)?;
            try_prepare(&loaded.config, &places, Options { migrate: false, ..options }, Record::No).await?;
            Ok(loaded)
        };
        match checked.await {
            Ok(loaded) => Some(loaded),
            Err::<_, Refusal>(refusal) => {
                self.registry.reloaded(false);
                error!(event = "reload_refused", %refusal, "the configuration cannot be used: going on with the one before");
                None
            }
        }
    }

    /// The daemon with another configuration, after this one was stopped; with this one again if the other is refused now.
    async fn followed_by(self, loaded: Loaded, options: Options) -> Result<Running, Refusal> {
        let options = Options { migrate: false, ..options };
        let accepted = self.loaded.config.accepted.clone();
        let places = Places::named_in(&loaded.config)?;
        let (loaded, places, mut flows) = match try_prepare(&loaded.config, &places, options, Record::Yes).await {
            Ok(flows) => {
                self.registry.reloaded(true);
                (loaded, places, flows)
            }
            Err(refusal) => {
                self.registry.reloaded(false);
                error!(event = "reload_refused", %refusal, "the configuration cannot be used: going on with the one before");
                let flows = prepare(&self.loaded.config, &self.places, options).await?;
                (self.loaded, self.places, flows)
            }
        };
        self.findings.follow(&accepted, &loaded.config.accepted);
        for flow in &mut flows {
            let before = self.flows.iter().find(|before| before.lanes[0].id() == flow.lanes[0].id());
            if let Some(before) = before {
                // What was counted goes on, and so does what is known of the table.
                (flow.metrics, flow.refusals) = (before.metrics.clone(), before.refusals.clone());
            }
        }
        Ok(Running::start(loaded, places, flows, self.findings, &self.registry))
    }

    /// Stops in two phases.
    async fn stop(&mut self, signals: &mut Signals, reason: Drain) -> Drained {
        self.stop.ask();
        if reason == Drain::ToStop {
            self.registry.enter(Phase::Stopping);
            notify::stopping();
        }
        let grace = self.loaded.config.stop.grace;
        let drained = drain(grace, signals, reason, &self.stop, &mut self.workers, &mut self.caretakers).await;
        self.places.database.close().await;
        self.herald.finish(&self.flows).await;
        self.reporter.finish(&self.flows).await;
        drained
    }

    /// How it came out, where everything is settled.
    fn result(&self) -> Ending {
        let sum = |of: fn(&Snapshot) -> u64| self.flows.iter().map(|flow| of(&flow.metrics.snapshot())).sum::<u64>();
        match (sum(|now| now.lost_unflushed), sum(|now| now.buried)) {
            (0, 0) => Ending::Settled,
            (0, buried) => Ending::Buried(buried),
            (lost, _) => Ending::Lost(lost),
        }
    }
}

/// Flows that read the same streams are taken care of together; and those of the same pipeline, where one server has all its streams.
fn by_caretaker(flows: &[Flow], is_cluster: bool) -> Vec<Vec<&Flow>> {
    let mut together: Vec<Vec<&Flow>> = Vec::new();
    for flow in flows {
        let shares = |other: &&Flow| {
            let reads = |lane: &Lane| flow.lanes.iter().any(|own| own.pipeline().stream == lane.pipeline().stream);
            !is_cluster && other.pipeline.name == flow.pipeline.name || other.lanes.iter().any(reads)
        };
        let (mut joined, others): (Vec<_>, Vec<_>) = together.into_iter().partition(|flows| flows.iter().any(shares));
        joined.push(vec![flow]);
        together = others;
        together.push(joined.into_iter().flatten().collect());
    }
    together
}

/// The lanes of each stream.
fn by_stream<'a>(flows: &[&'a Flow]) -> BTreeMap<&'a str, Vec<(&'a Lane, &'a Flow)>> {
    let mut streams: BTreeMap<&str, Vec<(&Lane, &Flow)>> = BTreeMap::new();
    for flow in flows {
        for lane in flow.lanes.iter() {
            streams.entry(&lane.pipeline().stream).or_default().push((lane, flow));
        }
    }
    streams
}

/// How long one step of an actor may last before it counts as stuck: `admin.stuck_after` on top of what it may rightly wait for, which is
/// its turn behind all others and the time-outs of its own exchanges.
fn stuck_after(config: &Config, places: &Places, shards: usize) -> Duration {
    let actors = shards * config.run.workers;
    let turns = actors.div_ceil(places.database.most_connections()) + config.run.workers + 1;
    let exchange = places.database.longest_exchange() + config.valkey.command_timeout;
    config.admin.stuck_after + exchange * u32::try_from(turns).unwrap_or(u32::MAX)
}

/// How many flushes wait, of each turn: several lanes may share one.
fn turns_waiting(flows: &[Flow]) -> Vec<Shown> {
    let mut turns: Vec<Shown> = Vec::new();
    for flow in flows {
        let waiting = flow.lanes[0].turn().waiting();
        if !turns.iter().any(|known| Arc::ptr_eq(known, waiting)) {
            turns.push(waiting.clone());
        }
    }
    turns
}

/// Tells what a reload changes, and what of it only a restart does.
fn tell_changes(before: &Loaded, after: &Loaded) {
    let (later, now): (Vec<_>, Vec<_>) = before.changes(after).into_iter().partition(|change| change.needs_restart());
    let listed = |changes: &[Change]| changes.iter().map(Change::to_string).collect::<Vec<_>>().join("; ");
    info!(
        event = "reloaded", changes = %listed(&now), after_restart = %listed(&later),
        "the configuration was read again: settling what is held, then going on with it"
    );
}

/// A url as it may be shown: without its password.
fn shown(url: &Option<SecretString>) -> String {
    url.as_ref().map_or_else(String::new, |url| hide(url.expose_secret()))
}
