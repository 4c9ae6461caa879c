//! Presence: this process says in Valkey how it is, for `tidegate status` and its like.
//!
//! Takes the flows; says of each what [`crate::presence`] keeps, at once when something has changed, and every few seconds. It cannot fail:
//! what Valkey does not take is said again later.

use std::convert::Infallible;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tracing::info;

use super::prepare::Flow;
use crate::model::names;
use crate::presence::{self, Presence, RENEWED_EVERY, State};
use crate::retry::{Fault, Verdict, judge};
use crate::valkey::{self, Link};

/// How often it is looked whether something has changed.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a stop waits for the leave to be taken.
const LEAVE_WITHIN: Duration = Duration::from_millis(500);

/// What this process says.
pub(super) struct Herald {
    valkey: valkey::Endpoint,
    process: String,
    workers: usize,
    /// Of each flow: what was said last, and when.
    said: Vec<Option<(State, Instant)>>,
    /// Kept from one look to the next; none after a fault.
    link: Option<Link>,
    /// The number of the link's connection.
    connection: u64,
    /// Whether it was told that the user may not write.
    refused: bool,
}

impl Herald {
    pub(super) fn new(valkey: &valkey::Endpoint, flows: &[Flow], workers: usize) -> Herald {
        let process = format!("{}-{}", names::host(), std::process::id());
        Herald {
            valkey: valkey.clone(),
            process,
            workers,
            said: vec![None; flows.len()],
            link: None,
            connection: 0,
            refused: false,
        }
    }

    /// Speaks for as long as it is polled.
    pub(super) async fn run(&mut self, flows: &[Flow]) -> Infallible {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if self.link.as_ref().is_none_or(Link::is_lost) {
                // Who speaks over another connection is to be known by that one.
                self.said.fill(None);
            }
            for (n, flow) in flows.iter().enumerate() {
                let mut presence = self.presence(flow);
                let is_known =
                    self.said[n].is_some_and(|(state, at)| state == presence.state && at.elapsed() < RENEWED_EVERY);
                if is_known {
                    continue;
                }
                match self.say(flow, &mut presence).await {
                    Ok(()) => self.said[n] = Some((presence.state, Instant::now())),
                    Err(fault) => {
                        self.failed(&fault);
                        break;
                    }
                }
            }
        }
    }

    /// Takes leave of every flow.
    pub(super) async fn finish(&mut self, flows: &[Flow]) {
        let Some(link) = self.link.take() else { return };
        let leave = async {
            for flow in flows {
                let pipeline = flow.lane.pipeline();
                // If it fails, what was said expires.
                let _ = presence::leave(link.commands(), &pipeline.stream, &pipeline.name, &self.process).await;
            }
        };
        let _ = tokio::time::timeout(LEAVE_WITHIN, leave).await;
    }

    async fn say(&mut self, flow: &Flow, presence: &mut Presence) -> Result<(), Fault> {
        let link = match self.link.take().filter(|link| !link.is_lost()) {
            Some(link) => link,
            None => {
                let name = |_: &str, number| {
                    self.connection = number;
                    "tidegate:presence".to_owned()
                };
                Link::open_as(&self.valkey, name).await?
            }
        };
        let pipeline = flow.lane.pipeline();
        (presence.connection, presence.run_id) = (self.connection, link.generation().run_id.clone());
        let said = presence::say(link.commands(), &pipeline.stream, &pipeline.name, presence).await;
        self.link = Some(link);
        said
    }

    /// The workers meet a server that is away, and tell. A right that only this lacks nobody else meets.
    fn failed(&mut self, fault: &Fault) {
        if matches!(fault, Fault::Valkey { code, .. } if code == "NOPERM")
            && !std::mem::replace(&mut self.refused, true)
        {
            info!(%fault, "this process cannot say how it is, and `tidegate status` will not see it: docs/permissions.md has the rights");
        }
    }

    fn presence(&self, flow: &Flow) -> Presence {
        let now = Instant::now();
        let halted_by = {
            let refusals = flow.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.halted_by().cloned()
        };
        let lasting = flow.metrics.flushing.lasting(now).or_else(|| flow.metrics.reading.lasting(now));
        let lasted_ms = lasting.as_ref().map_or(0, |lasting| lasting.lasted.as_millis() as u64);
        let (state, fault, advice) = match (halted_by, lasting) {
            (Some(fault), _) => {
                let judgement = judge(&fault, u32::MAX);
                let advice = match judgement.verdict {
                    Verdict::Halt => judgement.advice,
                    _ => {
                        "the table refuses so many different entries that the cause must be the table: correct it, and flushing goes on by itself"
                    }
                };
                (State::Halted, Some(fault), Some(advice))
            }
            (None, Some(lasting)) => {
                let is_halt = lasting.judgement.verdict == Verdict::Halt;
                let state = if is_halt { State::Halted } else { State::Interrupted };
                (state, Some(lasting.fault), Some(lasting.judgement.advice))
            }
            (None, None) if flow.pause.is_on() => (State::Paused, None, None),
            (None, None) => (State::Flowing, None, None),
        };
        let counted = flow.metrics.snapshot();
        Presence {
            process: self.process.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            connection: 0,
            run_id: String::new(),
            state,
            fault: fault.map(|fault| fault.to_string()),
            advice: advice.map(str::to_owned),
            lasted_ms,
            workers: self.workers,
            reads_alone: counted.lease.map(|lease| lease == 1),
            applied: counted.applied,
            buried: counted.buried,
            recognised: counted.recognised,
            lost: counted.lost_unflushed,
            said_ms_ago: 0,
        }
    }
}
