//! Alone: how the holder of a lease reads a stream.
//!
//! Takes a session and the lease; hands on batches as [`super::taker`] does, of entries that nothing marks as pending. At first it reads as a
//! member of the group, like any other: while other consumers are at work, while entries are pending, and where one has died,
//! for as many entries as that one may have held, so that an entry that kills its readers is found by its deliveries. Then it reads on from
//! the group's position, for as long as the lease is held and nobody else moves the position.

use std::sync::Arc;
use std::time::Instant;

use tracing::info;

use super::handoff::Held;
use super::position;
use super::session::Session;
use super::taker::{Ended, Plan, Room, Taker};
use super::tenure::{End, Tenure};
use crate::failpoint;
use crate::retry::Fault;
use crate::shutdown::Stop;

impl Taker {
    /// Whether it may be time to read alone: there is nothing left to be read as a member of the group.
    pub(super) fn may_read_alone(&self, plan: &Plan) -> bool {
        self.lease.is_some() && plan.is_sole && !plan.own && !plan.dead && self.doubtful == 0
    }

    /// Whether it is time to read alone: everything that was ever given out by the group is settled, and nobody else is at work.
    pub(super) async fn is_alone(&mut self, session: &Session, plan: &mut Plan) -> Result<bool, Fault> {
        self.survey(session, plan).await?;
        Ok(self.may_read_alone(plan) && plan.own_pending == 0)
    }

    /// A look at the group has shown this many newly dead consumers.
    pub(super) fn mourn(&mut self, died: usize) {
        if died > 0 && self.lease.is_some() {
            self.doubtful = self.setup.most_in_doubt();
        }
    }

    /// So many entries were read as a member of the group, and whether there is more.
    pub(super) fn read_as_member(&mut self, entries: usize) {
        let left = self.doubtful.saturating_sub(entries as u64);
        self.doubtful = if self.reader.has_more() { left } else { 0 };
    }

    /// Reads on from the group's position.
    pub(super) async fn read_alone(&mut self, session: &mut Session, stop: &Stop) -> Result<Ended, Fault> {
        let Some(lease) = &self.lease else { return Ok(Ended::Displaced) };
        let claim = lease.claim.clone();
        let position = position::of_group(&session.link, &claim).await?;
        failpoint::reached("alone.begins");
        let (pipeline, from) = (&self.setup.lane.pipeline().name, position.id);
        info!(event = "reads_alone", %pipeline, stream = %claim.stream, %from, "reading alone, from the group's position on");
        let tenure = Arc::new(Tenure::new(session.link.clone(), claim, lease.doubt.clone(), position));
        self.reader.read_after(Some(position.id));
        let ended = self.read_on(session, &tenure, stop).await;
        self.reader.read_after(None);
        if let Ok(Ended::Stopped | Ended::Yielded) = ended {
            tokio::select! {
                () = self.shared.is_done_with(self.sent) => {}
                () = stop.forced() => return ended,
            }
            // What is moved over by now need not be read again by whoever comes next.
            tenure.advance().await;
        }
        ended
    }

    async fn read_on(&mut self, session: &mut Session, tenure: &Arc<Tenure>, stop: &Stop) -> Result<Ended, Fault> {
        let mut speak_at = Instant::now();
        // A read under way leaves no mark behind: a stop need not wait for it.
        while !stop.is_asked() {
            if session.is_lost() {
                return Err(Fault::ValkeyLost("the connection to Valkey was given up".into()));
            }
            if self.lease.as_ref().is_some_and(|lease| lease.is_to_be_yielded()) {
                return Ok(Ended::Yielded);
            }
            if Instant::now() >= speak_at {
                self.keep_alive(session).await?;
                tenure.advance().await;
                speak_at = Instant::now() + self.setup.sign_of_life_every();
            }
            let room = tokio::select! {
                room = self.wait_for_room(session, stop) => room?,
                () = stop.asked() => Room::Stopped,
            };
            let (to, batch) = match room {
                Room::Free(to) => {
                    let _step = self.setup.metrics.steps.begin("read", Instant::now());
                    (to, self.reader.fill(session, stop, false).await?)
                }
                Room::Stopped => break,
                Room::ReceiverGone => return Ok(Ended::ReceiverGone),
            };
            failpoint::reached("alone.read");
            let why = match tenure.ended() {
                Some(End::Fault(fault)) => return Err(fault),
                Some(End::Displaced(why)) => why,
                None if !self.lease.as_ref().is_some_and(|lease| lease.is_held()) => "the lease has run out",
                None => {
                    self.works_again();
                    if let Some(batch) = batch {
                        let place = tenure.read(&batch);
                        let link = session.link.clone();
                        let (batch, place) = (Some(batch), Some(place));
                        self.hand_over(to, Held { link, batch, gone: Vec::new(), suspect: None, place }).await;
                    }
                    continue;
                }
            };
            let pipeline = self.setup.lane.pipeline();
            info!(event = "displaced", pipeline = %pipeline.name, stream = %pipeline.stream, why, "reading alone is given up; it begins again at the group's position");
            return Ok(Ended::Displaced);
        }
        Ok(Ended::Stopped)
    }
}
