//! Admission: which streams are read alone, and from when on.
//!
//! Takes the leases as they are and what the group says of its consumers; begins to read a stream, has it read by a worker of the group, or gives it up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tracing::{debug, info};

use super::{ASKED_AT_ONCE, Enlisted, Holder, LOOK_AGAIN, Standing};
use crate::failpoint;
use crate::flow::lease::FEW;
use crate::flow::liveness::{Met, remove_if_empty};
use crate::flow::position;
use crate::flow::read::{Reader, backlog};
use crate::flow::reclaim::Reclaimer;
use crate::flow::session::Session;
use crate::flow::tenure::{End, Tenure};
use crate::model::entry::EntryId;
use crate::model::names;
use crate::retry::{Fault, Verdict, judge};

/// How many streams are read by workers of the group at once, on connections of their own.
const MEMBERS: usize = 32;

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
    /// Compares each stream with its lease. Fails where the session is of no more use.
    pub(super) fn look_at_leases(&mut self) -> Result<(), Fault> {
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
    pub(super) async fn give_up(&mut self, session: &Session) {
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
    pub(super) async fn leave_group(&self, session: &Session, lane: usize) {
        let claim = &self.leases.all[lane].claim;
        let left =
            remove_if_empty(&session.link, (&claim.stream, &claim.group), &session.consumer, Duration::ZERO).await;
        if let Err(fault) = left {
            debug!(worker = %self.identity.worker, %fault, "could not leave a group; a peer removes this consumer later");
        }
    }

    /// Looks whether these streams can be read alone, and begins those that can.
    pub(super) async fn admit(&mut self, session: &mut Session, lanes: &[usize]) -> Result<(), Fault> {
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
    pub(super) async fn set_apart(&mut self, session: &Session, refused: Fault) -> Result<(), Fault> {
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
}
