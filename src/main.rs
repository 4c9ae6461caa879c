//! The command line: parse the verb, load the configuration, start telemetry, run, exit.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tidegate::config::{Config, Needs, Sources, load};
use tidegate::ops::{
    Exit, adopt, bench, check, counter, demo, health, invalidate, memory, migrate, produce, replay, run, warm,
};
use tidegate::telemetry::{self, Telemetry};
use tokio::runtime::Runtime;

/// Write-behind for Valkey and PostgreSQL: every counter delta lands exactly once, whatever crashes.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// The configuration file; without it the one that TIDEGATE_CONFIG names, if any
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Flush deltas from Valkey into PostgreSQL until told to stop (the daemon)
    Run {
        #[command(flatten)]
        args: run::Args,
        /// How many workers a pipeline has; default: run.workers of the configuration
        #[arg(long, value_name = "N")]
        workers: Option<String>,
    },
    /// Bring the database to the schema this program needs
    Migrate(migrate::Args),
    /// Turn lines `id` or `id amount` into atomic increments with their deltas
    Produce(produce::Args),
    /// Have the stream delivered once more from a moment on: what PostgreSQL lost, by a restore or a failover, lands again
    Replay(replay::Args),
    /// Have the counters of a pipeline managed from now on: what Valkey has of them is dropped, and brought back when it is needed
    Adopt(adopt::Args),
    /// Show what fills Valkey, and how long PostgreSQL may stay away
    Memory(memory::Args),
    /// Drop cached rows, or values of counters, by key or by pattern
    Invalidate(invalidate::Args),
    /// Bring counters into Valkey before somebody asks for them
    Warm(warm::Args),
    /// Look at one counter
    Counter(counter::Args),
    /// Show the main job on private throw-away servers, with workers killed again and again, and prove the result
    Demo(demo::Args),
    /// Measure how fast, how soon and at what cost deltas land on given servers, and whether exactly
    Bench(bench::Args),
    /// Ask a running daemon whether it is ready, live or started: exit code 0 if so, 1 if not
    Health(health::Args),
    /// Check the configuration and list every error in it
    Check(check::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The one provider of cryptography; it is not set yet.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    let (outcome, telemetry) = run(cli, &runtime);
    // What is still running was told to stop and is not waited for: it may be stuck in a server's silence.
    runtime.shutdown_background();
    let code = outcome.map_or_else(|error| failed(&error), ExitCode::from);
    // Last of all: it sends what was told up to now, after an error too.
    drop(telemetry);
    code
}

/// Runs the verb; gives how it ended, and what has telemetry still to send.
fn run(cli: Cli, runtime: &Runtime) -> (std::io::Result<Exit>, Option<Telemetry>) {
    let (args, workers) = match cli.verb {
        Verb::Run { args, workers } => (args, workers),
        verb => return (runtime.block_on(command(verb, cli.config)), None),
    };
    let flags: Vec<_> = workers.map(|workers| ("run.workers".to_owned(), workers)).into_iter().collect();
    let read = || load(&Sources::from_process(cli.config.clone(), flags.clone()), Needs::BOTH);
    let loaded = match read() {
        Ok(loaded) => loaded,
        Err(problems) => {
            tell(&problems);
            return (Ok(Exit::from(&problems)), None);
        }
    };
    let telemetry = match Telemetry::start(&loaded.config) {
        Ok(telemetry) => telemetry,
        Err(refused) => {
            tell(&refused);
            return (Ok(Exit::Config), None);
        }
    };
    let outcome = runtime.block_on(run::run(args, loaded, telemetry.pages(), read));
    (outcome, Some(telemetry))
}

fn failed(error: &std::io::Error) -> ExitCode {
    // Whoever closed the pipe has read enough.
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        return Exit::Ok.into();
    }
    tell(error);
    Exit::Error.into()
}

/// Every verb but the daemon's.
async fn command(verb: Verb, file: Option<PathBuf>) -> std::io::Result<Exit> {
    match verb {
        Verb::Run { .. } => Ok(Exit::Usage),
        Verb::Health(args) => match configured(file, Vec::new(), Needs::NONE) {
            Ok(config) => health::run(args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Migrate(args) => match configured(file, Vec::new(), Needs::POSTGRES) {
            Ok(config) => migrate::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Produce(args) => match configured(file, Vec::new(), Needs::VALKEY) {
            Ok(config) => produce(args, &config).await,
            Err(exit) => Ok(exit),
        },
        Verb::Replay(args) => match configured(file, Vec::new(), Needs::BOTH) {
            Ok(config) => replay::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Adopt(args) => match configured(file, Vec::new(), Needs::BOTH) {
            Ok(config) => adopt::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Memory(args) => match configured(file, Vec::new(), Needs::VALKEY) {
            Ok(config) => memory::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Invalidate(args) => match configured(file, Vec::new(), Needs::VALKEY) {
            Ok(config) => invalidate::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Warm(args) => match configured(file, Vec::new(), Needs::BOTH) {
            Ok(config) => warm::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Counter(args) => match configured(file, Vec::new(), Needs::BOTH) {
            Ok(config) => counter::run(&args, &config, &mut std::io::stdout()).await,
            Err(exit) => Ok(exit),
        },
        Verb::Demo(args) => demo::run(&args).await,
        Verb::Bench(args) if args.sandbox => bench::run(&args, None).await,
        Verb::Bench(args) => match configured(file, Vec::new(), Needs::BOTH) {
            Ok(config) => bench::run(&args, Some(&config)).await,
            Err(exit) => Ok(exit),
        },
        Verb::Check(args) => {
            let sources = Sources::from_process(file, Vec::new());
            check::run(args, &sources, &mut std::io::stdout(), &mut std::io::stderr())
        }
    }
}

async fn produce(args: produce::Args, config: &Config) -> std::io::Result<Exit> {
    let Some(pipeline) = config.pipelines.iter().find(|pipeline| pipeline.name == args.pipeline) else {
        let names: Vec<&str> = config.pipelines.iter().map(|pipeline| pipeline.name.as_str()).collect();
        tell(&format!("there is no pipeline {:?}: name one of {}", args.pipeline, names.join(", ")));
        return Ok(Exit::Config);
    };
    let address = match config.valkey.address() {
        Ok(address) => address,
        Err(problems) => {
            tell(&problems);
            return Ok(Exit::from(&problems));
        }
    };
    Ok(produce::run(args, address, pipeline.clone()).await)
}

/// The configuration, with telemetry started as it says. Otherwise its problems are printed.
fn configured(file: Option<PathBuf>, flags: Vec<(String, String)>, needs: Needs) -> Result<Config, Exit> {
    match load(&Sources::from_process(file, flags), needs) {
        Ok(loaded) => {
            telemetry::log::start(&loaded.config.log, None);
            Ok(loaded.config)
        }
        Err(problems) => {
            tell(&problems);
            Err(Exit::from(&problems))
        }
    }
}

fn tell(what: &dyn std::fmt::Display) {
    // If stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{what}");
}
