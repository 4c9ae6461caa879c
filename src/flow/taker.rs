//! Taker: takes entries from Valkey and hands batches to the settler.
//!
//! Takes a session and what bounds a batch; gives batches: its own backlog first, then fresh entries, now and then
//! those of dead consumers. On a fault it drops the session, waits, and goes on with a new one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::batch::Batch;
use super::handoff::{Held, Shared};
use super::liveness::Silence;
use super::read::Reader;
use super::reclaim::{self, Claimed, Reclaimer};
use super::session::{Identity, Session};
use super::setup::WorkerSetup;
use crate::failpoint;
use crate::model::entry::{EntryId, Generation};
use crate::retry::{Fault, Incident, Judgement, Verdict, judge};
use crate::shutdown::Stop;
use crate::valkey::Link;

/// The part that takes entries: fresh ones, the dead's, and its own that it lost sight of.
#[derive(Debug)]
pub struct Taker {
    pub(super) setup: WorkerSetup,
    pub(super) identity: Identity,
    pub(super) reader: Reader,
    pub(super) reclaimer: Reclaimer,
    pub(super) shared: Arc<Shared>,
    pub(super) sender: Option<mpsc::Sender<Held>>,
    pub(super) sent: u64,
    /// The entry that was handed over last, if it was tried alone.
    pub(super) suspect: Option<EntryId>,
    /// The server that it met, and when.
    pub(super) met: Option<Met>,
    /// Whether the group was there before, so that it is an incident when it is not.
    pub(super) has_group: bool,
    pub(super) incident: Incident,
}

/// One life of one server, with one history of writes, and when it was first met. It outlasts sessions: whatever closes
/// connections sooner than after `reclaim.dead_after` must not keep the dead from being found.
#[derive(Debug)]
pub(super) struct Met {
    run_id: String,
    replication_id: String,
    at: Instant,
}

impl Met {
    fn is(&self, server: &Generation) -> bool {
        self.run_id == server.run_id && self.replication_id == server.replication_id
    }
}

/// How a session ended, if not by a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// By a stop: everything that was asked for is taken.
    Stopped,
    /// The settler has ended (its task panicked): this worker is at its end.
    ReceiverGone,
}

/// Whether a batch can be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Free,
    /// A stop came first, and nothing is to be taken any more.
    Stopped,
    ReceiverGone,
}

/// What a taker does next, beside reading, and when.
#[derive(Debug)]
struct Plan {
    /// Whether its own backlog is to be looked at; for this nothing may be held.
    own: bool,
    /// Whether somebody dead holds entries.
    dead: bool,
    survey_at: Instant,
    /// When its own backlog is looked at although the worker has to settle what it holds for it.
    own_at: Instant,
    speak_at: Instant,
}

/// How often a worker under load settles all it holds to see whether more is pending under its name.
const OWN_EVERY: Duration = Duration::from_secs(5);

impl Taker {
    /// Takes until it is told to stop, over as many sessions as it takes.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            let mut session = match Session::open(&self.setup.valkey, &self.identity, self.setup.limits.bounds()).await
            {
                Ok(session) => session,
                Err(fault) => {
                    self.met(&fault, &stop).await;
                    continue;
                }
            };
            let server = session.link.generation();
            if !self.met.as_ref().is_some_and(|met| met.is(server)) {
                let (run_id, replication_id) = (server.run_id.clone(), server.replication_id.clone());
                self.met = Some(Met { run_id, replication_id, at: Instant::now() });
            }
            match self.take_over(&mut session, &stop).await {
                Ok(Ended::Stopped) => self.leave(&session, &stop).await,
                Ok(Ended::ReceiverGone) => return,
                Err(fault) => {
                    self.reclaimer.left_behind(session.consumer.clone());
                    // Closed first: what it read and lost is taken back by the next session.
                    drop(session);
                    self.met(&fault, &stop).await;
                }
            }
        }
    }

    /// One session's life: until it breaks, or a stop. Creates the group where a read finds none.
    async fn take_over(&mut self, session: &mut Session, stop: &Stop) -> Result<Ended, Fault> {
        let now = Instant::now();
        let speak_at = now + self.setup.sign_of_life_every();
        let mut plan = Plan { own: true, dead: false, survey_at: now, own_at: now + OWN_EVERY, speak_at };
        loop {
            match self.take(session, &mut plan, stop).await {
                Err(fault) if judge(&fault, 1).verdict == Verdict::Regroup => {
                    self.regroup(&fault, session, stop).await?;
                }
                ended => return ended,
            }
        }
    }

    /// Its own backlog first, then fresh entries, now and then the dead's.
    async fn take(&mut self, session: &mut Session, plan: &mut Plan, stop: &Stop) -> Result<Ended, Fault> {
        // In a stop, what was asked for is still taken.
        while !stop.is_asked() || !(session.is_quiet() || stop.is_forced()) {
            if session.is_lost() {
                return Err(Fault::ValkeyLost("the connection to Valkey was given up".into()));
            }
            if Instant::now() >= plan.speak_at {
                self.keep_alive(session).await?;
                plan.speak_at = Instant::now() + self.setup.sign_of_life_every();
            }
            if Instant::now() >= plan.survey_at && !self.shared.failing.load(Ordering::Relaxed) {
                self.survey(session, plan).await?;
            }
            let claimed = if !session.is_quiet() || !(plan.own || plan.dead) {
                let only_asked = plan.own || plan.dead || stop.is_asked();
                let batch = match self.wait_for_room(session, stop).await? {
                    Room::Free => self.reader.fill(session, stop, only_asked).await?,
                    Room::Stopped => None,
                    Room::ReceiverGone => return Ok(Ended::ReceiverGone),
                };
                self.works_again();
                if batch.is_some() {
                    self.send(&session.link, Claimed { batch, ..Claimed::default() }).await;
                }
                continue;
            } else if plan.own {
                if self.wait_until_settled(session, stop).await? == Room::ReceiverGone {
                    return Ok(Ended::ReceiverGone);
                }
                let claimed = self.reclaimer.claim_own(session).await?;
                plan.own = !claimed.is_empty();
                plan.own_at = Instant::now() + OWN_EVERY;
                claimed
            } else {
                let claimed = self.reclaimer.claim_from_the_dead(session, self.silence()).await?;
                plan.dead = !claimed.is_empty();
                plan.own |= claimed.has_more;
                claimed
            };
            if !claimed.is_empty() {
                let entries = claimed.batch.as_ref().map_or(0, Batch::len);
                self.setup.metrics.reclaimed(entries);
                let pipeline = &self.setup.lane.pipeline().name;
                info!(event = "reclaimed", %pipeline, worker = %self.identity.worker, entries, gone = claimed.gone.len(), "reclaimed");
                if self.wait_for_room(session, stop).await? == Room::ReceiverGone {
                    return Ok(Ended::ReceiverGone);
                }
                self.send(&session.link, claimed).await;
            }
        }
        Ok(Ended::Stopped)
    }

    /// Looks at the group's consumers: whether somebody dead holds entries, and whether this one may hold some unknown to it.
    /// One round trip while all are well, beside the reads under way.
    async fn survey(&mut self, session: &Session, plan: &mut Plan) -> Result<(), Fault> {
        let survey = self.reclaimer.survey(session, self.silence()).await?;
        plan.dead = !survey.dead.is_empty();
        let holds_nothing = *self.shared.done.borrow() == self.sent && session.is_quiet();
        plan.own |= survey.own_pending > 0 && (holds_nothing || Instant::now() >= plan.own_at);
        plan.survey_at = Instant::now() + self.setup.sweep_every;
        Ok(())
    }

    /// The group is not there: creates it. That it was never there is no incident.
    async fn regroup(&mut self, fault: &Fault, session: &Session, stop: &Stop) -> Result<(), Fault> {
        if self.has_group {
            self.met(fault, stop).await;
        }
        if self.reader.create_group(&session.link).await? {
            info!(worker = %self.identity.worker, stream = %self.setup.lane.pipeline().stream, "created the consumer group");
            self.setup.regrouped.notify_one();
        }
        self.has_group = true;
        Ok(())
    }

    /// Whether silence tells the dead from the living by now, on this server.
    fn silence(&self) -> Silence {
        match &self.met {
            Some(met) if met.at.elapsed() >= self.setup.patience.dead_after => Silence::Tells,
            _ => Silence::SaysNothing,
        }
    }

    async fn keep_alive(&self, session: &mut Session) -> Result<(), Fault> {
        self.reader.keep_alive(session, self.reclaimer.former()).await
    }

    async fn send(&mut self, link: &Arc<Link>, claimed: Claimed) {
        let Some(sender) = &self.sender else { return };
        self.suspect = claimed.suspect;
        let Claimed { batch, gone, suspect, .. } = claimed;
        let held = Held { link: link.clone(), batch, gone, suspect };
        // Fails only if the settler is gone, which the next wait for room tells.
        if sender.send(held).await.is_ok() {
            self.sent += 1;
        }
    }

    /// Waits until a batch can be handed over, showing signs of life.
    async fn wait_for_room(&self, session: &mut Session, stop: &Stop) -> Result<Room, Fault> {
        let Some(sender) = &self.sender else { return Ok(Room::ReceiverGone) };
        let mut room = std::pin::pin!(sender.reserve());
        loop {
            tokio::select! {
                // Given back at once: this task is the only one that sends.
                permit = &mut room => return Ok(if permit.is_ok() { Room::Free } else { Room::ReceiverGone }),
                () = stop.asked(), if session.is_quiet() => return Ok(Room::Stopped),
                () = stop.forced() => return Ok(Room::Stopped),
                () = tokio::time::sleep(self.setup.sign_of_life_every()) => self.keep_alive(session).await?,
            }
        }
    }

    /// Waits until nothing is held, showing signs of life; or until a stop.
    async fn wait_until_settled(&self, session: &mut Session, stop: &Stop) -> Result<Room, Fault> {
        let mut settled = std::pin::pin!(self.shared.is_done_with(self.sent));
        let Some(sender) = &self.sender else { return Ok(Room::ReceiverGone) };
        loop {
            tokio::select! {
                () = &mut settled => return Ok(Room::Free),
                () = sender.closed() => return Ok(Room::ReceiverGone),
                () = stop.asked() => return Ok(Room::Stopped),
                () = tokio::time::sleep(self.setup.sign_of_life_every()) => self.keep_alive(session).await?,
            }
        }
    }

    /// Waits for what is held to be settled, then takes the consumer out of the group. A stop that leaves an entry pending
    /// is not its fault.
    async fn leave(&mut self, session: &Session, stop: &Stop) {
        self.sender = None;
        tokio::select! {
            () = self.shared.is_done_with(self.sent) => {}
            () = stop.forced() => {
                if let Some(id) = self.suspect {
                    let pipeline = self.setup.lane.pipeline();
                    // If it fails, the entry counts one death too many.
                    let _ = reclaim::acquit(&session.link, &pipeline.stream, &pipeline.group(), &session.consumer, id).await;
                }
                return;
            }
        }
        failpoint::reached("stop.settled");
        if let Err(fault) = self.reclaimer.leave(session).await {
            debug!(worker = %self.identity.worker, %fault, "could not leave the group; a peer removes this consumer later");
        }
    }

    /// A fault on Valkey's side: tells it, waits, and leaves the rest to the next link.
    async fn met(&mut self, fault: &Fault, stop: &Stop) {
        let now = Instant::now();
        let response = self.incident.met(fault, now);
        let Judgement { verdict, advice } = response.judgement;
        // Told once for all workers of the pipeline.
        if self.incident.is_news(verdict, now) {
            let (pipeline, lasted_ms) = (self.setup.lane.pipeline(), response.lasted.as_millis() as u64);
            let (name, stream) = (&pipeline.name, &pipeline.stream);
            match verdict {
                Verdict::Halt => {
                    error!(event = "halted", pipeline = %name, %stream, %fault, advice, lasted_ms, "reading is halted until this is corrected");
                }
                _ => {
                    warn!(event = "interrupted", pipeline = %name, %stream, %fault, advice, lasted_ms, "reading is interrupted");
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(response.wait) => {}
            () = stop.asked() => {}
        }
    }

    fn works_again(&mut self) {
        let now = Instant::now();
        // The last worker that it kept waiting says so.
        if let Some((_, lasted)) = self.incident.over(now) {
            let (pipeline, lasted_ms) = (self.setup.lane.pipeline(), lasted.as_millis() as u64);
            info!(event = "resumed", pipeline = %pipeline.name, stream = %pipeline.stream, lasted_ms, "reading goes on");
        }
    }
}
