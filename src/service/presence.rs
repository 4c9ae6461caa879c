//! Presence: this process says in Valkey how it is, for `tidegate status` and its like.
//!
//! Takes the flows; says of each what [`crate::presence`] keeps, at once when something has changed, and every few seconds. It cannot fail:
//! what Valkey does not take is said again later.

use std::convert::Infallible;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::info;

use super::accept::Findings;
use super::prepare::{Flow, Places};
use crate::failpoint;
use crate::model::names;
use crate::postgres::{Database, place};
use crate::presence::{self, Finding, Presence, RENEWED_EVERY, State};
use crate::retry::{Fault, Verdict, judge};
use crate::valkey::{Link, Links};

/// How often it is looked whether something has changed.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How many streams it is said of at once.
const SAID_AT_ONCE: usize = 64;
/// What is left at the least between two renewals for each stream: with very many this must not become Valkey's work.
const RENEWED_EVERY_OF_MANY: Duration = Duration::from_millis(1);
/// How long a stop waits for the leave to be taken.
const LEAVE_WITHIN: Duration = Duration::from_millis(500);

fn renewed_every(flow: &Flow) -> Duration {
    RENEWED_EVERY.max(RENEWED_EVERY_OF_MANY * flow.lanes.len() as u32)
}

/// How this process is called.
pub(super) fn this_process() -> String {
    format!("{}-{}", names::host(), std::process::id())
}

/// Asks which PostgreSQL it is, again and again: behind one address it may become another one.
async fn learn(database: Database, learned: watch::Sender<Option<String>>) -> Infallible {
    let mut tick = tokio::time::interval(RENEWED_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Some(place) = place(&database).await {
            learned.send_replace(Some(place));
        }
    }
}

/// What was said, as far as it is said anew at once when it changes.
#[derive(Clone)]
struct Said {
    state: State,
    postgres: Option<String>,
    findings: Vec<Finding>,
    at: Instant,
}

/// What this process says.
pub(super) struct Herald {
    process: String,
    database: Database,
    /// Which PostgreSQL that is, as far as it is known.
    postgres: watch::Sender<Option<String>>,
    workers: usize,
    /// What keeps a daemon from starting, and is there.
    findings: Findings,
    /// Of each flow: what was said last, and when.
    said: Vec<Option<Said>>,
    /// Kept from one look to the next; new ones after a fault.
    links: Links,
    /// Whether it was told that the user may not write.
    refused: bool,
}

impl Herald {
    pub(super) fn new(places: &Places, flows: &[Flow], workers: usize, findings: &Findings) -> Herald {
        Herald {
            process: this_process(),
            database: places.database.clone(),
            postgres: watch::Sender::default(),
            workers,
            findings: findings.clone(),
            said: vec![None; flows.len()],
            links: Links::to(&places.valkey, "tidegate:presence"),
            refused: false,
        }
    }

    /// Speaks for as long as it is polled.
    pub(super) async fn run(&mut self, flows: &[Flow]) -> Infallible {
        // A PostgreSQL that does not answer keeps nobody from hearing that.
        let learns = learn(self.database.clone(), self.postgres.clone());
        tokio::select! {
            never = learns => never,
            never = self.speak(flows) => never,
        }
    }

    async fn speak(&mut self, flows: &[Flow]) -> Infallible {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if self.links.have_changed() {
                // Who speaks over another connection is to be known by that one.
                self.said.fill(None);
            }
            for (n, flow) in flows.iter().enumerate() {
                let presence = self.presence(flow);
                let is_known = self.said[n].as_ref().is_some_and(|said| {
                    (said.state, &said.postgres, &said.findings)
                        == (presence.state, &presence.postgres, &presence.findings)
                        && said.at.elapsed() < renewed_every(flow)
                });
                if is_known {
                    continue;
                }
                match self.say(flow, &presence).await {
                    Ok(()) => {
                        failpoint::reached("presence.said");
                        let Presence { state, postgres, findings, .. } = presence;
                        self.said[n] = Some(Said { state, postgres, findings, at: Instant::now() });
                    }
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
        let (links, process) = (&mut self.links, &self.process);
        let leave = async {
            for lane in flows.iter().flat_map(|flow| flow.lanes.iter()) {
                let (stream, name) = (&lane.pipeline().stream, &lane.pipeline().name);
                let leave = async |link: &Link| presence::leave(link.commands(), stream, name, process).await;
                // If it fails, what was said expires.
                let _ = links.look(stream, leave).await;
            }
        };
        let _ = tokio::time::timeout(LEAVE_WITHIN, leave).await;
    }

    async fn say(&mut self, flow: &Flow, presence: &Presence) -> Result<(), Fault> {
        for some in flow.lanes.chunks(SAID_AT_ONCE) {
            // In a cluster a flow has one stream.
            let say = async |link: &Link| {
                // The slot is on its way here, and what was said may still be where it comes from: said here, too, it would be in the way of that.
                if link.is_asking() {
                    return Ok(());
                }
                let streams: Vec<&str> = some.iter().map(|lane| &*lane.pipeline().stream).collect();
                let (connection, run_id) = (link.number(), link.generation().run_id.clone());
                let presence = Presence { connection, run_id, ..presence.clone() };
                presence::say(link.commands(), &streams, &flow.pipeline.name, &presence).await
            };
            self.links.look(&some[0].pipeline().stream, say).await?;
        }
        Ok(())
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
            postgres: self.postgres.borrow().clone(),
            state,
            fault: fault.map(|fault| fault.to_string()),
            advice: advice.map(str::to_owned),
            lasted_ms,
            workers: self.workers,
            reads_alone: counted.lease.map(|leases| leases > 0),
            applied: counted.applied,
            buried: counted.buried,
            recognised: counted.recognised,
            lost: counted.lost_unflushed,
            findings: self.findings.now(),
            said_ms_ago: 0,
        }
    }
}
