//! Holder: reads the streams whose leases this process holds.
//!
//! Takes the leases of a pipeline's streams; hands on batches of entries that nothing marks as pending, each of any number of streams. All are
//! read over one connection, by reads that name many of them ([`super::rounds`]). It begins a stream at the group's position when nobody
//! else is at work on it and nothing is pending; until then a worker of the group reads that stream ([`super::taker`]), like any other, so that an
//! entry that kills its readers is found by its deliveries. On a fault it drops the session, waits, and goes on with a new one.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, info};

use super::batch::{Batch, Filling, Origin};
use super::handoff::{Held, Outlets, Shared};
use super::lease::{FEW, Leases};
use super::liveness::{Met, remove_if_empty};
use super::news::News;
use super::position;
use super::read::{self, FIRST_READ, Reader, backlog, put};
use super::reclaim::Reclaimer;
use super::rounds::{Room, Round, Rounds};
use super::session::{Identity, Session};
use super::setup::WorkerSetup;
use super::tenure::{End, Place, Tenure};
use crate::failpoint;
use crate::model::entry::EntryId;
use crate::model::names;
use crate::retry::{Fault, Incident, Verdict, judge};
use crate::shutdown::Stop;
use crate::telemetry::trace::Trace;
use crate::valkey::{Arrived, Command, Progress};

/// How many entries of one stream one read asks for at the most, in reads of the usual size: the next read can be sent only when the last id of
/// this one is known.
const READS_AT_ONCE: usize = 8;
/// How many entries one read may bring in all, in batches.
const BATCHES_IN_A_READ: usize = 4;
/// How many streams are asked about at once.
const ASKED_AT_ONCE: usize = 64;
/// How many positions are looked at for each sign of life, though nothing was settled.
const LOOKED_AT_ONCE: usize = 256;
/// How many streams one sign of life names.
const SIGNED_AT_ONCE: usize = 500;
/// How many streams are read by workers of the group at once, on connections of their own.
const MEMBERS: usize = 32;
/// When a stream is looked at again that could not be read alone.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The time between two looks at the leases, for each stream, where nothing has changed.
const LOOK_FOR_EACH: Duration = Duration::from_micros(200);
/// How long a read waits for entries, for each stream that it names, at the least: what it costs a server to begin to wait and to end it grows with
/// them. It ends at once where a lease changes.
const WAIT_FOR_EACH: Duration = Duration::from_micros(200);
/// How long a read waits for entries while something is to be given up.
const SHORT_WAIT: Duration = Duration::from_millis(10);
/// How many of its earlier consumers it removes from a group.
const MOST_FORMER: usize = 4;

/// A stream that is to be read by a worker of the group.
#[derive(Debug, Clone, Copy)]
pub struct Enlisted {
    /// Its lane.
    pub lane: usize,
    /// How many entries one who died may have held.
    pub doubtful: u64,
}

/// A worker of the group has left.
#[derive(Debug, Clone, Copy)]
pub struct Returned {
    /// The lane of its stream.
    pub lane: usize,
    /// Whether everything that the group gave out is settled and nobody else is at work.
    pub is_alone: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Holder {
    setup: WorkerSetup,
    identity: Identity,
    leases: Leases,
    shared: Arc<Shared>,
    /// None once it has left.
    outlets: Option<Outlets>,
    sent: u64,
    /// Of each stream how it stands.
    streams: Vec<Standing>,
    rounds: Rounds,
    news: Arc<News>,
    enlisted: mpsc::UnboundedSender<Enlisted>,
    returned: mpsc::UnboundedReceiver<Returned>,
    /// Its consumers of earlier sessions.
    former: Vec<Arc<str>>,
    met: Option<Met>,
    incident: Incident,
    /// What an entry took lately: keeps a reply within the batch's bytes.
    bytes_per_entry: usize,
    /// The last batch's entries and bytes: the next one will be much like it.
    last: (usize, usize),
    /// When the leases are looked at next.
    look_at: Instant,
    /// The stream whose position is looked at next.
    next_looked: usize,
    /// The stream whose group is told next that this process lives.
    next_signed: usize,
}

/// How a stream stands.
#[derive(Debug)]
enum Standing {
    /// The lease is not this process's.
    Away,
    /// The lease is held: whether the stream can be read alone is looked at then.
    Due(Instant),
    /// It can be read alone: a worker of the group has seen to it.
    Ready,
    /// A worker of the group reads it.
    Enlisted,
    /// It is read alone, behind this entry.
    Alone(Arc<Tenure>, EntryId),
    /// It is to be given up as soon as what was read is settled.
    Leaving(Arc<Tenure>),
}

/// A read whose answer has not come whole.
#[derive(Debug)]
struct Asked {
    round: Round,
    /// Which of the round's streams the entries are of that come now.
    at: usize,
    has_begun: bool,
    /// What has come of each stream, by its lane.
    got: Vec<(usize, usize)>,
}

/// How a session ended, if not by a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Stopped,
    /// There is nothing that this process reads alone.
    Idle,
    /// A settler has ended (its task panicked): this worker is at its end.
    ReceiverGone,
}

/// Whether a stream can be read alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Alone,
    /// Others are at work, or were, and there is something to be read.
    Enlist {
        doubtful: bool,
    },
    /// Others may be at work, and there is nothing to be read.
    Later,
}

impl Holder {
    /// Reads the streams of these leases, and hands batches over to these settlers. Streams that cannot be read alone yet are sent to be read by
    /// workers of the group, and come back.
    pub(super) fn new(
        setup: WorkerSetup,
        identity: Identity,
        leases: Leases,
        (shared, outlets): (Arc<Shared>, Outlets),
        (enlisted, returned): (mpsc::UnboundedSender<Enlisted>, mpsc::UnboundedReceiver<Returned>),
    ) -> Holder {
        let now = Instant::now();
        Holder {
            identity,
            shared,
            outlets: Some(outlets),
            sent: 0,
            streams: leases.all.iter().map(|_| Standing::Away).collect(),
            rounds: Rounds::new(now),
            news: Arc::new(News::of(leases.all.iter().map(|lease| &*lease.claim.stream))),
            leases,
            enlisted,
            returned,
            former: Vec::new(),
            met: None,
            incident: setup.metrics.reading.incident(),
            // Large until the first entries are seen, so that the first read is a small one.
            bytes_per_entry: setup.limits.max_bytes / FIRST_READ,
            last: (0, 0),
            look_at: now,
            next_looked: 0,
            next_signed: 0,
            setup,
        }
    }

    /// Reads until it is told to stop, over as many sessions as it takes.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            self.note_returned();
            // Nothing is read: what is to be given up is given up.
            if self.look_at_leases().is_ok() && !self.streams.iter().any(Standing::wants_session) {
                self.setup.reads_again(&mut self.incident);
                tokio::select! {
                    () = self.leases.changed.notified() => {}
                    Some(returned) = self.returned.recv() => self.takes_back(returned),
                    () = tokio::time::sleep(self.setup.lease) => {}
                    () = stop.asked() => break,
                }
                continue;
            }
            let mut session = match Session::open(&self.setup.valkey, &self.identity, self.setup.limits.bounds()).await
            {
                Ok(session) => session,
                Err(fault) => {
                    self.met(&fault, &stop).await;
                    continue;
                }
            };
            Met::meet(&mut self.met, session.link.generation());
            let (news, link) = (self.news.clone(), session.link.clone());
            let ended = tokio::select! {
                ended = self.serve(&mut session, &stop) => ended,
                never = news.listen(&link) => match never {},
            };
            news.is_over();
            match ended {
                Ok(Ended::Stopped) => return self.leave(&session, &stop).await,
                Ok(Ended::ReceiverGone) => return,
                Ok(Ended::Idle) => self.forget(session.consumer.clone()),
                Err(fault) => {
                    self.forget(session.consumer.clone());
                    drop(session);
                    self.met(&fault, &stop).await;
                }
            }
        }
    }

    /// The session has ended: every stream begins again at its group's position.
    fn forget(&mut self, consumer: Arc<str>) {
        for stream in &mut self.streams {
            if matches!(stream, Standing::Alone(..) | Standing::Leaving(_)) {
                *stream = Standing::Away;
            }
        }
        self.rounds.over(Vec::new());
        if self.former.len() == MOST_FORMER {
            self.former.remove(0);
        }
        self.former.push(consumer);
    }

    /// One session's life: until it breaks, or a stop.
    async fn serve(&mut self, session: &mut Session, stop: &Stop) -> Result<Ended, Fault> {
        let (mut speak_at, mut asked) = (Instant::now(), None);
        // A read under way leaves no mark behind: a stop need not wait for it.
        while !stop.is_asked() {
            if session.is_lost() {
                return Err(Fault::ValkeyLost("the connection to Valkey was given up".into()));
            }
            // While an answer is coming, the streams that it is of stay as they are.
            if asked.is_none() {
                self.look_around(session).await?;
                if Instant::now() >= speak_at {
                    self.keep_alive(session, true).await?;
                    speak_at = Instant::now() + self.setup.sign_of_life_every();
                }
                if self.rounds.is_empty() {
                    let until = self.look_at.min(speak_at);
                    tokio::select! {
                        () = self.leases.changed.notified() => self.look_at = Instant::now(),
                        Some(returned) = self.returned.recv() => self.takes_back(returned),
                        () = sleep_until(until.into()) => {}
                        () = stop.asked() => {}
                    }
                    if !self.streams.iter().any(Standing::wants_session) {
                        return Ok(Ended::Idle);
                    }
                    continue;
                }
            }
            let Some(outlets) = &self.outlets else { return Ok(Ended::ReceiverGone) };
            let pause = &self.setup.pause;
            let to = tokio::select! {
                to = async { pause.over().await; outlets.room().await } => to,
                () = sleep_until(speak_at.into()) => {
                    self.keep_alive(session, asked.is_none()).await?;
                    speak_at = Instant::now() + self.setup.sign_of_life_every();
                    continue;
                }
                () = stop.asked() => break,
            };
            let Ok(to) = to else { return Ok(Ended::ReceiverGone) };
            let step = self.setup.metrics.steps.clone();
            let step = step.begin("read", Instant::now());
            let filled = self.fill(session, &mut asked, stop).await;
            drop(step);
            let batch = match filled {
                Err(fault @ Fault::Valkey { .. }) => {
                    self.set_apart(session, fault).await?;
                    continue;
                }
                batch => batch?,
            };
            failpoint::reached("alone.read");
            self.setup.reads_again(&mut self.incident);
            if let Some(batch) = batch {
                let place = Some(self.place_of(&batch));
                let held =
                    Held { link: session.link.clone(), batch: Some(batch), gone: Vec::new(), suspect: None, place };
                self.hand_over(to, held).await;
            }
        }
        Ok(Ended::Stopped)
    }

    async fn hand_over(&mut self, to: usize, held: Held) {
        let Some(outlets) = &mut self.outlets else { return };
        if let Some(batch) = &held.batch {
            self.setup.metrics.recorder.was_read(&batch.origin().trace, batch.len());
        }
        // Fails only if the settler is gone, which the next wait for room tells.
        if outlets.send(to, held).await {
            self.sent += 1;
        }
    }

    /// Where in the tenures of its streams a batch belongs. What is of a stream that is no longer read alone belongs nowhere: the ledger
    /// recognises it when it comes again.
    fn place_of(&self, batch: &Batch) -> Place {
        let mut place = Place::default();
        for run in batch.runs() {
            let (lane, last) = (batch.lane_of(run), &batch.entries()[run.end - 1]);
            if let Standing::Alone(tenure, _) | Standing::Leaving(tenure) = &self.streams[lane] {
                place.add(lane, tenure, last.id, run.len() as u64);
            }
        }
        place
    }

    // The streams, one by one.

    /// Begins what can be begun, ends what is to be ended.
    async fn look_around(&mut self, session: &mut Session) -> Result<(), Fault> {
        if self.leases.changed.notified().now_or_never().is_some() {
            self.look_at = Instant::now();
        }
        self.note_returned();
        let now = Instant::now();
        if now < self.look_at {
            return Ok(());
        }
        self.look_at_leases()?;
        self.give_up(session).await;
        let due: Vec<usize> = (0..self.streams.len()).filter(|lane| self.streams[*lane].is_due(now)).collect();
        for some in due.chunks(ASKED_AT_ONCE) {
            self.admit(session, some).await?;
        }
        let alone = |lane: &usize| matches!(self.streams[*lane], Standing::Alone(..));
        self.rounds.over((0..self.streams.len()).filter(alone).collect());
        let soon = self.streams.iter().any(|stream| matches!(stream, Standing::Leaving(_)));
        let next_due = self.streams.iter().filter_map(Standing::due).min();
        let often = LOOK_FOR_EACH * self.streams.len() as u32;
        let later = if soon { SHORT_WAIT } else { LOOK_AGAIN };
        self.look_at = now + later.max(often);
        self.look_at = next_due.map_or(self.look_at, |due| self.look_at.min(due.max(now + often)));
        Ok(())
    }

    fn note_returned(&mut self) {
        while let Ok(returned) = self.returned.try_recv() {
            self.takes_back(returned);
        }
    }

    fn takes_back(&mut self, Returned { lane, is_alone }: Returned) {
        self.streams[lane] = if is_alone { Standing::Ready } else { Standing::Due(Instant::now() + LOOK_AGAIN) };
        self.look_at = Instant::now();
    }

    /// Compares each stream with its lease. Fails where the session is of no more use.
    fn look_at_leases(&mut self) -> Result<(), Fault> {
        let now = Instant::now();
        for (lease, stream) in self.leases.all.iter().zip(&mut self.streams) {
            let next = match stream {
                Standing::Away | Standing::Due(_) | Standing::Ready if lease.is_to_be_yielded() => {
                    lease.give_up();
                    Standing::Away
                }
                Standing::Away if lease.is_held() => Standing::Due(now),
                Standing::Due(_) | Standing::Ready if !lease.is_held() => Standing::Away,
                Standing::Alone(tenure, _) | Standing::Leaving(tenure) => {
                    let why = match tenure.ended() {
                        Some(End::Fault(fault)) if judge(&fault, 1).verdict == Verdict::Regroup => {
                            self.setup.met_reading(&mut self.incident, &fault);
                            "the group is gone"
                        }
                        Some(End::Fault(fault)) => return Err(fault),
                        Some(End::Displaced(why)) => why,
                        None if !lease.is_held() => "the lease has run out",
                        None if lease.is_to_be_yielded() => {
                            *stream = Standing::Leaving(tenure.clone());
                            continue;
                        }
                        None => continue,
                    };
                    let (pipeline, stream) = (&self.setup.pipeline.name, &lease.claim.stream);
                    info!(event = "displaced", %pipeline, %stream, why, "reading alone is given up; it begins again at the group's position");
                    Standing::Due(now)
                }
                Standing::Away | Standing::Due(_) | Standing::Ready | Standing::Enlisted => continue,
            };
            *stream = next;
        }
        Ok(())
    }

    /// Gives up what is to be given up and settled.
    async fn give_up(&mut self, session: &Session) {
        for lane in 0..self.streams.len() {
            let Standing::Leaving(tenure) = &self.streams[lane] else { continue };
            if tenure.is_settled() {
                // What is moved over by now need not be read again by whoever comes next.
                Tenure::advance(std::slice::from_ref(tenure)).await;
                self.leave_group(session, lane).await;
                self.leases.all[lane].give_up();
                self.streams[lane] = Standing::Away;
            }
        }
    }

    /// If it cannot leave, whoever reads next takes its consumer for one that has died, and is careful.
    async fn leave_group(&self, session: &Session, lane: usize) {
        let claim = &self.leases.all[lane].claim;
        let left =
            remove_if_empty(&session.link, (&claim.stream, &claim.group), &session.consumer, Duration::ZERO).await;
        if let Err(fault) = left {
            debug!(worker = %self.identity.worker, %fault, "could not leave a group; a peer removes this consumer later");
        }
    }

    /// Looks whether these streams can be read alone, and begins those that can.
    async fn admit(&mut self, session: &mut Session, lanes: &[usize]) -> Result<(), Fault> {
        let looks = join_all(lanes.iter().map(|lane| self.look_at_group(session, *lane))).await;
        let mut begun = Vec::new();
        for (lane, look) in lanes.iter().copied().zip(looks) {
            match look {
                Ok(Admission::Alone) => begun.push(lane),
                Ok(Admission::Enlist { doubtful }) => self.enlist(lane, doubtful),
                Ok(Admission::Later) => self.streams[lane] = Standing::Due(Instant::now() + LOOK_AGAIN),
                Err(fault) => self.cannot_begin(lane, fault)?,
            }
        }
        let tenures = join_all(begun.iter().map(|lane| self.begin(session, *lane))).await;
        for (lane, tenure) in begun.into_iter().zip(tenures) {
            match tenure {
                Ok((tenure, from)) => self.streams[lane] = Standing::Alone(tenure, from),
                Err(fault) => self.cannot_begin(lane, fault)?,
            }
        }
        Ok(())
    }

    /// What the server refuses for one of many streams is none of the others' business: a worker of the group meets the fault by itself.
    fn cannot_begin(&mut self, lane: usize, fault: Fault) -> Result<(), Fault> {
        match fault {
            Fault::Valkey { .. } if self.streams.len() > 1 => self.enlist(lane, false),
            fault => return Err(fault),
        }
        Ok(())
    }

    /// Has a stream read by a worker of the group, if there are not too many of these at work.
    fn enlist(&mut self, lane: usize, doubtful: bool) {
        let enlisted = self.streams.iter().filter(|stream| matches!(stream, Standing::Enlisted)).count();
        self.streams[lane] = if enlisted < MEMBERS {
            let doubtful = if doubtful { self.setup.most_in_doubt() } else { 0 };
            // If nobody hears it, everything is at its end.
            let _ = self.enlisted.send(Enlisted { lane, doubtful });
            Standing::Enlisted
        } else {
            Standing::Due(Instant::now() + LOOK_AGAIN)
        };
    }

    /// A read was refused: of many streams, those that refuse another question too are read by workers of the group, which meet the fault by
    /// themselves. Fails where that is no help.
    async fn set_apart(&mut self, session: &Session, refused: Fault) -> Result<(), Fault> {
        let alone = |lane: &usize| matches!(self.streams[*lane], Standing::Alone(..));
        let lanes: Vec<usize> = (0..self.streams.len()).filter(alone).collect();
        let mut faulty = Vec::new();
        for some in lanes.chunks(ASKED_AT_ONCE) {
            let ask = |lane: &usize| position::of_group(&session.link, &self.leases.all[*lane].claim);
            let answers = join_all(some.iter().map(ask)).await;
            faulty.extend(some.iter().zip(answers).filter(|(_, answer)| answer.is_err()).map(|(lane, _)| *lane));
        }
        if faulty.is_empty() || faulty.len() == lanes.len() {
            return Err(refused);
        }
        faulty.into_iter().for_each(|lane| self.enlist(lane, false));
        self.look_at = Instant::now();
        Ok(())
    }

    /// Whether anybody else is at work on a stream, or was and may have been killed by an entry. Creates the group where there is none.
    async fn look_at_group(&self, session: &Session, lane: usize) -> Result<Admission, Fault> {
        if matches!(self.streams[lane], Standing::Ready) {
            return Ok(Admission::Alone);
        }
        let pipeline = self.setup.lanes[lane].pipeline();
        let process = names::consumers_of(&names::host(), std::process::id());
        let (patience, limits) = (self.setup.patience, self.setup.limits);
        let mut reclaimer = Reclaimer::new(pipeline, &self.identity.connections, process, patience, limits);
        self.former.iter().for_each(|former| reclaimer.left_behind(former.clone()));
        let silence = Met::silence(&self.met, patience.gone_after, patience.dead_after);
        let survey = match reclaimer.survey(session, silence).await {
            Err(fault) if judge(&fault, 1).verdict == Verdict::Regroup => {
                let reader = Reader::new(pipeline, limits, self.setup.block());
                if reader.create_group(&session.link).await? {
                    info!(worker = %self.identity.worker, stream = %pipeline.stream, "created the consumer group");
                    self.setup.regrouped.notify_one();
                }
                return Ok(Admission::Alone);
            }
            survey => survey?,
        };
        let (doubtful, is_sole) = (survey.died > 0, survey.alive == 0);
        if !survey.dead.is_empty() || survey.own_pending > 0 {
            return Ok(Admission::Enlist { doubtful });
        }
        if is_sole && !doubtful {
            return Ok(Admission::Alone);
        }
        let is_empty = backlog(&session.link, &pipeline.stream, &pipeline.group()).await?.is_empty;
        Ok(match (is_empty, is_sole) {
            (false, _) => Admission::Enlist { doubtful },
            // Nothing is there that could have killed it.
            (true, true) => Admission::Alone,
            (true, false) => Admission::Later,
        })
    }

    /// Begins to read a stream alone, where its group stands.
    async fn begin(&self, session: &Session, lane: usize) -> Result<(Arc<Tenure>, EntryId), Fault> {
        let lease = &self.leases.all[lane];
        let claim = lease.claim.clone();
        session.link.commands().call(self.sign_of_life(session, &[lane])).await?;
        for former in &self.former {
            remove_if_empty(&session.link, (&claim.stream, &claim.group), former, Duration::ZERO).await?;
        }
        let position = position::of_group(&session.link, &claim).await?;
        failpoint::reached("alone.begins");
        if self.streams.len() <= FEW {
            let (pipeline, from) = (&self.setup.pipeline.name, position.id);
            info!(event = "reads_alone", %pipeline, stream = %claim.stream, %from, "reading alone, from the group's position on");
        }
        Ok((Arc::new(Tenure::new(session.link.clone(), claim, lease.doubt(), position)), position.id))
    }

    // Reading.

    /// Waits for entries, then takes what there is, up to the limits of a batch.
    async fn fill(
        &mut self,
        session: &mut Session,
        asked: &mut Option<Asked>,
        stop: &Stop,
    ) -> Result<Option<Batch>, Fault> {
        let (generation, trace) = (session.link.generation().clone(), Trace::of_batch("read"));
        let origin = Origin { generation, consumer: session.consumer.clone(), trace: trace.clone() };
        let mut filling = Filling::new(origin, self.setup.limits.max_entry_bytes);
        filling.make_room(self.last.0, self.last.1);
        let filled = loop {
            if asked.is_none() {
                let now = Instant::now();
                self.rounds.hear(self.news.take());
                if let (true, Some(at)) = (filling.is_empty(), self.rounds.idle_until(now)) {
                    self.wait_for_news(at, stop).await;
                    break Ok(());
                }
                let Some(room) = self.room(&filling) else { break Ok(()) };
                let Some(round) = self.rounds.next(room, !filling.is_empty(), now) else { break Ok(()) };
                if round.waits && !self.may_wait(stop).await {
                    break Ok(());
                }
                session.wire.send(&self.read(&round));
                *asked = Some(Asked { round, at: 0, has_begun: false, got: Vec::new() });
            }
            let received = self.receive(session, asked, &mut filling, stop).await;
            // The wait for the first entries is none of its work.
            trace.begins();
            match received {
                // It has waited, and nothing came.
                Ok(Progress::Whole) if filling.is_empty() => break Ok(()),
                Ok(Progress::Whole) => {}
                Ok(Progress::Paused) => break Ok(()),
                Err(fault) => break Err(fault),
            }
        };
        // What was read before a fault is good, and the next call meets the fault again.
        if let Err(fault) = filled {
            *asked = None;
            self.rounds.over(Vec::new());
            self.look_at = Instant::now();
            if filling.is_empty() {
                return Err(fault);
            }
        }
        self.last = (filling.len(), filling.bytes());
        Ok((!filling.is_empty()).then(|| filling.seal(false)))
    }

    /// How much more a batch has room for; none if it is full.
    fn room(&self, filling: &Filling) -> Option<Room> {
        let limits = &self.setup.limits;
        let by_bytes = limits.max_bytes.saturating_sub(filling.bytes()) / self.bytes_per_entry.max(1);
        let entries = limits.max_entries.saturating_sub(filling.len()).min(by_bytes);
        let of_one = (limits.read_count * READS_AT_ONCE).min(limits.max_entries);
        let of_all = (BATCHES_IN_A_READ * limits.max_bytes / self.bytes_per_entry.max(1))
            .min(BATCHES_IN_A_READ * limits.max_entries);
        // A batch ends with a piece that is worth a read; its first entry always finds room.
        let is_worth_it = filling.is_empty() || entries >= limits.read_count.min(limits.max_entries / 2);
        is_worth_it.then_some(Room { entries: entries.max(1), worth: limits.read_count, of_one, of_all })
    }

    /// Waits until a read that waits may be sent. False: something else is to be done first.
    async fn may_wait(&self, stop: &Stop) -> bool {
        let at = self.rounds.may_wait_at(Instant::now());
        tokio::select! {
            biased;
            () = stop.asked() => false,
            () = sleep_until(at.into()) => true,
        }
    }

    /// Waits until something is heard of, or until what was heard of may be read; no longer than a read would wait.
    async fn wait_for_news(&mut self, at: Instant, stop: &Stop) {
        let until = at.min(Instant::now() + self.wait());
        let has_news = self.rounds.has_news();
        tokio::select! {
            () = stop.asked() => {}
            () = sleep_until(until.into()) => {}
            () = self.leases.changed.notified() => self.look_at = Instant::now(),
            () = self.news.rung(), if !has_news => {}
        }
    }

    /// The read of a round.
    fn read(&self, round: &Round) -> Command {
        let streams = round.streams.iter().filter_map(|lane| match &self.streams[*lane] {
            Standing::Alone(_, after) => Some((&*self.leases.all[*lane].claim.stream, *after)),
            // A round names only what is read alone.
            _ => None,
        });
        read::behind(&streams.collect::<Vec<_>>(), round.count, round.waits.then(|| self.wait()))
    }

    fn wait(&self) -> Duration {
        let until = self.look_at.saturating_duration_since(Instant::now());
        self.block().min(until.max(SHORT_WAIT))
    }

    /// How long a read waits at the most.
    fn block(&self) -> Duration {
        self.setup.block().max(WAIT_FOR_EACH * self.streams.len() as u32)
    }

    /// Receives what answers the read under way, as far as the batch has room for it.
    async fn receive(
        &mut self,
        session: &mut Session,
        asked: &mut Option<Asked>,
        filling: &mut Filling,
        stop: &Stop,
    ) -> Result<Progress, Fault> {
        let Some(read) = asked else { return Ok(Progress::Whole) };
        let longest = self.setup.block().max(WAIT_FOR_EACH * self.streams.len() as u32);
        let block = if read.round.waits { longest } else { Duration::ZERO };
        let (had, weighed, limits) = (filling.len(), filling.bytes(), self.setup.limits);
        if read.has_begun {
            filling.begin_lane(read.round.streams[read.at]);
        }
        let (link, wire_id) = (session.link.clone(), session.wire_id);
        let (leases, streams) = (&self.leases, &mut self.streams);
        let received = {
            let mut receiving = std::pin::pin!(session.wire.run_of_many(block, |arrived| {
                match arrived {
                    Arrived::Stream(name) => {
                        let names = |lane: &usize| leases.all[*lane].claim.stream.as_bytes() == name;
                        let from = if read.has_begun { read.at + 1 } else { 0 };
                        let Some(further) = read.round.streams[from..].iter().position(names) else {
                            return ControlFlow::Break(());
                        };
                        (read.at, read.has_begun) = (from + further, true);
                        let lane = read.round.streams[read.at];
                        read.got.push((lane, 0));
                        filling.begin_lane(lane);
                    }
                    Arrived::Entry(delivered) => {
                        let id = delivered.id();
                        put(delivered, filling);
                        if let Some((lane, got)) = read.got.last_mut() {
                            *got += 1;
                            if let Standing::Alone(_, after) = &mut streams[*lane] {
                                *after = id;
                            }
                        }
                    }
                }
                let is_full = filling.bytes() >= limits.max_bytes || filling.len() >= limits.max_entries;
                if is_full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }));
            let is_interrupted = async {
                tokio::select! {
                    () = stop.asked() => {}
                    () = leases.changed.notified() => {}
                }
            };
            tokio::select! {
                biased;
                received = &mut receiving => received,
                () = is_interrupted, if !block.is_zero() => {
                    // A wait is ended by unblocking it, never by dropping it.
                    if let Some(id) = wire_id {
                        link.unblock(id).await;
                    }
                    self.look_at = Instant::now();
                    receiving.await
                }
            }
        };
        filling.close_run();
        if let Some(average) = (filling.bytes() - weighed).checked_div(filling.len() - had) {
            self.bytes_per_entry = average.max(1);
        }
        if matches!(received, Ok(Progress::Whole)) {
            self.rounds.answered(&read.round, &read.got);
            *asked = None;
        }
        received
    }

    // Signs of life.

    /// Tells the groups that this process lives; keeps both connections from being idle; looks whether positions are where they were left.
    /// `is_quiet`: whether no answer is coming over the wire.
    async fn keep_alive(&mut self, session: &mut Session, is_quiet: bool) -> Result<(), Fault> {
        let alone = |lane: &usize| matches!(self.streams[*lane], Standing::Alone(..) | Standing::Leaving(_));
        let lanes: Vec<usize> = (0..self.streams.len()).filter(alone).collect();
        // Of very many each is named when its time has come, and not whenever the connections need to be used.
        let signed: Vec<usize> = {
            let count = self.setup.signed_at_once(lanes.len());
            (0..count).map(|n| lanes[(self.next_signed + n) % lanes.len()]).collect()
        };
        self.next_signed = (self.next_signed + signed.len()) % lanes.len().max(1);
        for some in signed.chunks(SIGNED_AT_ONCE) {
            match session.link.commands().call(self.sign_of_life(session, some)).await {
                // Which of them has no group any more, the look at its position says.
                Err(fault) if judge(&fault, 1).verdict == Verdict::Regroup => {}
                answer => drop(answer?),
            }
        }
        if let Some(lane) = lanes.first().filter(|_| is_quiet) {
            session.wire.send(&self.sign_of_life(session, &[*lane]));
            match session.wire.run(Duration::ZERO, |_| ControlFlow::Continue(())).await {
                Err(fault) if judge(&fault, 1).verdict == Verdict::Regroup => {}
                answer => drop(answer?),
            }
        }
        let turn = (0..lanes.len().min(LOOKED_AT_ONCE)).map(|n| lanes[(self.next_looked + n) % lanes.len()]);
        let tenures: Vec<Arc<Tenure>> = turn.filter_map(|lane| self.streams[lane].tenure()).collect();
        self.next_looked = (self.next_looked + tenures.len()) % lanes.len().max(1);
        for some in tenures.chunks(ASKED_AT_ONCE) {
            Tenure::advance(some).await;
        }
        Ok(())
    }

    fn sign_of_life(&self, session: &Session, lanes: &[usize]) -> Command {
        let streams: Vec<&str> = lanes.iter().map(|lane| &*self.leases.all[*lane].claim.stream).collect();
        read::sign_of_life(&self.setup.pipeline.group(), &session.consumer, &streams)
    }

    /// Waits for what is held to be settled, then leaves the groups. What a stop leaves unsettled is read again by whoever comes next.
    async fn leave(&mut self, session: &Session, stop: &Stop) {
        self.outlets = None;
        tokio::select! {
            () = self.shared.is_done_with(self.sent) => {}
            () = stop.forced() => return,
        }
        failpoint::reached("stop.settled");
        let lanes: Vec<usize> = (0..self.streams.len()).filter(|lane| self.streams[*lane].tenure().is_some()).collect();
        for some in lanes.chunks(ASKED_AT_ONCE) {
            let holder = &*self;
            let tenures: Vec<Arc<Tenure>> = some.iter().filter_map(|lane| holder.streams[*lane].tenure()).collect();
            Tenure::advance(&tenures).await;
            join_all(some.iter().map(|lane| holder.leave_group(session, *lane))).await;
        }
    }

    async fn met(&mut self, fault: &Fault, stop: &Stop) {
        let wait = self.setup.met_reading(&mut self.incident, fault);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.asked() => {}
        }
    }
}

impl Standing {
    fn is_due(&self, now: Instant) -> bool {
        matches!(self, Standing::Ready) || self.due().is_some_and(|due| due <= now)
    }

    fn due(&self) -> Option<Instant> {
        match self {
            Standing::Due(at) => Some(*at),
            Standing::Ready => Some(Instant::now()),
            _ => None,
        }
    }

    fn tenure(&self) -> Option<Arc<Tenure>> {
        match self {
            Standing::Alone(tenure, _) | Standing::Leaving(tenure) => Some(tenure.clone()),
            _ => None,
        }
    }

    /// Whether anything is to be read, or asked, over a session.
    fn wants_session(&self) -> bool {
        !matches!(self, Standing::Away | Standing::Enlisted)
    }
}
