//! Taker: takes entries from Valkey and hands batches to the settler.
//!
//! Takes a link and what bounds a batch; gives batches: its consumer's own backlog first, then fresh entries, now and then
//! those of dead consumers. On a fault it drops the connection, waits, and goes on with a new one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::batch::Batch;
use super::handoff::{Held, ReceiverGone, Shared};
use super::read::{Reader, Session};
use super::reclaim::{Claimed, Reclaimer};
use super::worker::{SIGNS_OF_LIFE, WorkerSetup};
use crate::failpoint;
use crate::retry::{Fault, Incident, Judgement, Verdict};
use crate::shutdown::Stop;
use crate::valkey::Link;

/// The part that takes entries: fresh ones, the dead's, and its own that it lost sight of.
#[derive(Debug)]
pub struct Taker {
    pub(super) setup: WorkerSetup,
    pub(super) consumer: Arc<str>,
    pub(super) reader: Reader,
    pub(super) reclaimer: Reclaimer,
    pub(super) shared: Arc<Shared>,
    pub(super) sender: Option<mpsc::Sender<Held>>,
    pub(super) sent: u64,
    pub(super) incident: Incident,
}

impl Taker {
    /// Takes until it is told to stop, over as many links as it takes.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            let mut session = match Session::open(&self.setup.valkey, &format!("tidegate:{}", self.consumer)).await {
                Ok(session) => session,
                Err(fault) => {
                    self.met(&fault, &stop).await;
                    continue;
                }
            };
            match self.take_over(&mut session, &stop).await {
                Ok(Ok(())) => self.leave(&session.link, &stop).await,
                Ok(Err(ReceiverGone)) => return,
                Err(fault) => self.met(&fault, &stop).await,
            }
        }
    }

    /// One session's life: until it breaks, or a stop. Its own backlog first, then fresh entries, now and then the dead's.
    async fn take_over(&mut self, session: &mut Session, stop: &Stop) -> Result<Result<(), ReceiverGone>, Fault> {
        let link = &session.link.clone();
        if self.reader.ensure_group(link).await? {
            info!(consumer = %self.consumer, stream = %self.setup.lane.pipeline().stream, "created the consumer group");
            self.setup.regrouped.notify_one();
        }
        // Idle times on a promoted replica are stale: whoever seems dead may not have had the time to speak.
        let mut sweep_at = Instant::now() + self.setup.dead_after;
        let mut own = true;
        // In a stop, what was asked for is still taken.
        while !stop.is_asked() || !(session.is_quiet() || stop.is_forced()) {
            if session.is_lost() {
                return Err(Fault::ValkeyLost("the connection was given up".into()));
            }
            let sweep = Instant::now() >= sweep_at && !self.shared.failing.load(Ordering::Relaxed);
            let claimed = if !session.is_quiet() || !(own || sweep) {
                let only_asked = own || sweep || stop.is_asked();
                let Some(room) = self.wait_for_room(session, stop).await? else { return Ok(Err(ReceiverGone)) };
                let batch = if room { self.reader.fill(session, stop, only_asked).await? } else { None };
                self.works_again();
                if let Some(batch) = batch {
                    self.send(link, Claimed { batch: Some(batch), gone: Vec::new() }).await;
                }
                continue;
            } else if own {
                if self.wait_until_quiet(link, stop).await?.is_err() {
                    return Ok(Err(ReceiverGone));
                }
                let claimed = self.reclaimer.claim_own(link).await?;
                own = claimed.batch.is_some() || !claimed.gone.is_empty();
                claimed
            } else {
                let claimed = self.reclaimer.claim_from_the_dead(link).await?;
                if claimed.batch.is_none() && claimed.gone.is_empty() {
                    sweep_at = Instant::now() + self.setup.sweep_every;
                    own = true;
                }
                claimed
            };
            if claimed.batch.is_some() || !claimed.gone.is_empty() {
                let entries = claimed.batch.as_ref().map_or(0, Batch::len);
                self.setup.metrics.reclaimed(entries);
                let pipeline = &self.setup.lane.pipeline().name;
                info!(event = "reclaimed", %pipeline, consumer = %self.consumer, entries, gone = claimed.gone.len(), "reclaimed");
                if self.wait_for_room(session, stop).await?.is_none() {
                    return Ok(Err(ReceiverGone));
                }
                self.send(link, claimed).await;
            }
        }
        Ok(Ok(()))
    }

    async fn send(&mut self, link: &Arc<Link>, claimed: Claimed) {
        let Some(sender) = &self.sender else { return };
        let held = Held { link: link.clone(), batch: claimed.batch, gone: claimed.gone };
        // Fails only if the settler is gone, which the next wait for room tells.
        if sender.send(held).await.is_ok() {
            self.sent += 1;
        }
    }

    /// Waits until a batch can be handed over, showing signs of life. False: a stop came first, and nothing is to be taken any
    /// more. None: nobody is there.
    async fn wait_for_room(&self, session: &Session, stop: &Stop) -> Result<Option<bool>, Fault> {
        let Some(sender) = &self.sender else { return Ok(None) };
        let mut room = std::pin::pin!(sender.reserve());
        loop {
            tokio::select! {
                // Given back at once: this task is the only one that sends.
                permit = &mut room => return Ok(permit.is_ok().then_some(true)),
                () = stop.asked(), if session.is_quiet() => return Ok(Some(false)),
                () = stop.forced() => return Ok(Some(false)),
                () = tokio::time::sleep(self.setup.dead_after / SIGNS_OF_LIFE) => self.reader.keep_alive(&session.link).await?,
            }
        }
    }

    /// Waits until nothing is held, showing signs of life; or until a stop.
    async fn wait_until_quiet(&self, link: &Link, stop: &Stop) -> Result<Result<(), ReceiverGone>, Fault> {
        let mut quiet = std::pin::pin!(self.shared.is_done_with(self.sent));
        let Some(sender) = &self.sender else { return Ok(Err(ReceiverGone)) };
        loop {
            tokio::select! {
                () = &mut quiet => return Ok(Ok(())),
                () = sender.closed() => return Ok(Err(ReceiverGone)),
                () = stop.asked() => return Ok(Ok(())),
                () = tokio::time::sleep(self.setup.dead_after / SIGNS_OF_LIFE) => self.reader.keep_alive(link).await?,
            }
        }
    }

    /// Waits for what is held to be settled, then takes the consumer out of the group.
    async fn leave(&mut self, link: &Link, stop: &Stop) {
        self.sender = None;
        tokio::select! {
            () = self.shared.is_done_with(self.sent) => {}
            () = stop.forced() => return,
        }
        failpoint::reached("stop.settled");
        if let Err(fault) = self.reclaimer.leave(link).await {
            debug!(consumer = %self.consumer, %fault, "could not leave the group; a peer removes this consumer later");
        }
    }

    /// A fault on Valkey's side: tells it, waits, and leaves the rest to the next link.
    async fn met(&mut self, fault: &Fault, stop: &Stop) {
        let now = Instant::now();
        let response = self.incident.met(fault, now);
        let Judgement { verdict, advice } = response.judgement;
        // Told once for all workers of the pipeline.
        if let Some(lasted) = self.setup.metrics.reading.met(verdict, now) {
            let (pipeline, lasted_ms) = (self.setup.lane.pipeline(), lasted.as_millis() as u64);
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
        // A peer may have said so already.
        if let Some(lasted) = self.incident.over(now).and_then(|_| self.setup.metrics.reading.over(now)) {
            let (pipeline, lasted_ms) = (self.setup.lane.pipeline(), lasted.as_millis() as u64);
            info!(event = "resumed", pipeline = %pipeline.name, stream = %pipeline.stream, lasted_ms, "reading goes on");
        }
    }
}
