//! The daemon: configuration, connections, tasks, wait, drain. The only place that spawns.

mod drain;
mod prepare;
mod report;
mod supervise;

use std::collections::BTreeMap;
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use self::drain::{Drain, Drained, Emptied, drain, until_empty};
use self::prepare::{
    Flow, Places, caretaker_setup, prepare, raise_file_limit, sweeper_setup, try_prepare, worker_setup,
};
pub use self::prepare::{Options, Refusal};
use self::report::Reporter;
use self::supervise::supervise;
use crate::care::caretaker::Caretaker;
use crate::care::sweep::Sweeper;
use crate::care::touched::Touched;
use crate::config::{Config, Problems, hide};
use crate::failpoint;
use crate::lanes::Record;
use crate::retry::Fault;
use crate::shutdown::{Hangups, Signals, Stop};
use crate::telemetry::contract::Snapshot;

/// How the daemon ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Everything that was held is settled.
    Settled,
    /// Told twice, or out of time: what was held is pending.
    LeftPending,
    /// No worker was alive any more.
    NoWorkers,
    /// The streams are empty, and so many entries were lost upstream: deleted before anybody could flush them.
    Lost(u64),
    /// The streams are empty, and so many entries are dead letters.
    Buried(u64),
    /// The streams are not empty, and waiting does not help, or has not helped for so long.
    Stuck(Option<Fault>),
}

/// Runs the daemon until a signal, or until the stream is empty. At SIGHUP it goes on with what `reload` gives.
pub async fn run(
    config: Config,
    options: Options,
    reload: impl Fn() -> Result<Config, Problems>,
) -> Result<Ending, Refusal> {
    raise_file_limit();
    let (mut signals, mut hangups) = (Signals::listen()?, Hangups::listen()?);
    let places = Places::named_in(&config)?;
    let flows = {
        let preparing = prepare(&config, &places, options);
        tokio::select! {
            flows = preparing => flows?,
            signal = signals.next() => {
                info!(signal, "stopped before the start");
                return Ok(Ending::Settled);
            }
        }
    };
    let mut running = Running::start(config, places, flows);
    loop {
        let reason = match running.watch(options, &mut signals, &mut hangups).await {
            Watched::Stop(reason) => reason,
            Watched::NoWorkers => {
                error!("no worker is alive");
                return Ok(Ending::NoWorkers);
            }
            Watched::Stuck(fault) => {
                let why = fault.as_ref().map_or_else(|| "nothing was settled for a while".into(), Fault::to_string);
                error!(why, "giving up: what is not settled stays in Valkey");
                running.stop(&mut signals, Drain::ToStop).await;
                return Ok(Ending::Stuck(fault));
            }
            Watched::Hangup => {
                let Some(config) = running.next(&reload, options).await else { continue };
                info!(
                    event = "reloaded",
                    "the configuration was read again: settling what is held, then going on with it"
                );
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
                running = running.followed_by(config, options).await?;
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
    config: Config,
    places: Places,
    flows: Vec<Flow>,
    reporter: Reporter,
    stop: Stop,
    workers: JoinSet<()>,
    caretakers: JoinSet<()>,
}

/// Why the watch over a running daemon ended.
enum Watched {
    Stop(&'static str),
    Stuck(Option<Fault>),
    NoWorkers,
    Hangup,
}

impl Running {
    fn start(config: Config, places: Places, flows: Vec<Flow>) -> Running {
        let (stop, mut workers, mut caretakers) = (Stop::default(), JoinSet::new(), JoinSet::new());
        for (stream, flows) in by_stream(&flows) {
            let regrouped = Arc::new(Notify::new());
            let parts = caretaker_setup(&config, &places, stream, &flows, regrouped.clone());
            caretakers.spawn(Caretaker::new(parts).run(stop.clone()));
            for flow in flows {
                if flow.lane.pipeline().is_managed() {
                    caretakers.spawn(Sweeper::new(sweeper_setup(&config, &places, flow)).run(stop.clone()));
                }
                let parts = worker_setup(&config, &places, flow, regrouped.clone());
                // One reads alone, with several settlers.
                let count = if parts.is_exclusive() { 1 } else { config.run.workers };
                for slot in 0..count {
                    let parts = parts.clone();
                    workers.spawn(supervise(slot, parts, stop.clone()));
                }
            }
        }
        if let (false, Some(flow)) = (config.cache.touched_every.is_zero(), flows.first()) {
            let (valkey, database, every) =
                (places.valkey.clone(), places.database.clone(), config.cache.touched_every);
            let touched = Touched { valkey, database, every, metrics: flow.metrics.clone() };
            caretakers.spawn(touched.run(stop.clone()));
        }
        info!(
            event = "running", workers = config.run.workers, pipelines = flows.len(), valkey = %shown(&config.valkey.url),
            postgres = %shown(&config.postgres.url), version = env!("CARGO_PKG_VERSION"), "running"
        );
        let reporter = Reporter::new(&places.valkey, &flows);
        Running { config, places, flows, reporter, stop, workers, caretakers }
    }

    /// Watches until there is something to be done.
    async fn watch(&mut self, options: Options, signals: &mut Signals, hangups: &mut Hangups) -> Watched {
        let mut reports = std::pin::pin!(self.reporter.run(&self.flows));
        let empty = until_empty(&self.places.valkey, &self.flows, options);
        let mut empty = std::pin::pin!(empty);
        loop {
            tokio::select! {
                signal = signals.next() => return Watched::Stop(signal),
                () = hangups.next() => return Watched::Hangup,
                emptied = &mut empty => return match emptied {
                    Emptied::Settled => Watched::Stop("everything is settled"),
                    Emptied::Stuck(fault) => Watched::Stuck(fault),
                },
                never = &mut reports => match never {},
                ended = self.workers.join_next() => if ended.is_none() {
                    return Watched::NoWorkers;
                },
            }
        }
    }

    /// What to go on with; nothing if that is not fit to be gone on with. Nothing is registered yet: the flows at work still are.
    async fn next(&self, reload: impl Fn() -> Result<Config, Problems>, options: Options) -> Option<Config> {
        let checked = async {
            let config = reload()?;
            let places = Places::named_in(&config)?;
            try_prepare(&config, &places, Options { migrate: false, ..options }, Record::No).await?;
            Ok(config)
        };
        match checked.await {
            Ok(config) => Some(config),
            Err::<_, Refusal>(refusal) => {
                error!(event = "reload_refused", %refusal, "the configuration cannot be used: going on with the one before");
                None
            }
        }
    }

    /// The daemon with another configuration, after this one was stopped; with this one again if the other is refused now.
    async fn followed_by(self, config: Config, options: Options) -> Result<Running, Refusal> {
        let options = Options { migrate: false, ..options };
        let places = Places::named_in(&config)?;
        let (config, places, mut flows) = match try_prepare(&config, &places, options, Record::Yes).await {
            Ok(flows) => (config, places, flows),
            Err(refusal) => {
                error!(event = "reload_refused", %refusal, "the configuration cannot be used: going on with the one before");
                let flows = prepare(&self.config, &self.places, options).await?;
                (self.config, self.places, flows)
            }
        };
        for flow in &mut flows {
            let before = self.flows.iter().find(|before| before.lane.id() == flow.lane.id());
            if let Some(before) = before {
                // What was counted goes on, and so does what is known of the table.
                (flow.metrics, flow.refusals) = (before.metrics.clone(), before.refusals.clone());
            }
        }
        Ok(Running::start(config, places, flows))
    }

    /// Stops in two phases.
    async fn stop(&mut self, signals: &mut Signals, reason: Drain) -> Drained {
        self.stop.ask();
        let grace = self.config.stop.grace;
        let drained = drain(grace, signals, reason, &self.stop, &mut self.workers, &mut self.caretakers).await;
        self.places.database.close().await;
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

/// Pipelines that read the same stream share a caretaker.
fn by_stream(flows: &[Flow]) -> BTreeMap<&str, Vec<&Flow>> {
    let mut streams: BTreeMap<&str, Vec<&Flow>> = BTreeMap::new();
    for flow in flows {
        streams.entry(&flow.lane.pipeline().stream).or_default().push(flow);
    }
    streams
}

/// A url as it may be shown: without its password.
fn shown(url: &Option<SecretString>) -> String {
    url.as_ref().map_or_else(String::new, |url| hide(url.expose_secret()))
}
