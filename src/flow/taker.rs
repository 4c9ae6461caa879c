//! Taker: takes entries from Valkey and hands batches to the settler.
//!
//! Takes a session and what bounds a batch; gives batches: its own backlog first, then fresh entries, now and then
//! those of dead consumers. On a fault it drops the session, waits, and goes on with a new one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::batch::Batch;
use super::handoff::{Held, Outlets, Shared};
use super::liveness::{Met, Silence};
use super::member::Membership;
use super::read::Reader;
use super::reclaim::{self, Claimed, Patience, Reclaimer};
use super::session::{Identity, Session};
use super::setup::WorkerSetup;
use crate::failpoint;
use crate::model::entry::EntryId;
use crate::retry::{Fault, Incident, Verdict, judge};
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
    /// None once it has left.
    pub(super) outlets: Option<Outlets>,
    pub(super) sent: u64,
    /// The entry that was handed over last, if it was tried alone.
    pub(super) suspect: Option<EntryId>,
    /// The server that it met, and when.
    pub(super) met: Option<Met>,
    /// Whether the group was there before, so that it is an incident when it is not.
    pub(super) has_group: bool,
    /// Where the delivery is exclusive: until when it reads.
    pub(super) membership: Option<Membership>,
    pub(super) incident: Incident,
}

/// How a session ended, if not by a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// By a stop: everything that was asked for is taken.
    Stopped,
    /// Everything that the group gave out is settled: what follows can be read alone.
    Alone,
    /// The lease is another process's.
    Displaced,
    /// The settler has ended (its task panicked): this worker is at its end.
    ReceiverGone,
}

/// Whether a batch can be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// To this settler.
    Free(usize),
    /// A stop came first, and nothing is to be taken any more.
    Stopped,
    ReceiverGone,
}

/// How a wait for what is held ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    Over,
    /// A stop came first.
    Stopped,
    ReceiverGone,
}

/// What a taker does next, beside reading, and when.
#[derive(Debug)]
pub(super) struct Plan {
    /// Whether its own backlog is to be looked at; for this nothing may be held.
    pub(super) own: bool,
    /// Whether somebody dead holds entries.
    pub(super) dead: bool,
    /// Whether nobody else was at work at the last look.
    pub(super) is_sole: bool,
    /// How many entries were pending under its own name at the last look.
    pub(super) own_pending: u64,
    survey_at: Instant,
    /// When its own backlog is looked at although the worker has to settle what it holds for it.
    own_at: Instant,
    speak_at: Instant,
}

/// How often a worker under load settles all it holds to see whether more is pending under its name.
const OWN_EVERY: Duration = Duration::from_secs(5);

impl Taker {
    /// Takes until it is told to stop, over as many sessions as it takes; where the delivery is exclusive, until the stream can be read
    /// alone. Says whether it can.
    pub async fn run(mut self, stop: Stop) -> bool {
        while !stop.is_asked() && self.membership.as_ref().is_none_or(Membership::lasts) {
            let mut session = match Session::open(&self.setup.valkey, &self.identity, self.setup.limits.bounds()).await
            {
                Ok(session) => session,
                Err(fault) => {
                    self.met(&fault, &stop).await;
                    continue;
                }
            };
            Met::meet(&mut self.met, session.link.generation());
            match self.take_over(&mut session, &stop).await {
                Ok(Ended::Stopped) => self.leave(&session, &stop).await,
                Ok(Ended::ReceiverGone) => return false,
                Ok(Ended::Alone) => {
                    // If it cannot leave, whoever reads next takes its consumer for one that has died, and is careful.
                    let _ = self.reclaimer.leave(&session).await;
                    return true;
                }
                Ok(Ended::Displaced) => return false,
                Err(fault) => {
                    self.reclaimer.left_behind(session.consumer.clone());
                    // Closed first: what it read and lost is taken back by the next session.
                    drop(session);
                    self.met(&fault, &stop).await;
                }
            }
        }
        false
    }

    /// One session's life: until it breaks, or a stop. Creates the group where a read finds none.
    async fn take_over(&mut self, session: &mut Session, stop: &Stop) -> Result<Ended, Fault> {
        let now = Instant::now();
        let speak_at = now + self.setup.sign_of_life_every();
        let own_at = now + OWN_EVERY;
        let mut plan =
            Plan { own: true, dead: false, is_sole: false, own_pending: 0, survey_at: now, own_at, speak_at };
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
            if Instant::now() >= plan.survey_at && !self.shared.is_failing() {
                self.survey(session, plan).await?;
            }
            if !self.membership.as_ref().is_none_or(Membership::lasts) {
                return Ok(Ended::Displaced);
            }
            if session.is_quiet() && self.may_read_alone(plan) && !stop.is_asked() {
                match self.wait_until_settled(session, stop).await? {
                    Wait::Over if self.is_alone(session, plan).await? => return Ok(Ended::Alone),
                    Wait::Over | Wait::Stopped => {}
                    Wait::ReceiverGone => return Ok(Ended::ReceiverGone),
                }
            }
            let claimed = if !session.is_quiet() || !(plan.own || plan.dead) {
                let only_asked = plan.own || plan.dead || stop.is_asked() || self.may_read_alone(plan);
                let (to, batch) = match self.wait_for_room(session, stop).await? {
                    Room::Free(to) => {
                        let _step = self.setup.metrics.steps.begin("read", Instant::now());
                        (to, self.reader.fill(session, stop, only_asked).await?)
                    }
                    Room::Stopped => continue,
                    Room::ReceiverGone => return Ok(Ended::ReceiverGone),
                };
                self.works_again();
                self.read_as_member(batch.as_ref().map_or(0, Batch::len));
                if batch.is_some() {
                    self.send(to, &session.link, Claimed { batch, ..Claimed::default() }).await;
                }
                continue;
            } else if plan.own {
                if self.wait_until_settled(session, stop).await? == Wait::ReceiverGone {
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
                let pipeline = &self.setup.pipeline.name;
                info!(event = "reclaimed", %pipeline, worker = %self.identity.worker, entries, gone = claimed.gone.len(), "reclaimed");
                match self.wait_for_room(session, stop).await? {
                    Room::Free(to) => self.send(to, &session.link, claimed).await,
                    Room::Stopped => {}
                    Room::ReceiverGone => return Ok(Ended::ReceiverGone),
                }
            }
        }
        Ok(Ended::Stopped)
    }

    /// Looks at the group's consumers: whether somebody dead holds entries, and whether this one may hold some unknown to it.
    /// One round trip while all are well, beside the reads under way.
    pub(super) async fn survey(&mut self, session: &Session, plan: &mut Plan) -> Result<(), Fault> {
        let survey = self.reclaimer.survey(session, self.silence()).await?;
        plan.dead = !survey.dead.is_empty();
        (plan.is_sole, plan.own_pending) = (survey.alive == 0, survey.own_pending);
        self.mourn(survey.died);
        self.setup.lanes[0].turn().set_peers(survey.has_peers);
        let holds_nothing = *self.shared.done.borrow() == self.sent && session.is_quiet();
        plan.own |= survey.own_pending > 0 && (holds_nothing || Instant::now() >= plan.own_at);
        plan.survey_at = Instant::now() + self.setup.sweep_every;
        Ok(())
    }

    /// The group is not there: creates it. That it was never there is no incident.
    async fn regroup(&mut self, fault: &Fault, session: &Session, stop: &Stop) -> Result<(), Fault> {
        // First: where the stream has moved in a cluster, that is what is told.
        let is_created = self.reader.create_group(&session.link).await?;
        if self.has_group {
            self.met(fault, stop).await;
        }
        if is_created {
            info!(worker = %self.identity.worker, stream = %self.setup.pipeline.stream, "created the consumer group");
            self.setup.regrouped.notify_one();
        }
        self.has_group = true;
        Ok(())
    }

    fn silence(&self) -> Silence {
        let Patience { gone_after, dead_after, .. } = self.setup.patience;
        Met::silence(&self.met, gone_after, dead_after)
    }

    pub(super) async fn keep_alive(&self, session: &mut Session) -> Result<(), Fault> {
        self.reader.keep_alive(session, self.reclaimer.former()).await
    }

    async fn send(&mut self, to: usize, link: &Arc<Link>, claimed: Claimed) {
        let Claimed { batch, gone, suspect, .. } = claimed;
        let held = Held { link: link.clone(), batch, gone, suspect, place: None };
        let Some(outlets) = &mut self.outlets else { return };
        if let Some(batch) = &held.batch {
            self.setup.metrics.recorder.was_read(&batch.origin().trace, batch.len());
        }
        self.suspect = held.suspect;
        // Fails only if the settler is gone, which the next wait for room tells.
        if outlets.send(to, held).await {
            self.sent += 1;
        }
    }

    /// Waits until a batch can be handed over, showing signs of life.
    pub(super) async fn wait_for_room(&self, session: &mut Session, stop: &Stop) -> Result<Room, Fault> {
        let Some(outlets) = &self.outlets else { return Ok(Room::ReceiverGone) };
        let mut room = std::pin::pin!(outlets.room());
        loop {
            tokio::select! {
                room = &mut room => return Ok(room.map_or(Room::ReceiverGone, Room::Free)),
                () = stop.asked(), if session.is_quiet() => return Ok(Room::Stopped),
                () = stop.forced() => return Ok(Room::Stopped),
                () = tokio::time::sleep(self.setup.sign_of_life_every()) => self.keep_alive(session).await?,
            }
        }
    }

    /// Waits until nothing is held, showing signs of life; or until a stop.
    async fn wait_until_settled(&self, session: &mut Session, stop: &Stop) -> Result<Wait, Fault> {
        let mut settled = std::pin::pin!(self.shared.is_done_with(self.sent));
        let Some(outlets) = &self.outlets else { return Ok(Wait::ReceiverGone) };
        loop {
            tokio::select! {
                () = &mut settled => return Ok(Wait::Over),
                () = outlets.closed() => return Ok(Wait::ReceiverGone),
                () = stop.asked() => return Ok(Wait::Stopped),
                () = tokio::time::sleep(self.setup.sign_of_life_every()) => self.keep_alive(session).await?,
            }
        }
    }

    /// Waits for what is held to be settled, then takes the consumer out of the group. A stop that leaves an entry pending
    /// is not its fault.
    async fn leave(&mut self, session: &Session, stop: &Stop) {
        self.outlets = None;
        tokio::select! {
            () = self.shared.is_done_with(self.sent) => {}
            () = stop.forced() => {
                if let Some(id) = self.suspect {
                    let pipeline = &self.setup.pipeline;
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
        let wait = self.setup.met_reading(&mut self.incident, fault);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.asked() => {}
        }
    }

    pub(super) fn works_again(&mut self) {
        self.setup.reads_again(&mut self.incident);
    }
}
