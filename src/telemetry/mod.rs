//! What a process tells of itself: metrics and events ([`contract`]), kept by shard ([`metrics`], [`recorder`], [`steps`]) and shown by
//! process ([`registry`]); exported to a collector (`otlp`) or scraped ([`prometheus`], [`admin`]); traces ([`trace`]), health
//! ([`health`]) and log lines ([`log`]).

pub mod admin;
pub mod contract;
pub mod health;
pub mod log;
pub mod metrics;
mod observe;
mod otlp;
pub mod prometheus;
pub mod recorder;
pub mod registry;
pub mod steps;
pub mod trace;

use std::sync::mpsc;
use std::time::Duration;

use opentelemetry::global;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::{SdkMeterProvider, Stream};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};

use self::admin::Pages;
use self::otlp::{Environment, Signal, Way};
use self::prometheus::Scrape;
use self::registry::Registry;
use crate::config::{Config, TelemetrySection};

/// How long the end of a process waits for the last telemetry to reach its collector.
const LAST_EXPORT: Duration = Duration::from_secs(5);
/// One batch in so many is traced, where nothing else is said.
const TRACE_ONE_IN: u64 = 100;
/// So many series of one metric are kept apart: a bound far above any configuration with `per_stream`.
const MAX_SERIES: usize = 200_000;

/// Telemetry cannot be started; a sentence with the next step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// What a daemon tells of itself. To be dropped last: that sends what has not been sent.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    scrape: Scrape,
    meters: SdkMeterProvider,
    tracers: Option<SdkTracerProvider>,
    loggers: Option<SdkLoggerProvider>,
    /// gRPC wants a runtime, which must outlive the last export.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Telemetry {
    /// Starts everything that the configuration and the environment ask for, the log among it. Not to be called within a runtime.
    pub fn start(config: &Config) -> Result<Telemetry, Refused> {
        let env = Environment::of_process();
        let way = |signal| otlp::way(signal, &config.telemetry, &env);
        let [metrics, traces, logs] = Signal::ALL.map(way);
        let (metrics, traces, logs) = (metrics?, traces?, logs?);
        let is_grpc = [&metrics, &traces, &logs].into_iter().flatten().any(|way| way.is_grpc);
        let runtime = if is_grpc { Some(runtime()?) } else { None };
        let _entered = runtime.as_ref().map(tokio::runtime::Runtime::enter);
        let resource = otlp::resource(&env);

        let loggers = logs.map(|way| loggers(&way, resource.clone())).transpose()?;
        log::start(&config.log, loggers.as_ref());
        log::tell_panics();
        let tracers = traces.map(|way| tracers(&way, &config.telemetry, &env, resource.clone())).transpose()?;
        if let Some(tracers) = &tracers {
            global::set_tracer_provider(tracers.clone());
            trace::are_taken();
        }
        let (registry, scrape) = (Registry::default(), Scrape::default());
        let meters = meters(metrics.as_ref(), &scrape, resource)?;
        global::set_meter_provider(meters.clone());
        observe::observe(&meters, &registry);
        drop(_entered);
        Ok(Telemetry { registry, scrape, meters, tracers, loggers, runtime })
    }

    /// Where the daemon shows how it stands.
    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    /// What the admin port serves.
    pub fn pages(&self) -> Pages {
        Pages { registry: self.registry.clone(), scrape: self.scrape.clone(), beside: None }
    }
}

impl Drop for Telemetry {
    /// Sends what is left, all signals at once, and waits a bounded time for it. What fails then is lost, and nothing else is.
    fn drop(&mut self) {
        self.registry.look_again();
        let (tell, ended) = mpsc::channel::<()>();
        let (meters, tracers, loggers) = (self.meters.clone(), self.tracers.take(), self.loggers.take());
        let mut ends: Vec<Box<dyn FnOnce() + Send>> = vec![Box::new(move || drop(meters.shutdown()))];
        if let Some(tracers) = tracers {
            ends.push(Box::new(move || drop(tracers.shutdown_with_timeout(LAST_EXPORT))));
        }
        if let Some(loggers) = loggers {
            ends.push(Box::new(move || drop(loggers.shutdown_with_timeout(LAST_EXPORT))));
        }
        for end in ends {
            let tell = tell.clone();
            std::thread::spawn(move || {
                end();
                drop(tell);
            });
        }
        drop(tell);
        // An error either way: all have ended, or the time is over.
        let _ = ended.recv_timeout(LAST_EXPORT);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Refused> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let built = builder.worker_threads(1).thread_name("tidegate-otlp").enable_all().build();
    built.map_err(|error| Refused(format!("no thread for telemetry can be started: {error}")))
}

fn meters(way: Option<&Way>, scrape: &Scrape, resource: Resource) -> Result<SdkMeterProvider, Refused> {
    let reader = scrape.reader().map_err(Refused)?;
    let builder = SdkMeterProvider::builder().with_resource(resource).with_reader(reader);
    let builder = builder.with_view(|_: &_| Stream::builder().with_cardinality_limit(MAX_SERIES).build().ok());
    Ok(match way {
        Some(way) => builder.with_periodic_exporter(way.metrics()?).build(),
        None => builder.build(),
    })
}

fn tracers(
    way: &Way,
    section: &TelemetrySection,
    env: &Environment,
    resource: Resource,
) -> Result<SdkTracerProvider, Refused> {
    let builder = SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(way.traces()?);
    let one_in = match section.trace_one_in {
        0 if env.get("OTEL_TRACES_SAMPLER").is_some() => return Ok(builder.build()),
        0 => TRACE_ONE_IN,
        one_in => one_in,
    };
    // The spans of a batch are sampled with its first one.
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(1.0 / one_in as f64)));
    Ok(builder.with_sampler(sampler).build())
}

fn loggers(way: &Way, resource: Resource) -> Result<SdkLoggerProvider, Refused> {
    Ok(SdkLoggerProvider::builder().with_resource(resource).with_batch_exporter(way.logs()?).build())
}
