//! Settler: settles batches in PostgreSQL: each entry is flushed, recognised, or buried.
//!
//! Takes batches from the taker; gives receipts to the acker, each for entries whose effect is committed. On a fault it does
//! what [`crate::retry`] says and keeps the batch; what the table refuses is searched for by [`super::bisect`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::batch::{Batch, Death};
use super::bisect::{Cause, Piece, Refusals, Refused, Search, Step};
use super::flush::{self, Failed, Settled, Why};
use super::handoff::{Held, Interrupted, Receipt, Shared};
use super::setup::WorkerSetup;
use super::tenure::Place;
use super::{ledger, reclaim, strangers};
use crate::failpoint;
use crate::functions::gate;
use crate::model::entry::{EntryId, Malformed, digest};
use crate::retry::{Fault, Incident, Judgement, Response, Verdict};
use crate::shutdown::Stop;
use crate::telemetry::contract::Side;
use crate::valkey::Link;

/// How many ids a log line names.
const IDS_TOLD: usize = 5;
/// How long a halted settler sleeps at the most: a peer may have found that the table is well again.
const HALTED_NAP: Duration = Duration::from_secs(1);

/// The part that settles batches: flushed, recognised, or buried.
#[derive(Debug)]
pub struct Settler {
    setup: WorkerSetup,
    consumer: Arc<str>,
    shared: Arc<Shared>,
    /// Which of its worker's settlers it is.
    slot: usize,
    receiver: mpsc::Receiver<Held>,
    receipts: mpsc::Sender<Receipt>,
    incident: Incident,
    search: Search,
    /// Handoffs that are not done with.
    handoffs: HashMap<u64, Handoff>,
    /// The number of the next handoff.
    next_handoff: u64,
}

/// What is kept of a batch while pieces of it are settled.
#[derive(Debug, Clone)]
struct Handoff {
    /// Where it is acknowledged.
    link: Arc<Link>,
    /// How many bytes are held.
    bytes: usize,
    /// Set where nothing of it is pending, so that there is nothing to acknowledge.
    place: Option<Place>,
}

impl Settler {
    /// Takes batches from this receiver, gives receipts to this sender. `slot`: which of its worker's settlers it is.
    pub(super) fn new(
        setup: WorkerSetup,
        consumer: Arc<str>,
        (shared, slot): (Arc<Shared>, usize),
        receiver: mpsc::Receiver<Held>,
        receipts: mpsc::Sender<Receipt>,
    ) -> Settler {
        let (incident, search, handoffs) = (setup.metrics.flushing.incident(), Search::default(), HashMap::new());
        Settler { setup, consumer, shared, slot, receiver, receipts, incident, search, handoffs, next_handoff: 0 }
    }

    /// Settles until the taker has left and nothing is held; or until the second phase of a stop.
    pub async fn run(mut self, stop: Stop) {
        // Interrupted: what is held stays pending.
        let _ = self.settle(&stop).await;
    }

    async fn settle(&mut self, stop: &Stop) -> Result<(), Interrupted> {
        loop {
            let step = self.search.next(&mut lock(&self.setup), Instant::now());
            match step {
                Step::Flush(piece) => {
                    let trace = piece.batch.origin().trace.clone();
                    trace.covers(self.flush(piece, stop)).await?;
                }
                Step::Wait(wait) => {
                    let has_room = self.has_room();
                    tokio::select! {
                        () = tokio::time::sleep(wait.min(HALTED_NAP)) => {}
                        // A halted pipeline is probed with new entries, too: they may be the healthy ones.
                        Some(held) = self.receiver.recv(), if has_room => self.take_up(held, stop).await?,
                        () = stop.forced() => return Err(Interrupted),
                    }
                }
                Step::Nothing => {
                    let held = tokio::select! {
                        held = self.receiver.recv() => held,
                        () = self.receipts.closed() => return Err(Interrupted),
                    };
                    let Some(held) = held else { return Ok(()) };
                    self.take_up(held, stop).await?;
                }
            }
        }
    }

    /// Whether a halted settler may take up more: at most one batch more than it holds otherwise.
    fn has_room(&self) -> bool {
        let bytes: usize = self.handoffs.values().map(|handoff| handoff.bytes).sum();
        self.search.held() < self.setup.limits.max_entries && bytes < self.setup.limits.max_bytes
    }

    async fn take_up(&mut self, held: Held, stop: &Stop) -> Result<(), Interrupted> {
        if !held.gone.is_empty() {
            self.account_for(&held.link, &held.gone, stop).await?;
        }
        let Some(batch) = held.batch else { return self.hand_on(Receipt::Done(held.place)).await };
        if let Some(id) = held.suspect {
            self.acquit(&held.link, &batch, id).await;
        }
        let handoff = self.next_handoff;
        self.next_handoff += 1;
        self.handoffs.insert(handoff, Handoff { link: held.link, bytes: batch.bytes(), place: held.place });
        self.search.add(batch, handoff, &lock(&self.setup));
        Ok(())
    }

    /// One attempt to flush a piece, and what follows from it.
    async fn flush(&mut self, Piece { batch, ticket }: Piece, stop: &Stop) -> Result<(), Interrupted> {
        let oldest_ms = batch.entries().iter().map(|entry| entry.id.ms).min().unwrap_or(0);
        let flushing =
            self.setup.metrics.flush_begins(&batch.origin().trace, batch.len(), oldest_ms, || batch.causes());
        match flush::flush(&self.setup.database, &self.setup.lanes, batch).await {
            Ok((flushed, batch)) => {
                failpoint::reached("flush.committed");
                flushing.committed(&flushed.settled.tally);
                let Some(handoff) = self.handoffs.get(&ticket.handoff).cloned() else { return Err(Interrupted) };
                self.landed(Some(flushed.settled.tally.applied));
                self.tell(&flushed.settled);
                self.drop_values(&handoff, &batch, &flushed.settled, stop).await?;
                self.give_back(&handoff, flushed.settled).await?;
                if let Some(batch) = flushed.unjudgeable {
                    self.settle_unjudgeable(&handoff, batch, stop).await?;
                }
                if self.search.finished(ticket.handoff) {
                    self.handoffs.remove(&ticket.handoff);
                    self.hand_on(Receipt::Done(handoff.place)).await?;
                }
            }
            Err(Failed { batch, why: Why::Refused(runs) }) => {
                flushing.refused();
                if let Some(place) = self.handoffs.get(&ticket.handoff).and_then(|handoff| handoff.place.as_ref()) {
                    runs.iter().for_each(|run| place.is_in_doubt(batch.lane_of(&batch.runs()[*run])));
                }
                let (rest, aside) = batch.set_aside(&runs);
                self.search.put_back(ticket, aside.into_iter().chain([rest]).filter(|part| !part.is_empty()));
            }
            Err(Failed { batch, why: Why::LaneGone(fault) }) => {
                drop(flushing);
                let lanes = batch.lanes();
                self.search.put_back(ticket, [batch]);
                self.register_again(&lanes, &fault, stop).await?;
            }
            Err(Failed { batch, why: Why::Fault(fault) }) => {
                drop(flushing);
                self.failed(Piece { batch, ticket }, fault, stop).await?;
            }
        }
        Ok(())
    }

    /// A piece was not flushed: it is kept, and the fault's verdict says how it is tried again.
    async fn failed(&mut self, piece: Piece, fault: Fault, stop: &Stop) -> Result<(), Interrupted> {
        let (entries, now) = (piece.batch.len(), Instant::now());
        let first = !self.incident.lasts();
        let response = self.incident.met(&fault, now);
        let advice = response.judgement.advice;
        match response.judgement.verdict {
            Verdict::Split => {
                // Searching for poison is work, no incident.
                if first {
                    self.incident.forget();
                }
                debug!(consumer = %self.consumer, %fault, advice, entries, "the table refused a piece");
                let setup = self.setup.clone();
                let key = |batch: &Batch| {
                    let entry = &batch.entries()[0];
                    setup.lanes[0].plan().key_of(batch.canonical(entry)).map_or(entry.digest, |key| digest(&key))
                };
                let refused = self.search.refused(piece, key, &mut lock(&self.setup), now);
                match refused {
                    Refused::Later if lock(&self.setup).is_halted() => self.halted(&fault, advice),
                    Refused::Later => {}
                    Refused::Poison(Piece { mut batch, ticket }) => {
                        batch.condemn(refused_by_table(&fault));
                        self.search.put_back(ticket, [batch]);
                    }
                    Refused::Halted => self.halted(
                        &fault,
                        "the table refuses so many different entries that the cause must be the table: nothing more is buried, \
                         and flushing goes on by itself when the table takes entries again",
                    ),
                }
            }
            Verdict::Shrink => {
                debug!(consumer = %self.consumer, %fault, advice, entries, "a batch was too much at once");
                self.search.shrink(piece);
                self.begins_to_fail();
                pause(response.wait, stop).await?;
            }
            Verdict::Halt => {
                self.search.put_back(piece.ticket, [piece.batch]);
                lock(&self.setup).halt(Cause::Fault, now);
                self.halted(&fault, advice);
            }
            Verdict::Retry | Verdict::Regroup => {
                self.search.put_back(piece.ticket, [piece.batch]);
                self.interrupted(&fault, &response);
                pause(response.wait, stop).await?;
            }
        }
        Ok(())
    }

    /// Flushing is interrupted: told once for all workers of the pipeline, and now and then again.
    fn interrupted(&mut self, fault: &Fault, response: &Response) {
        self.begins_to_fail();
        let Judgement { verdict, advice } = response.judgement;
        if self.incident.is_news(verdict, Instant::now()) {
            let (pipeline, lasted_ms) = (&self.setup.pipeline, response.lasted.as_millis() as u64);
            warn!(
                event = "interrupted", pipeline = %pipeline.name, stream = %pipeline.stream, table = %pipeline.table, %fault,
                advice, lasted_ms, "flushing is interrupted"
            );
        }
    }

    /// The pipeline is halted: said once for all its workers, and now and then again.
    fn halted(&self, fault: &Fault, advice: &str) {
        self.begins_to_fail();
        self.setup.metrics.is_halted(Side::Flushing, true);
        if lock(&self.setup).halted(fault, Instant::now()) {
            let pipeline = &self.setup.pipeline;
            error!(
                event = "halted", pipeline = %pipeline.name, stream = %pipeline.stream, table = %pipeline.table, %fault, advice,
                "flushing is halted until this is corrected"
            );
        }
    }

    /// PostgreSQL did what it was asked: a flush with so many entries applied, or something else.
    fn landed(&mut self, applied: Option<u64>) {
        let now = Instant::now();
        let mut refusals = lock(&self.setup);
        if let Some(applied) = applied {
            refusals.landed(applied, now);
        }
        let halted = if refusals.is_halted() { None } else { refusals.incident.over(now) };
        let is_well = !refusals.is_halted();
        drop(refusals);
        // The last worker that it kept waiting says so.
        let interrupted = self.incident.over(now);
        if let Some((_, lasted)) = halted.or(interrupted) {
            let (pipeline, lasted_ms) = (&self.setup.pipeline, lasted.as_millis() as u64);
            info!(
                event = "resumed", pipeline = %pipeline.name, stream = %pipeline.stream, table = %pipeline.table, lasted_ms,
                "flushing goes on"
            );
        }
        if is_well {
            self.setup.metrics.is_halted(Side::Flushing, false);
        }
        if is_well && self.failing().swap(false, Ordering::Relaxed) {
            self.setup.metrics.works_again();
        }
    }

    fn failing(&self) -> &AtomicBool {
        &self.shared.failing[self.slot]
    }

    fn begins_to_fail(&self) {
        if !self.failing().swap(true, Ordering::Relaxed) {
            self.setup.metrics.begins_to_fail();
        }
    }

    /// An entry that is tried alone: if it kills its readers it does so here, in memory. Who dies later dies of something else.
    async fn acquit(&self, link: &Link, batch: &Batch, id: EntryId) {
        let pipeline = &self.setup.pipeline;
        let _ = batch.coalesce(self.setup.lanes[0].plan(), 0..batch.len());
        let consumer = &batch.origin().consumer;
        // If it fails, the entry counts one death too many.
        let _ = reclaim::acquit(link, &pipeline.stream, &pipeline.group(), consumer, id).await;
    }

    /// Where counters are managed: values that the index does not answer for are dropped before anything is acknowledged.
    async fn drop_values(
        &mut self,
        handoff: &Handoff,
        batch: &Batch,
        settled: &Settled,
        stop: &Stop,
    ) -> Result<(), Interrupted> {
        let lanes = self.setup.lanes.clone();
        let (doubtful, strangers) = strangers::of(batch, &self.setup.pipeline, &settled.tally);
        self.setup.metrics.strangers(strangers);
        for (lane, counters) in &doubtful {
            // On a lost link nothing is acknowledged either: the entries come again, are recognised, and the values are dropped then.
            while !handoff.link.is_lost() {
                match strangers::drop_values(&handoff.link, lanes[*lane].pipeline(), counters).await {
                    Ok(()) | Err(Fault::ValkeyLost(_) | Fault::ValkeyProtocol(_)) => break,
                    Err(fault) => self.wait_out(&fault, stop).await?,
                }
            }
        }
        Ok(())
    }

    /// What is settled and pending is to be acknowledged.
    async fn give_back(&self, handoff: &Handoff, settled: Settled) -> Result<(), Interrupted> {
        match handoff.place {
            None => self.hand_on(Receipt::Settled(handoff.link.clone(), settled)).await,
            Some(_) => Ok(()),
        }
    }

    async fn hand_on(&self, receipt: Receipt) -> Result<(), Interrupted> {
        self.receipts.send(receipt).await.map_err(|_| Interrupted)
    }

    /// Tells what was committed.
    fn tell(&self, settled: &Settled) {
        let (tally, pipeline) = (&settled.tally, &self.setup.pipeline.name);
        self.setup.metrics.flushed(tally);
        debug!(consumer = %self.consumer, applied = tally.applied, rows = tally.rows, "flushed");
        if tally.recognised > 0 {
            info!(event = "recognised", %pipeline, consumer = %self.consumer, entries = tally.recognised, "redelivered entries were recognised");
        }
        let buried = lock(&self.setup).burials.to_tell(tally.buried, Instant::now());
        if let Some(entries) = buried {
            warn!(event = "buried", %pipeline, consumer = %self.consumer, entries, "entries were buried: see tidegate.dead_letters");
        }
        if tally.collided > 0 {
            warn!(consumer = %self.consumer, entries = tally.collided, "other content under used ids was applied (split brain?)");
        }
    }

    /// The ledger covers these ids and no longer tells the content. If somebody has acknowledged one, somebody has seen it
    /// settled; else it is kept for an operator to judge.
    async fn settle_unjudgeable(&mut self, handoff: &Handoff, batch: Batch, stop: &Stop) -> Result<(), Interrupted> {
        let pipeline = &self.setup.pipeline;
        let ids: Vec<EntryId> = batch.entries().iter().map(|e| e.id).collect();
        let lane = batch.lane_of(&batch.runs()[0]);
        let pending = match &handoff.place {
            None => reclaim::still_pending(&handoff.link, &pipeline.stream, &pipeline.group(), &ids).await,
            Some(place) => place.still_unsettled(lane, &ids).await,
        };
        let Ok(pending) = pending else {
            // They stay pending, if they are, and come again; and so does what a tenure read that has ended.
            return Ok(());
        };
        let indices: Vec<usize> = (0..batch.len()).filter(|&i| pending.contains(&batch.entries()[i].id)).collect();
        let settled = batch.len() - indices.len();
        if settled > 0 {
            self.setup.metrics.dropped(settled);
            warn!(consumer = %self.consumer, entries = settled, "entries older than the ledger tells, settled by somebody, were dropped");
        }
        if indices.is_empty() {
            return Ok(());
        }
        let mut doubtful = batch.pick(&indices);
        doubtful.condemn(Death::from(Malformed::Unjudgeable));
        loop {
            let kept = self.setup.pipeline.is_managed().then(|| doubtful.clone());
            let fault = match flush::bury_covered(&self.setup.database, &self.setup.lanes[lane], doubtful).await {
                Ok(settled) => {
                    self.landed(None);
                    self.tell(&settled);
                    if let Some(batch) = kept {
                        self.drop_values(handoff, &batch, &settled, stop).await?;
                    }
                    return self.give_back(handoff, settled).await;
                }
                Err(Failed { batch, why: Why::LaneGone(fault) }) => {
                    doubtful = batch;
                    self.register_again(&[lane], &fault, stop).await?;
                    continue;
                }
                Err(Failed { batch, why: Why::Fault(fault) }) => {
                    doubtful = batch;
                    fault
                }
                Err(Failed { batch, why: Why::Refused(_) }) => {
                    doubtful = batch;
                    Fault::StillRefused
                }
            };
            self.wait_out(&fault, stop).await?;
        }
    }

    /// PostgreSQL does not know one of these lanes as this pipeline's. After a restore to an earlier time they are registered again; where
    /// another daemon has taken the pipeline over, this one halts.
    async fn register_again(&mut self, lanes: &[usize], fault: &Fault, stop: &Stop) -> Result<(), Interrupted> {
        for lane in lanes {
            match self.setup.lanes[*lane].register_again(&self.setup.database).await {
                Ok(Ok(())) => {}
                Ok(Err(unregistered)) => {
                    let response = self.incident.met(fault, Instant::now());
                    if self.incident.is_news(Verdict::Halt, Instant::now()) {
                        error!(consumer = %self.consumer, %fault, %unregistered, "flushing is halted: another daemon runs this pipeline with another configuration");
                    }
                    self.begins_to_fail();
                    self.setup.metrics.is_halted(Side::Flushing, true);
                    return pause(response.wait, stop).await;
                }
                Err(fault) => return self.wait_out(&fault, stop).await,
            }
        }
        let pipeline = &self.setup.pipeline.name;
        warn!(%pipeline, lanes = lanes.len(), %fault, "PostgreSQL does not know this pipeline any more (was it restored to an earlier time?): registered again; run `tidegate replay` for what it lost");
        Ok(())
    }

    /// Pending ids that the stream has no longer: flushed, if the ledger tells so; else Valkey lost them.
    async fn account_for(&mut self, link: &Link, gone: &[EntryId], stop: &Stop) -> Result<(), Interrupted> {
        let id = self.setup.lanes[0].id();
        let told = loop {
            match self.setup.database.run(async |c| ledger::tell_gone(c, id, gone).await).await {
                Ok(told) => break told,
                Err(fault) => self.wait_out(&fault, stop).await?,
            }
        };
        self.landed(None);
        // Their deltas are in the counters' values, and nobody knows in whose.
        let is_in_doubt = self.setup.pipeline.is_managed() && !told.unflushed.is_empty();
        while is_in_doubt && !link.is_lost() {
            let keys = self.setup.lanes[0].pipeline().keys_of(0);
            match gate::close_surely(link.commands(), &keys, "entries were lost").await {
                Ok(()) => break,
                Err(fault) => self.wait_out(&fault, stop).await?,
            }
        }
        let pipeline = &self.setup.pipeline.name;
        if !told.unflushed.is_empty() {
            self.setup.metrics.lost_unflushed(told.unflushed.len());
            error!(
                event = "lost_upstream", flushed = "no", %pipeline, consumer = %self.consumer, entries = told.unflushed.len(),
                ids = %some(&told.unflushed),
                "entries were deleted from the stream before they were flushed: lost upstream (MAXLEN, XDEL?)"
            );
        }
        if !told.unknown.is_empty() {
            self.setup.metrics.lost_unknown(told.unknown.len());
            warn!(
                event = "lost_upstream", flushed = "unknown", %pipeline, consumer = %self.consumer,
                entries = told.unknown.len(), ids = %some(&told.unknown),
                "entries were deleted from the stream and had not been acknowledged: whether they were flushed cannot be known"
            );
        }
        Ok(())
    }

    /// A fault in work that cannot be split: whatever its verdict, it is told, and the same is tried again after a pause.
    async fn wait_out(&mut self, fault: &Fault, stop: &Stop) -> Result<(), Interrupted> {
        let response = self.incident.met(fault, Instant::now());
        self.interrupted(fault, &response);
        pause(response.wait, stop).await
    }
}

impl Drop for Settler {
    /// A settler that ends while it fails must not leave the trimmer waiting for it.
    fn drop(&mut self) {
        if self.failing().swap(false, Ordering::Relaxed) {
            self.setup.metrics.works_again();
        }
    }
}

/// What the table has refused lately. Whoever held the lock did nothing but count.
fn lock(setup: &WorkerSetup) -> MutexGuard<'_, Refusals> {
    setup.refusals.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first few ids, for people.
fn some(ids: &[EntryId]) -> String {
    let first: Vec<String> = ids.iter().take(IDS_TOLD).map(EntryId::to_string).collect();
    first.join(" ")
}

fn refused_by_table(fault: &Fault) -> Death {
    let reason = match fault {
        Fault::SumOverflow => "sum_overflow",
        _ => "refused_by_table",
    };
    Death { reason, detail: fault.to_string() }
}

async fn pause(wait: Duration, stop: &Stop) -> Result<(), Interrupted> {
    tokio::select! {
        () = tokio::time::sleep(wait) => Ok(()),
        () = stop.forced() => Err(Interrupted),
    }
}
