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

use self::drain::{drain, until_empty};
use self::prepare::{Flow, Places, caretaker_setup, prepare, raise_file_limit, try_prepare, worker_setup};
pub use self::prepare::{Options, Refusal};
use self::report::Reporter;
use self::supervise::supervise;
use crate::care::caretaker::Caretaker;
use crate::config::{Config, Faults, hide};
use crate::failpoint;
use crate::lanes::Record;
use crate::shutdown::{Hangups, Signals, Stop};

/// How the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Everything that was held is settled.
    Settled,
    /// Told twice, or out of time: what was held is pending.
    LeftPending,
    /// No worker was alive any more.
    NoWorkers,
}

/// Runs the daemon until a signal, or until the stream is empty. At SIGHUP it goes on with what `reload` gives.
pub async fn run(
    config: Config,
    options: Options,
    reload: impl Fn() -> Result<Config, Faults>,
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
            Watched::Hangup => {
                let Some(next) = running.next(&reload, options).await else { continue };
                info!(
                    event = "reloaded",
                    "the configuration was read again: settling what is held, then going on with it"
                );
                failpoint::reached("reload.read");
                match running.stop(&mut signals).await {
                    Ending::Settled => running = next.start(),
                    ending => return Ok(ending),
                }
                failpoint::reached("reload.started");
                continue;
            }
        };
        info!(reason, "stopping: reading no more, settling what is held");
        failpoint::reached("stop.asked");
        let ending = running.stop(&mut signals).await;
        match ending {
            Ending::Settled => info!(event = "stopped", phase = "settled", "stopped"),
            _ => warn!(
                event = "stopped",
                phase = "left pending",
                "stopped; what was held is delivered again, and recognised where it was flushed"
            ),
        }
        return Ok(ending);
    }
}

/// What a configuration asks for, made sure of and not yet started.
struct Prepared {
    config: Config,
    places: Places,
    flows: Vec<Flow>,
}

impl Prepared {
    fn start(self) -> Running {
        Running::start(self.config, self.places, self.flows)
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
                for slot in 0..config.run.workers {
                    let parts = worker_setup(&config, &places, flow, regrouped.clone());
                    workers.spawn(supervise(slot, parts, stop.clone()));
                }
            }
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
        let empty = until_empty(&self.places.valkey, &self.flows, options.until_empty);
        let mut empty = std::pin::pin!(empty);
        loop {
            tokio::select! {
                signal = signals.next() => return Watched::Stop(signal),
                () = hangups.next() => return Watched::Hangup,
                () = &mut empty => return Watched::Stop("everything is settled"),
                never = &mut reports => match never {},
                ended = self.workers.join_next() => if ended.is_none() {
                    return Watched::NoWorkers;
                },
            }
        }
    }

    /// What to go on with; nothing if that is not fit to be gone on with.
    async fn next(&self, reload: impl Fn() -> Result<Config, Faults>, options: Options) -> Option<Prepared> {
        let prepared = async {
            let config = reload()?;
            let places = Places::named_in(&config)?;
            let flows = try_prepare(&config, &places, Options { migrate: false, ..options }, Record::No).await?;
            Ok(Prepared { config, places, flows })
        };
        match prepared.await {
            Ok(mut prepared) => {
                for flow in &mut prepared.flows {
                    let before = self.flows.iter().find(|before| before.lane.id() == flow.lane.id());
                    flow.metrics = before.map_or_else(Arc::default, |before| before.metrics.clone());
                }
                Some(prepared)
            }
            Err::<_, Refusal>(refusal) => {
                error!(event = "reload_refused", %refusal, "the configuration cannot be used: going on with the one before");
                None
            }
        }
    }

    /// Stops in two phases.
    async fn stop(&mut self, signals: &mut Signals) -> Ending {
        self.stop.ask();
        let grace = self.config.stop.grace;
        let ending = drain(grace, signals, &self.stop, &mut self.workers, &mut self.caretakers).await;
        self.places.database.close().await;
        self.reporter.finish(&self.flows).await;
        ending
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
