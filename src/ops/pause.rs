//! `tidegate pause` and `tidegate resume`: a pipeline's workers read nothing, or read on.
//!
//! Takes names of pipelines; keeps the pause in PostgreSQL, where it outlasts restarts, and waits until the daemons at work obey. What they hold
//! is settled first; entries wait in Valkey, and trimming waits with them.

use std::time::Duration;

use serde::Serialize;
use sqlx::postgres::PgConnection;

use super::columns::{Page, Tone, lasting, plural, printable};
use super::complete::{Name, by};
use super::context::{Report, chosen};
use super::observe::{Look, Servers};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::model::pipeline::Pipeline;
use crate::pauses;
use crate::presence::State;

/// How long it is waited for the daemons to obey.
const OBEYED_WITHIN: Duration = Duration::from_secs(10);
/// How often they are asked.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// The pipelines
    #[arg(value_name = "PIPELINE", required_unless_present = "all", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Every pipeline of the configuration
    #[arg(long, conflicts_with = "pipelines")]
    pub all: bool,
    /// It ends by itself after so long, such as 10m; default: when somebody resumes it
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub duration: Option<Duration>,
    /// Why, for whoever looks later
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct ResumeOpts {
    /// The pipelines
    #[arg(value_name = "PIPELINE", required_unless_present = "all", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Every pipeline of the configuration
    #[arg(long, conflicts_with = "pipelines")]
    pub all: bool,
}

/// What was paused, or resumed.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Pauses {
    /// Each pipeline that was named.
    pub pipelines: Vec<Paused>,
}

/// A pipeline that was paused, or resumed.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Paused {
    /// Its name.
    pub pipeline: String,
    /// Whether it is paused now.
    pub paused: bool,
    /// Whether it was paused before.
    pub was_paused: bool,
    /// Seconds until it goes on by itself; null where it does not, or is not paused.
    pub left_seconds: Option<f64>,
    /// Daemons that are at work on it.
    pub daemons: u64,
    /// How many of them obey by now.
    pub obeying: u64,
}

/// What is done with pipelines.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// They are paused.
    Pause {
        /// For how long; none: until somebody resumes them.
        duration: Option<Duration>,
        /// Why, if that was said.
        reason: Option<&'a str>,
        /// Who says so, if that is known.
        operator: Option<&'a str>,
    },
    /// Their pause ends.
    Resume,
}

/// Runs `pause`.
pub async fn pause(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let names = if opts.all { &[][..] } else { &opts.pipelines };
    let operator = std::env::var("USER").ok();
    let change =
        Change::Pause { duration: opts.duration, reason: opts.reason.as_deref(), operator: operator.as_deref() };
    let mut servers = Servers::of(&config, "tidegate:pause")?;
    finish(context, change.make(&config, &chosen(&config, names)?, &mut servers, OBEYED_WITHIN).await?)
}

/// Runs `resume`.
pub async fn resume(opts: ResumeOpts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let names = if opts.all { &[][..] } else { &opts.pipelines };
    let mut servers = Servers::of(&config, "tidegate:resume")?;
    finish(context, Change::Resume.make(&config, &chosen(&config, names)?, &mut servers, OBEYED_WITHIN).await?)
}

impl Change<'_> {
    /// Makes it, and waits until the daemons at work obey, for so long at the most.
    pub async fn make(
        self,
        config: &Config,
        pipelines: &[&Pipeline],
        servers: &mut Servers,
        within: Duration,
    ) -> Result<Pauses, Failure> {
        if let Change::Pause { duration: Some(Duration::ZERO), .. } = self {
            return Err(Failure::usage("a pause of no time is none: write --for 10m, or leave it out"));
        }
        let before = in_force(servers).await?;
        let source = servers.source.clone();
        for pipeline in pipelines {
            let name = &pipeline.name;
            let made = match self {
                Change::Pause { duration, reason, operator } => {
                    let pause =
                        async |c: &mut PgConnection| pauses::pause(c, &source, name, duration, reason, operator).await;
                    servers.database.run(pause).await
                }
                Change::Resume => {
                    let resume = async |c: &mut PgConnection| pauses::resume(c, &source, name).await;
                    servers.database.run(resume).await.map(|_| ())
                }
            };
            made?;
        }
        confirm(config, pipelines, servers, &before, matches!(self, Change::Pause { .. }), within).await
    }
}

fn finish(context: &Context, told: Pauses) -> Result<Exit, Failure> {
    let all_obey = told.pipelines.iter().all(|pipeline| pipeline.obeying == pipeline.daemons);
    context.print(&told)?;
    if !all_obey {
        context.say("some daemons have not said yet that they obey: see `tidegate status`");
        return Ok(Exit::Retry);
    }
    Ok(Exit::Ok)
}

async fn in_force(servers: &Servers) -> Result<Vec<pauses::Pause>, Failure> {
    Ok(servers.database.run(async |c| pauses::in_force(c, &servers.source).await).await?)
}

/// Waits until the daemons at work say that they obey; gives how it stands, at the latest when the time is up.
async fn confirm(
    config: &Config,
    pipelines: &[&Pipeline],
    servers: &mut Servers,
    before: &[pauses::Pause],
    is_pause: bool,
    within: Duration,
) -> Result<Pauses, Failure> {
    let deadline = tokio::time::Instant::now() + within;
    loop {
        let look = Look::take(servers, pipelines, config.reclaim.dead_after).await;
        let now = in_force(servers).await?;
        let told = look.pipelines.iter().map(|(pipeline, seen)| {
            let streams = seen.iter().filter_map(|seen| seen.stream.as_ref().ok());
            let said: Vec<State> =
                streams.flat_map(|stream| stream.processes.iter().flatten()).map(|process| process.state).collect();
            // One that waits for a server, or for somebody, reads nothing either, and does not say whether it is paused.
            let pause = now.iter().find(|pause| pause.pipeline == pipeline.name);
            let obeys = |state: &&State| match (is_pause, pause) {
                (true, Some(_)) => **state != State::Flowing,
                // A short one may be over by now.
                (true, None) => true,
                (false, _) => **state != State::Paused,
            };
            Paused {
                pipeline: pipeline.name.clone(),
                paused: pause.is_some(),
                was_paused: before.iter().any(|pause| pause.pipeline == pipeline.name),
                left_seconds: pause.and_then(|pause| pause.left).map(|left| left.as_secs_f64()),
                daemons: said.len() as u64,
                obeying: said.iter().filter(obeys).count() as u64,
            }
        });
        let told: Vec<Paused> = told.collect();
        let is_over = told.iter().all(|pipeline| pipeline.obeying == pipeline.daemons);
        if is_over || tokio::time::Instant::now() >= deadline {
            return Ok(Pauses { pipelines: told });
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

impl Report for Pauses {
    fn show(&self, page: &mut Page) {
        for pipeline in &self.pipelines {
            let name = printable(&pipeline.pipeline);
            let daemons = plural(pipeline.daemons, "daemon", "daemons");
            if pipeline.paused {
                let until = match pipeline.left_seconds {
                    Some(left) => {
                        format!("for {} more", lasting(Duration::try_from_secs_f64(left).unwrap_or_default()))
                    }
                    None => format!("until `tidegate resume {name}`"),
                };
                page.toned(Tone::Warn, format!("{name}: paused {until}; {} of {daemons} obey", pipeline.obeying));
            } else if pipeline.was_paused {
                page.toned(Tone::Good, format!("{name}: resumed; {} of {daemons} read on", pipeline.obeying));
            } else {
                page.line(format!("{name}: was not paused"));
            }
        }
    }
}
