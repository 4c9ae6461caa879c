//! The command line: what can be typed, and which verb answers.
//!
//! Takes the parsed words; gives the exit code, or the [`Failure`] that the process ends with. Completions and manual pages are made
//! from the same definitions.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::context::Format;
use super::{Context, Exit, Failure};
use super::{
    adopt, audit, bench, check, config, counter, dead, demo, doctor, explain, group, health, invalidate, memory,
    migrate, pages, pause, pending, pipeline, probe, produce, replay, run, runbook, size, status, tap, top, trim, wait,
    warm,
};
use crate::telemetry::Telemetry;

/// Write-behind for Valkey and PostgreSQL: every counter delta lands exactly once, whatever crashes.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true)]
pub struct Cli {
    /// The configuration file; without it the one that TIDEGATE_CONFIG names, if any
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How data is printed on stdout
    #[arg(long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    output: Format,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Flush deltas from Valkey into PostgreSQL until told to stop (the daemon)
    Run(run::Opts),
    /// Say whether it is flushing, how far behind, what is at risk, and why
    Status(status::Opts),
    /// The same and more on a terminal, again and again
    Top(top::Opts),
    /// See entries that could not be applied; apply them again, or give them up
    Dead(dead::Opts),
    /// Compare every counter in Valkey with its row and what is on the way; set Valkey right
    Audit(audit::Opts),
    /// Have a pipeline's workers read nothing, for a time or until it is resumed
    Pause(pause::Opts),
    /// Have a paused pipeline's workers read on
    Resume(pause::ResumeOpts),
    /// Wait until everything that is in the streams now is durable
    Wait(wait::Opts),
    /// Say who holds what, and for how long
    Pending(pending::Opts),
    /// Show entries as they go by, a few a second
    Tap(tap::Opts),
    /// Say what would be trimmed now, and what keeps it from being trimmed
    Trim(trim::Opts),
    /// See the consumer groups; put away what a rename has left behind
    Group(group::Opts),
    /// Check everything around: servers, rights, tables, time-outs, producers; each finding with its remedy
    Doctor(doctor::Opts),
    /// Say what an error code, a reason, a check or an exit code means, without a server
    Explain(explain::Opts),
    /// Ask a running daemon whether it is ready, live or started: exit code 0 if so, 1 if not
    Health(health::Opts),
    /// Send one delta through the workers that are there, and see it in PostgreSQL exactly once
    Probe(probe::Opts),
    /// Say how much memory, disk and time a load needs, without a server
    Size(size::Opts),
    /// Bring the database to the schema this program needs
    Migrate(migrate::Opts),
    /// Turn lines `id` or `id amount` into atomic increments with their deltas
    Produce(produce::Opts),
    /// Have the stream delivered once more from a moment on: what PostgreSQL lost, by a restore or a failover, lands again
    Replay(replay::Opts),
    /// Show the main job on private throw-away servers, with workers killed again and again, and prove the result
    Demo(demo::Opts),
    /// Measure how fast, how soon and at what cost deltas land on given servers, and whether exactly
    Bench(bench::Opts),
    /// Print what to do about an alert; without a name, list the runbooks
    Runbook(runbook::Opts),
    /// Have a plain pipeline's counters managed from now on
    Adopt(adopt::Opts),
    /// Show a counter's value, its row, and what is on its way between them
    Counter(counter::Opts),
    /// Say what fills Valkey, what the eviction policy means, and how long PostgreSQL may stay away
    Memory(memory::Opts),
    /// Bring counters into Valkey before somebody asks
    Warm(warm::Opts),
    /// Drop cached rows or counters by key, by pattern, or of a pipeline
    Invalidate(invalidate::Opts),
    /// Show the configuration as it took effect, and where each value comes from
    Config(config::Opts),
    /// Make a pipeline from a table or from a stream's entries; test pipelines without a server
    Pipeline(pipeline::Opts),
    /// Print what a shell sources to complete commands, options and names
    ///
    /// In ~/.bashrc: source <(tidegate completions bash), in ~/.zshrc the same with zsh, in fish: tidegate completions fish | source. The script
    /// calls this program at each Tab, and belongs to its version. Names come from the configuration that the command would read (--config, TIDEGATE_CONFIG, TIDEGATE__*
    /// variables) and from the servers, which are asked for 300 ms at the most. Where something is wrong nothing is offered and nothing is said.
    Completions(pages::CompletionsOpts),
    /// Print the manual page, or write the pages of all commands
    Man(pages::ManOpts),
    /// Check the configuration and list every error in it
    Check(check::Opts),
}

impl Verb {
    fn name(&self) -> &'static str {
        match self {
            Verb::Run(_) => "run",
            Verb::Status(_) => "status",
            Verb::Top(_) => "top",
            Verb::Dead(_) => "dead",
            Verb::Audit(_) => "audit",
            Verb::Pause(_) => "pause",
            Verb::Resume(_) => "resume",
            Verb::Wait(_) => "wait",
            Verb::Pending(_) => "pending",
            Verb::Tap(_) => "tap",
            Verb::Trim(_) => "trim",
            Verb::Group(_) => "group",
            Verb::Doctor(_) => "doctor",
            Verb::Explain(_) => "explain",
            Verb::Health(_) => "health",
            Verb::Probe(_) => "probe",
            Verb::Size(_) => "size",
            Verb::Migrate(_) => "migrate",
            Verb::Produce(_) => "produce",
            Verb::Replay(_) => "replay",
            Verb::Demo(_) => "demo",
            Verb::Bench(_) => "bench",
            Verb::Runbook(_) => "runbook",
            Verb::Adopt(_) => "adopt",
            Verb::Counter(_) => "counter",
            Verb::Memory(_) => "memory",
            Verb::Warm(_) => "warm",
            Verb::Invalidate(_) => "invalidate",
            Verb::Config(_) => "config",
            Verb::Pipeline(_) => "pipeline",
            Verb::Completions(_) => "completions",
            Verb::Man(_) => "man",
            Verb::Check(_) => "check",
        }
    }
}

impl Cli {
    /// The verb's name, as failures are told by it.
    pub fn verb(&self) -> &'static str {
        self.verb.name()
    }

    /// What the verb is given beside its own options.
    pub fn context(&self) -> Context {
        Context::of_process(self.config.clone(), self.output)
    }

    /// Starts what the daemon tells of itself; other verbs have nothing of the kind. Not to be called within a runtime.
    pub fn telemetry(&self, context: &Context) -> Result<Option<Telemetry>, Failure> {
        match &self.verb {
            Verb::Run(opts) => run::telemetry(opts, context).map(Some),
            _ => Ok(None),
        }
    }

    /// Runs the verb. `telemetry`: what was started for it.
    pub async fn run(self, context: &Context, telemetry: Option<&Telemetry>) -> Result<Exit, Failure> {
        match self.verb {
            Verb::Run(opts) => run::run(opts, context, telemetry).await,
            Verb::Health(opts) => health::run(opts, context).await,
            Verb::Probe(opts) => probe::run(opts, context).await,
            Verb::Size(opts) => size::run(opts, context),
            Verb::Top(opts) => top::run(opts, context).await,
            Verb::Status(opts) => status::run(opts, context).await,
            Verb::Dead(opts) => dead::run(opts, context).await,
            Verb::Audit(opts) => audit::run(opts, context).await,
            Verb::Pause(opts) => pause::pause(opts, context).await,
            Verb::Resume(opts) => pause::resume(opts, context).await,
            Verb::Wait(opts) => wait::run(opts, context).await,
            Verb::Pending(opts) => pending::run(opts, context).await,
            Verb::Tap(opts) => tap::run(opts, context).await,
            Verb::Trim(opts) => trim::run(opts, context).await,
            Verb::Group(opts) => group::run(opts, context).await,
            Verb::Doctor(opts) => doctor::run(opts, context).await,
            Verb::Explain(opts) => explain::run(opts, context),
            Verb::Migrate(opts) => migrate::run(opts, context).await,
            Verb::Produce(opts) => produce::run(opts, context).await,
            Verb::Replay(opts) => replay::run(opts, context).await,
            Verb::Demo(opts) => demo::run(opts, context).await,
            Verb::Bench(opts) => bench::run(opts, context).await,
            Verb::Runbook(opts) => runbook::run(opts, context),
            Verb::Adopt(opts) => adopt::run(opts, context).await,
            Verb::Counter(opts) => counter::run(opts, context).await,
            Verb::Memory(opts) => memory::run(opts, context).await,
            Verb::Warm(opts) => warm::run(opts, context).await,
            Verb::Invalidate(opts) => invalidate::run(opts, context).await,
            Verb::Config(opts) => config::run(opts, context),
            Verb::Pipeline(opts) => pipeline::run(opts, context).await,
            Verb::Completions(opts) => pages::completions(opts, context),
            Verb::Man(opts) => pages::man(opts, context),
            Verb::Check(opts) => check::run(opts, context).await,
        }
    }
}
