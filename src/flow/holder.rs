//! Holder: reads the streams whose leases this process holds.
//!
//! Takes the leases of a pipeline's streams; hands on batches of entries that nothing marks as pending, each of any number of streams. All are
//! read over one connection, by reads that name many of them ([`super::rounds`]). It begins a stream at the group's position when nobody
//! else is at work on it and nothing is pending; until then a worker of the group reads that stream ([`super::taker`]), like any other, so that an
//! entry that kills its readers is found by its deliveries. On a fault it drops the session, waits, and goes on with a new one.

mod admission;
mod reading;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::time::sleep_until;

use super::batch::Batch;
use super::handoff::{Held, Outlets, Shared};
use super::lease::Leases;
use super::liveness::Met;
use super::news::News;
use super::read::{self, FIRST_READ};
use super::rounds::Rounds;
use super::session::{Identity, Session};
use super::setup::WorkerSetup;
use super::tenure::{Place, Tenure};
use crate::failpoint;
use crate::model::entry::EntryId;
use crate::retry::{Fault, Incident, Verdict, judge};
use crate::shutdown::Stop;
use crate::valkey::Command;

/// How many streams are asked about at once.
const ASKED_AT_ONCE: usize = 64;
/// How many positions are looked at for each sign of life, though nothing was settled.
const LOOKED_AT_ONCE: usize = 256;
/// How many streams one sign of life names.
const SIGNED_AT_ONCE: usize = 500;
/// When a stream is looked at again that could not be read alone.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The time between two looks at the leases, for each stream, where nothing has changed.
const LOOK_FOR_EACH: Duration = Duration::from_micros(200);
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
    /// How far away the server is, to and fro; none until it has answered.
    away: Option<Duration>,
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

/// How a session ended, if not by a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Stopped,
    /// There is nothing that this process reads alone.
    Idle,
    /// A settler has ended (its task panicked): this worker is at its end.
    ReceiverGone,
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
            away: None,
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
            self.away = None;
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
            let sent = Instant::now();
            match session.link.commands().call(self.sign_of_life(session, some)).await {
                // Which of them has no group any more, the look at its position says.
                Err(fault) if judge(&fault, 1).verdict == Verdict::Regroup => {}
                answer => drop(answer?),
            }
            // An answer that was held up says little, two in a row say more.
            self.away = Some(self.away.map_or(sent.elapsed(), |away| sent.elapsed().min(2 * away)));
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
