//! `tidegate wait`: a barrier. Returns when everything that is in the streams now is durable in PostgreSQL, or in its dead letters.
//!
//! Takes the last id of each stream as it is now, or an id; looks until nothing up to there is undelivered or pending. What is not pending any
//! more was acknowledged after its COMMIT, and the position of a group that is read alone is never ahead of the commits. Exit 75 when the
//! time is up: nothing is lost then, it is only not finished.

use std::time::Duration;

use serde::Serialize;

use super::columns::{Page, Tone, lasting_ms};
use super::complete::{Name, by};
use super::context::{Report, chosen};
use super::observe::{self, Servers};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::model::entry::EntryId;
use crate::model::pipeline::Shard;
use crate::presence::State;
use crate::retry::{Fault, FaultKind, advised, kind};
use crate::valkey::info;

/// How often it is looked at first, and later.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// After so long it is said what is waited for.
const SAY_AFTER: Duration = Duration::from_secs(3);

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only for these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Wait for entries up to this id; default: the last one that each stream has now
    #[arg(long, value_name = "ID")]
    pub up_to: Option<EntryId>,
    /// Give up after so long
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
}

/// What was waited for.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Waited {
    /// Whether everything is durable.
    pub done: bool,
    /// How long it was waited, in milliseconds.
    pub waited_ms: u64,
    /// Each stream.
    pub streams: Vec<Barrier>,
}

/// A stream, up to an id.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Barrier {
    /// Its pipeline.
    pub pipeline: String,
    /// Its key.
    pub stream: String,
    /// The id up to which everything is to be durable.
    pub up_to: String,
    /// Whether it is.
    pub done: bool,
    /// The first entry that is not; null where everything is.
    pub oldest: Option<String>,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let mut servers = Servers::of(&config, "tidegate:wait")?;
    let began = tokio::time::Instant::now();
    let mut barriers = barriers(&opts, &config, &mut servers).await?;
    let (mut every, mut has_spoken) = (LOOK_EVERY.0, false);
    let mut fault: Option<Fault> = None;
    loop {
        for (barrier, shard, up_to) in &mut barriers {
            if barrier.done {
                continue;
            }
            match oldest(&mut servers, shard, *up_to).await {
                Ok(oldest) => {
                    fault = None;
                    (barrier.done, barrier.oldest) = (oldest.is_none(), oldest.map(|id| id.to_string()));
                }
                // A server that restarts may come back in time.
                Err(met) if kind(&met) == FaultKind::Unavailable => fault = Some(met),
                Err(met) => return Err(met.into()),
            }
        }
        let done = barriers.iter().all(|(barrier, ..)| barrier.done);
        let is_over = began.elapsed() >= opts.timeout;
        if done || is_over {
            let streams = barriers.into_iter().map(|(barrier, ..)| barrier).collect();
            context.print(&Waited { done, waited_ms: began.elapsed().as_millis() as u64, streams })?;
            if let Some(fault) = fault.filter(|_| !done) {
                return Err(Failure::new(Exit::Retry, advised(&fault)));
            }
            return Ok(if done { Exit::Ok } else { Exit::Retry });
        }
        if began.elapsed() >= SAY_AFTER && !has_spoken {
            has_spoken = true;
            say_why(context, &config, &mut servers, &barriers).await;
        }
        tokio::time::sleep(every.min(opts.timeout.saturating_sub(began.elapsed()))).await;
        every = (every * 2).min(LOOK_EVERY.1);
    }
}

type Waiting = (Barrier, Shard, EntryId);

async fn barriers(opts: &Opts, config: &Config, servers: &mut Servers) -> Result<Vec<Waiting>, Failure> {
    let mut barriers = Vec::new();
    for pipeline in chosen(config, &opts.pipelines)? {
        for shard in servers.shards(pipeline).await {
            let link = servers.link(&shard.stream).await?;
            let last = match opts.up_to {
                Some(id) => id,
                None => {
                    info::stream(link.commands(), &shard.stream).await?.map_or(EntryId::MIN, |told| told.last_generated)
                }
            };
            let barrier = Barrier {
                pipeline: pipeline.name.clone(),
                stream: shard.stream.clone(),
                up_to: last.to_string(),
                done: false,
                oldest: None,
            };
            barriers.push((barrier, shard, last));
        }
    }
    Ok(barriers)
}

/// The first entry up to there that is not settled.
async fn oldest(servers: &mut Servers, shard: &Shard, up_to: EntryId) -> Result<Option<EntryId>, Fault> {
    let link = servers.link(&shard.stream).await?;
    let standing = info::standing(link.commands(), &shard.stream, &shard.pipeline.group()).await?;
    let oldest = [standing.oldest_pending, standing.first_undelivered].into_iter().flatten().min();
    Ok(oldest.filter(|id| *id <= up_to))
}

/// What is waited for, where the daemons tell.
async fn say_why(context: &Context, config: &Config, servers: &mut Servers, barriers: &[Waiting]) {
    for (barrier, shard, _) in barriers.iter().filter(|(barrier, ..)| !barrier.done) {
        let Ok(stream) = observe::valkey::look(servers, shard, config.reclaim.dead_after).await else { continue };
        let processes = stream.processes.unwrap_or_default();
        let name = &barrier.pipeline;
        let worst = processes.iter().max_by_key(|process| process.state == State::Halted);
        match worst.map(|process| (process.state, process)) {
            Some((State::Halted | State::Interrupted, process)) => {
                let fault = process.fault.as_deref().unwrap_or("see the daemon's log");
                context.say(&format!("waiting for {name}: {fault}"));
            }
            Some((State::Paused, _)) => {
                context.say(&format!("waiting for {name}: it is paused; `tidegate resume {name}` ends that"))
            }
            Some((State::Flowing, _)) => {}
            None => context.say(&format!("waiting for {name}: no daemon is at work")),
        }
    }
}

impl Report for Waited {
    fn show(&self, page: &mut Page) {
        if self.done {
            page.toned(Tone::Good, format!("everything is durable, after {}", lasting_ms(self.waited_ms)));
        } else {
            page.toned(Tone::Warn, format!("not everything is durable after {}", lasting_ms(self.waited_ms)));
        }
        for barrier in &self.streams {
            let state = match &barrier.oldest {
                None if barrier.done => "done".to_owned(),
                Some(oldest) => format!("{oldest} is not settled yet"),
                None => "could not be seen".into(),
            };
            page.line(format!("  {} {} up to {}: {state}", barrier.pipeline, barrier.stream, barrier.up_to));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_that_could_not_be_seen_does_not_read_as_done() {
        let barrier =
            Barrier { pipeline: "p".into(), stream: "s".into(), up_to: "1-0".into(), done: false, oldest: None };
        let mut page = Page::new(super::super::columns::Paint::Plain);
        Waited { done: false, waited_ms: 5, streams: vec![barrier] }.show(&mut page);
        assert!(page.into_text().ends_with("could not be seen\n"));
    }
}
