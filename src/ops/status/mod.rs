//! `tidegate status`: is it flushing, how far behind, what is at risk, and why.
//!
//! Takes two looks at both servers, half a second apart, for the rates; prints the verdict first, then what it rests on. In an outage of one
//! server it says what the other one knows. Exit 4 when something is degraded, 69 when neither server can be reached.

pub mod reasons;
pub mod report;

use std::time::Duration;

use self::reasons::{Limits, Severity};
use self::report::Status;
use super::complete::{Name, by};
use super::context::{Format, chosen};
use super::observe::{Look, Servers};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::model::pipeline::Pipeline;
use crate::shutdown::Signals;

/// How far the two looks of one status are apart.
pub const APART: Duration = Duration::from_millis(500);
/// Clears a terminal and goes to its first line.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Look again and again, until Ctrl-C; with --output json one document a line
    #[arg(long)]
    pub watch: bool,
    /// With --watch: how often
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub every: Duration,
    /// An unsettled entry older than this is a degraded service
    #[arg(long, default_value = "1m", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub max_age: Duration,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let mut servers = Servers::of(&config, "tidegate:status")?;
    let pipelines = chosen(&config, &opts.pipelines)?;
    if !opts.watch {
        let status = once(&mut servers, &config, &pipelines, opts.max_age).await;
        context.print(&status)?;
        return Ok(status.exit());
    }
    let mut signals = Signals::listen()?;
    let mut before = Look::take(&mut servers, &pipelines, config.reclaim.dead_after).await;
    loop {
        tokio::select! {
            () = tokio::time::sleep(opts.every.max(APART)) => {}
            _ = signals.next() => return Ok(Exit::Ok),
        }
        let now = Look::take(&mut servers, &pipelines, config.reclaim.dead_after).await;
        let status = Status::of(&before, &now, &limits(&config, opts.max_age));
        if context.terminal.shows_output && context.format == Format::Table {
            context.write(CLEAR)?;
        }
        context.print(&status)?;
        before = now;
    }
}

/// A status of these pipelines.
pub async fn once(servers: &mut Servers, config: &Config, pipelines: &[&Pipeline], max_age: Duration) -> Status {
    let before = Look::take(servers, pipelines, config.reclaim.dead_after).await;
    // With nobody there to tell anything there is no rate to be seen.
    if before.valkey_fault().is_some() {
        return Status::of(&before, &before, &limits(config, max_age));
    }
    tokio::time::sleep(APART).await;
    let now = Look::take(servers, pipelines, config.reclaim.dead_after).await;
    Status::of(&before, &now, &limits(config, max_age))
}

/// What is too much, by this configuration.
pub fn limits(config: &Config, max_age: Duration) -> Limits {
    Limits { max_age, dead_after: config.reclaim.dead_after }
}

impl Status {
    /// How the command ends.
    pub fn exit(&self) -> Exit {
        match self.verdict.state {
            Severity::Down => Exit::Unavailable,
            Severity::Degraded => Exit::Degraded,
            Severity::Notice | Severity::Ok => Exit::Ok,
        }
    }
}
