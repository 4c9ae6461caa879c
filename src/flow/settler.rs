//! Settler: settles batches in PostgreSQL: each entry is flushed, recognised, or buried.
//!
//! Takes batches from the taker; gives receipts to the acker, each for entries whose effect is committed. On a fault it does
//! what [`crate::retry`] says and keeps the batch.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::batch::{Batch, Death};
use super::flush::{self, Failed, Settled, Why};
use super::handoff::{Held, Interrupted, Receipt, Shared};
use super::worker::WorkerSetup;
use super::{ledger, reclaim};
use crate::failpoint;
use crate::model::entry::{EntryId, Malformed};
use crate::retry::{Fault, Incident, Verdict};
use crate::shutdown::Stop;
use crate::valkey::Link;

/// What share of a batch may turn out as poison before the table, and not the entries, is taken for the cause.
const POISON_SHARE: f64 = 0.1;
/// This many may, however small the batch.
const POISON_FLOOR: usize = 10;
/// How many ids a log line names.
const IDS_TOLD: usize = 5;

/// The part that settles batches: flushed, recognised, or buried.
#[derive(Debug)]
pub struct Settler {
    pub(super) setup: WorkerSetup,
    pub(super) consumer: Arc<str>,
    pub(super) shared: Arc<Shared>,
    pub(super) receiver: mpsc::Receiver<Held>,
    pub(super) receipts: mpsc::Sender<Receipt>,
    pub(super) incident: Incident,
}

impl Settler {
    /// Settles until the taker has left and nothing is held; or until the second phase of a stop.
    pub async fn run(mut self, stop: Stop) {
        loop {
            let held = tokio::select! {
                held = self.receiver.recv() => held,
                () = self.receipts.closed() => return,
            };
            let Some(held) = held else { break };
            if self.settle(held, &stop).await.is_err() || self.hand_on(Receipt::Done).await.is_err() {
                return;
            }
        }
    }

    /// Settles one batch, in as many transactions as it takes.
    async fn settle(&mut self, held: Held, stop: &Stop) -> Result<(), Interrupted> {
        if !held.gone.is_empty() {
            self.account_for(&held.gone, stop).await?;
        }
        let Some(batch) = held.batch else { return Ok(()) };
        let tolerated = POISON_FLOOR.max((batch.len() as f64 * POISON_SHARE) as usize);
        let mut work = vec![batch];
        let (mut poison, mut last_chance): (Vec<Batch>, bool) = (Vec::new(), false);
        loop {
            let Some(batch) = work.pop() else {
                // Only now, when the rest went through, is a single entry to blame; and only if it is refused once more,
                // for what was wrong may have been mended meanwhile.
                let Some(batch) = poison.pop() else { return Ok(()) };
                last_chance = true;
                work.push(batch);
                continue;
            };
            match flush::flush(&self.setup.database, &self.setup.lane, batch).await {
                Ok(flushed) => {
                    failpoint::reached("flush.committed");
                    self.works_again();
                    self.tell(&flushed.settled);
                    self.hand_on(Receipt::Settled(held.link.clone(), flushed.settled)).await?;
                    if let Some(batch) = flushed.unjudgeable {
                        self.settle_unjudgeable(&held.link, batch, stop).await?;
                    }
                }
                Err(Failed { batch, why: Why::Refused(runs) }) => {
                    let (rest, aside) = batch.set_aside(&runs);
                    work.extend([aside, rest].into_iter().filter(|part| !part.is_empty()));
                }
                Err(Failed { batch, why: Why::LaneGone(fault) }) => {
                    self.register_again(&fault, stop).await?;
                    work.push(batch);
                }
                Err(Failed { batch, why: Why::Fault(fault) }) => {
                    match self.met(&fault, batch.len(), stop).await? {
                        Verdict::Split => match batch.halve() {
                            Ok((low, high)) => work.extend([high, low]),
                            // Even as a dead letter it is refused: nobody's entry can be the cause of that.
                            Err(alone) if alone.entries().iter().any(|entry| entry.death.is_some()) => {
                                self.halt(1, &fault, stop).await?;
                                work.push(alone);
                            }
                            Err(mut alone) if last_chance => {
                                alone.condemn(refused_by_table(&fault));
                                work.push(alone);
                            }
                            Err(alone) => poison.push(alone),
                        },
                        Verdict::Shrink => match batch.halve() {
                            Ok((low, high)) => work.extend([high, low]),
                            Err(alone) => work.push(alone),
                        },
                        _ => work.push(batch),
                    }
                    if poison.len() > tolerated {
                        self.halt(poison.len(), &fault, stop).await?;
                        work.append(&mut poison);
                    }
                }
            }
        }
    }

    async fn hand_on(&self, receipt: Receipt) -> Result<(), Interrupted> {
        self.receipts.send(receipt).await.map_err(|_| Interrupted)
    }

    /// Tells what was committed.
    fn tell(&self, settled: &Settled) {
        let (tally, pipeline) = (&settled.tally, &self.setup.lane.pipeline().name);
        self.setup.metrics.flushed(tally);
        debug!(consumer = %self.consumer, applied = tally.applied, rows = tally.rows, "flushed");
        if tally.recognised > 0 {
            info!(event = "recognised", %pipeline, consumer = %self.consumer, entries = tally.recognised, "redelivered entries were recognised");
        }
        if tally.buried > 0 {
            warn!(event = "buried", %pipeline, consumer = %self.consumer, entries = tally.buried, "entries were buried: see tidegate.dead_letters");
        }
        if tally.collided > 0 {
            warn!(consumer = %self.consumer, entries = tally.collided, "other content under used ids was applied (split brain?)");
        }
    }

    /// The ledger covers these ids and no longer tells the content. If somebody has acknowledged one, somebody has seen it
    /// settled; else it is kept for an operator to judge.
    async fn settle_unjudgeable(&mut self, link: &Arc<Link>, batch: Batch, stop: &Stop) -> Result<(), Interrupted> {
        let pipeline = self.setup.lane.pipeline();
        let ids: Vec<EntryId> = batch.entries().iter().map(|e| e.id).collect();
        let Ok(pending) = reclaim::still_pending(link, &pipeline.stream, &pipeline.group(), &ids).await else {
            // They stay pending, if they are, and come again.
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
            match flush::bury_covered(&self.setup.database, &self.setup.lane, doubtful).await {
                Ok(settled) => {
                    self.works_again();
                    self.tell(&settled);
                    return self.hand_on(Receipt::Settled(link.clone(), settled)).await;
                }
                Err(Failed { batch, why: Why::Fault(fault) }) => {
                    self.met(&fault, batch.len(), stop).await?;
                    doubtful = batch;
                }
                Err(Failed { batch, why: Why::LaneGone(fault) }) => {
                    self.register_again(&fault, stop).await?;
                    doubtful = batch;
                }
                Err(Failed { batch, why: Why::Refused(_) }) => doubtful = batch,
            }
        }
    }

    /// PostgreSQL does not know the lane as this pipeline's. After a restore to an earlier time it is registered again; where another
    /// daemon has taken the pipeline over, this one halts.
    async fn register_again(&mut self, fault: &Fault, stop: &Stop) -> Result<(), Interrupted> {
        let lane = &self.setup.lane;
        match lane.register_again(&self.setup.database).await {
            Ok(Ok(())) => {
                let (pipeline, id) = (&lane.pipeline().name, lane.id());
                warn!(%pipeline, lane = id, %fault, "PostgreSQL does not know this pipeline any more (was it restored to an earlier time?): registered again; run `tidegate replay` for what it lost");
                Ok(())
            }
            Ok(Err(unregistered)) => {
                let response = self.incident.met(fault, Instant::now());
                if response.tell {
                    error!(consumer = %self.consumer, %fault, %unregistered, "flushing is halted: another daemon runs this pipeline with another configuration");
                }
                self.begins_to_fail(response.attempts == 1);
                pause(response.wait, stop).await
            }
            Err(fault) => self.met(&fault, 1, stop).await.map(drop),
        }
    }

    fn begins_to_fail(&self, first: bool) {
        if first {
            self.shared.failing.store(true, Ordering::Relaxed);
            self.setup.metrics.begins_to_fail();
        }
    }

    /// Pending ids that the stream has no longer: flushed, if the ledger covers them; else Valkey lost them.
    async fn account_for(&mut self, gone: &[EntryId], stop: &Stop) -> Result<(), Interrupted> {
        let id = self.setup.lane.id();
        loop {
            match self.setup.database.run(async |c| ledger::uncovered(c, id, gone).await).await {
                Ok(lost) => {
                    self.works_again();
                    if !lost.is_empty() {
                        self.setup.metrics.lost_upstream(lost.len());
                        let first: Vec<String> = lost.iter().take(IDS_TOLD).map(EntryId::to_string).collect();
                        error!(
                            event = "lost_upstream", pipeline = %self.setup.lane.pipeline().name,
                            consumer = %self.consumer, entries = lost.len(), ids = %first.join(" "),
                            "entries were deleted from the stream before they were flushed: lost upstream (MAXLEN, XDEL?)"
                        );
                    }
                    return Ok(());
                }
                Err(fault) => {
                    self.met(&fault, gone.len(), stop).await?;
                }
            }
        }
    }

    /// A fault on PostgreSQL's side: tells it, waits as long as its verdict asks for, and gives the verdict.
    async fn met(&mut self, fault: &Fault, entries: usize, stop: &Stop) -> Result<Verdict, Interrupted> {
        let first = !self.incident.lasts();
        let response = self.incident.met(fault, Instant::now());
        let (consumer, advice) = (&self.consumer, response.judgement.advice);
        match response.judgement.verdict {
            // Searching for poison is work, not incident.
            verdict @ (Verdict::Split | Verdict::Shrink) if entries > 1 || verdict == Verdict::Split => {
                debug!(%consumer, %fault, advice, entries, "a batch is halved");
                if first {
                    self.incident = Incident::default();
                }
                return Ok(verdict);
            }
            Verdict::Halt if response.tell => error!(%consumer, %fault, advice, entries, "flushing is halted"),
            _ if response.tell => warn!(%consumer, %fault, advice, entries, "flushing is interrupted"),
            _ => {}
        }
        self.begins_to_fail(first);
        pause(response.wait, stop).await?;
        Ok(response.judgement.verdict)
    }

    /// So much poison is no poison: something about the table is wrong, and nothing is buried for it.
    async fn halt(&mut self, entries: usize, fault: &Fault, stop: &Stop) -> Result<(), Interrupted> {
        let first = !self.incident.lasts();
        let response = self.incident.met(fault, Instant::now());
        if response.tell {
            error!(consumer = %self.consumer, %fault, entries, "flushing is halted: the table refuses so many entries that the cause must lie in it; nothing was buried");
        }
        self.begins_to_fail(first);
        pause(response.wait, stop).await
    }

    fn works_again(&mut self) {
        if self.shared.failing.swap(false, Ordering::Relaxed) {
            self.setup.metrics.works_again();
        }
        if let Some((attempts, lasted)) = self.incident.over(Instant::now()) {
            info!(consumer = %self.consumer, attempts, lasted_ms = lasted.as_millis() as u64, "flushing goes on");
        }
    }
}

impl Drop for Settler {
    /// A settler that ends while it fails must not leave the trimmer waiting for it.
    fn drop(&mut self) {
        if self.shared.failing.swap(false, Ordering::Relaxed) {
            self.setup.metrics.works_again();
        }
    }
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
