//! A worker: a taker takes batches from Valkey, a settler settles them in PostgreSQL, an acker acknowledges what is settled.
//!
//! ```text
//!  Valkey ──▶ Taker ──[one batch]──▶ Settler ──▶ PostgreSQL
//!    ▲                                  │
//!    └──────────── Acker ◀──[settled]───┘
//! ```
//!
//! The three work at once: while one batch is flushed the next is read and the one before is acknowledged. The taker
//! reserves the room before it reads, so a worker holds two batches at the most, the ids of two more, and what a few reads
//! under way bring; when PostgreSQL is slow reading stops and the backlog stays in Valkey. What arrives while a batch is
//! flushed is the next batch: under low load entries land at once, under high load batches grow by themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, error, info, warn};

use super::ack::{self, Acked};
use super::batch::{Batch, Death};
use super::flush::{self, Failed, Settled, Target, Why};
use super::ledger;
use super::read::{Limits, Line, Reader};
use super::reclaim::{self, Claimed, Reclaimer};
use crate::entry::{EntryId, Malformed};
use crate::metrics::Metrics;
use crate::postgres::Database;
use crate::retry::{Fault, Trouble, Verdict};
use crate::shutdown::Stop;
use crate::valkey::{self, Link};
use crate::failpoint;

/// What share of a batch may turn out as poison before the table, and not the entries, is taken for the cause.
const POISON_SHARE: f64 = 0.1;
/// This many may, however small the batch.
const POISON_FLOOR: usize = 10;
/// A reader that waits for entries shows a sign of life this many times in each `reclaim.dead_after`.
const SIGNS_OF_LIFE: u32 = 4;
/// The longest a reader waits for entries in one read.
const LONGEST_BLOCK: Duration = Duration::from_secs(2);
/// Receipts between settler and acker: one flush and the end of its batch.
const RECEIPTS: usize = 2;
/// How many ids a log line names.
const IDS_TOLD: usize = 5;

/// What a worker is made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Where Valkey is.
    pub valkey: valkey::Address,
    /// PostgreSQL.
    pub database: Database,
    /// What it feeds.
    pub target: Target,
    /// What bounds a batch.
    pub limits: Limits,
    /// When a silent consumer is dead.
    pub dead_after: Duration,
    /// How often the dead are looked for.
    pub sweep_every: Duration,
    /// When an entry that kills its readers is buried.
    pub max_deliveries: u64,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Rung when the group had to be created: somebody should look for what is lost.
    pub regrouped: Arc<Notify>,
}

/// A batch on its way from one half to the other, with the link it came by and must be acknowledged on.
#[derive(Debug)]
struct Held {
    link: Arc<Link>,
    batch: Option<Batch>,
    gone: Vec<EntryId>,
}

/// What the settler hands on.
#[derive(Debug)]
enum Receipt {
    /// To be acknowledged on the link it was read by.
    Settled(Arc<Link>, Settled),
    /// One batch is done with.
    Done,
}

/// What the three tell each other beside batches.
#[derive(Debug)]
struct Shared {
    /// How many batches are done with, acknowledgements included.
    done: watch::Sender<u64>,
    /// Whether its flushes are failing.
    failing: AtomicBool,
}

impl Shared {
    /// Resolves when this many batches are done with.
    async fn is_done_with(&self, batches: u64) {
        // The sender is beside it: it cannot be gone.
        let _ = self.done.subscribe().wait_for(|done| *done == batches).await;
    }
}

/// The three parts of a worker of this consumer name, which nobody may have had before.
pub fn crew(parts: Parts, consumer: Arc<str>) -> (Taker, Settler, Acker) {
    let (sender, receiver) = mpsc::channel(1);
    let (receipts, settled) = mpsc::channel(RECEIPTS);
    let shared = Arc::new(Shared { done: watch::Sender::new(0), failing: AtomicBool::new(false) });
    let block = LONGEST_BLOCK.min(parts.dead_after / SIGNS_OF_LIFE);
    let pipeline = parts.target.pipeline();
    let taker = Taker {
        reader: Reader::new(pipeline, consumer.clone(), parts.limits, block),
        reclaimer: Reclaimer::new(
            pipeline,
            consumer.clone(),
            parts.dead_after,
            parts.max_deliveries,
            parts.limits.max_entry_bytes,
        ),
        consumer: consumer.clone(),
        parts: parts.clone(),
        shared: shared.clone(),
        sender: Some(sender),
        sent: 0,
        trouble: Trouble::default(),
    };
    let acker = Acker { parts: parts.clone(), consumer: consumer.clone(), shared: shared.clone(), settled };
    let settler = Settler { parts, consumer, shared, receiver, receipts, trouble: Trouble::default() };
    (taker, settler, acker)
}

/// The part that takes entries: fresh ones, the dead's, and its own that it lost sight of.
#[derive(Debug)]
pub struct Taker {
    parts: Parts,
    consumer: Arc<str>,
    reader: Reader,
    reclaimer: Reclaimer,
    shared: Arc<Shared>,
    sender: Option<mpsc::Sender<Held>>,
    sent: u64,
    trouble: Trouble,
}

/// The settler is gone: its task panicked, and this worker is at its end.
#[derive(Debug)]
struct Widowed;

impl Taker {
    /// Takes until it is told to stop, over as many links as it takes.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            let mut line = match Line::open(&self.parts.valkey, &format!("tidegate:{}", self.consumer)).await {
                Ok(line) => line,
                Err(fault) => {
                    self.met(&fault, &stop).await;
                    continue;
                }
            };
            match self.take_over(&mut line, &stop).await {
                Ok(Ok(())) => self.leave(&line.link, &stop).await,
                Ok(Err(Widowed)) => return,
                Err(fault) => self.met(&fault, &stop).await,
            }
        }
    }

    /// One line's life: until it breaks, or a stop. Its own backlog first, then fresh entries, now and then the dead's.
    async fn take_over(&mut self, line: &mut Line, stop: &Stop) -> Result<Result<(), Widowed>, Fault> {
        let link = &line.link.clone();
        if self.reader.ensure_group(link).await? {
            info!(consumer = %self.consumer, stream = %self.parts.target.pipeline().stream, "created the consumer group");
            self.parts.regrouped.notify_one();
        }
        // Idle times on a promoted replica are stale: whoever seems dead may not have had the time to speak.
        let mut sweep_at = Instant::now() + self.parts.dead_after;
        let mut own = true;
        // In a stop, what was asked for is still taken.
        while !stop.is_asked() || !(line.is_quiet() || stop.is_forced()) {
            if line.is_lost() {
                return Err(Fault::ValkeyLost("the connection was given up".into()));
            }
            let sweep = Instant::now() >= sweep_at && !self.shared.failing.load(Ordering::Relaxed);
            let claimed = if !line.is_quiet() || !(own || sweep) {
                let only_asked = own || sweep || stop.is_asked();
                let Some(room) = self.wait_for_room(line, stop).await? else { return Ok(Err(Widowed)) };
                let batch = if room { self.reader.fill(line, stop, only_asked).await? } else { None };
                self.works_again();
                if let Some(batch) = batch {
                    self.send(link, Claimed { batch: Some(batch), gone: Vec::new() }).await;
                }
                continue;
            } else if own {
                if self.wait_until_quiet(link, stop).await?.is_err() {
                    return Ok(Err(Widowed));
                }
                let claimed = self.reclaimer.claim_own(link).await?;
                own = claimed.batch.is_some() || !claimed.gone.is_empty();
                claimed
            } else {
                let claimed = self.reclaimer.claim_from_the_dead(link).await?;
                if claimed.batch.is_none() && claimed.gone.is_empty() {
                    sweep_at = Instant::now() + self.parts.sweep_every;
                    own = true;
                }
                claimed
            };
            if claimed.batch.is_some() || !claimed.gone.is_empty() {
                let entries = claimed.batch.as_ref().map_or(0, Batch::len);
                self.parts.metrics.reclaimed(entries);
                info!(consumer = %self.consumer, entries, gone = claimed.gone.len(), "reclaimed");
                if self.wait_for_room(line, stop).await?.is_none() {
                    return Ok(Err(Widowed));
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
    async fn wait_for_room(&self, line: &Line, stop: &Stop) -> Result<Option<bool>, Fault> {
        let Some(sender) = &self.sender else { return Ok(None) };
        let mut room = std::pin::pin!(sender.reserve());
        loop {
            tokio::select! {
                // Given back at once: this task is the only one that sends.
                permit = &mut room => return Ok(permit.is_ok().then_some(true)),
                () = stop.asked(), if line.is_quiet() => return Ok(Some(false)),
                () = stop.forced() => return Ok(Some(false)),
                () = tokio::time::sleep(self.parts.dead_after / SIGNS_OF_LIFE) => self.reader.keep_alive(&line.link).await?,
            }
        }
    }

    /// Waits until nothing is held, showing signs of life; or until a stop.
    async fn wait_until_quiet(&self, link: &Link, stop: &Stop) -> Result<Result<(), Widowed>, Fault> {
        let mut quiet = std::pin::pin!(self.shared.is_done_with(self.sent));
        let Some(sender) = &self.sender else { return Ok(Err(Widowed)) };
        loop {
            tokio::select! {
                () = &mut quiet => return Ok(Ok(())),
                () = sender.closed() => return Ok(Err(Widowed)),
                () = stop.asked() => return Ok(Ok(())),
                () = tokio::time::sleep(self.parts.dead_after / SIGNS_OF_LIFE) => self.reader.keep_alive(link).await?,
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
        let response = self.trouble.met(fault, Instant::now());
        if response.tell {
            let (consumer, advice) = (&self.consumer, response.judgement.advice);
            match response.judgement.verdict {
                Verdict::Halt => error!(%consumer, %fault, advice, "reading is halted"),
                _ => warn!(%consumer, %fault, advice, "reading is interrupted"),
            }
        }
        tokio::select! {
            () = tokio::time::sleep(response.wait) => {}
            () = stop.asked() => {}
        }
    }

    fn works_again(&mut self) {
        if let Some((attempts, lasted)) = self.trouble.over(Instant::now()) {
            info!(consumer = %self.consumer, attempts, lasted_ms = lasted.as_millis() as u64, "reading goes on");
        }
    }
}

/// The part that settles batches: flushed, recognised, or buried.
#[derive(Debug)]
pub struct Settler {
    parts: Parts,
    consumer: Arc<str>,
    shared: Arc<Shared>,
    receiver: mpsc::Receiver<Held>,
    receipts: mpsc::Sender<Receipt>,
    trouble: Trouble,
}

/// The second phase of a stop has begun, or nobody is there to acknowledge: what is held stays pending.
#[derive(Debug)]
struct Interrupted;

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
            match flush::flush(&self.parts.database, &self.parts.target, batch).await {
                Ok(flushed) => {
                    failpoint::reached("flush.committed");
                    self.works_again();
                    self.tell(&flushed.settled);
                    self.hand_on(Receipt::Settled(held.link.clone(), flushed.settled)).await?;
                    if let Some(batch) = flushed.unjudgeable {
                        self.settle_unjudgeable(&held.link, batch, stop).await?;
                    }
                }
                Err(Failed { batch, why: Why::Refused(spans) }) => {
                    let (rest, aside) = batch.set_aside(&spans);
                    work.extend([aside, rest].into_iter().filter(|part| !part.is_empty()));
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
        let tally = &settled.tally;
        self.parts.metrics.flushed(tally);
        debug!(consumer = %self.consumer, applied = tally.applied, rows = tally.rows, "flushed");
        if tally.recognised > 0 {
            info!(consumer = %self.consumer, entries = tally.recognised, "redelivered entries were recognised");
        }
        if tally.buried > 0 {
            warn!(consumer = %self.consumer, entries = tally.buried, "entries were buried: see tidegate.dead_letters");
        }
        if tally.collided > 0 {
            warn!(consumer = %self.consumer, entries = tally.collided, "other content under used ids was applied (split brain?)");
        }
    }

    /// The ledger covers these ids and no longer tells the content. If somebody has acknowledged one, somebody has seen it
    /// settled; else it is kept for an operator to judge.
    async fn settle_unjudgeable(&mut self, link: &Arc<Link>, batch: Batch, stop: &Stop) -> Result<(), Interrupted> {
        let pipeline = self.parts.target.pipeline();
        let ids: Vec<EntryId> = batch.entries().iter().map(|e| e.id).collect();
        let Ok(pending) = reclaim::still_pending(link, &pipeline.stream, &pipeline.group(), &ids).await else {
            // They stay pending, if they are, and come again.
            return Ok(());
        };
        let indices: Vec<usize> = (0..batch.len()).filter(|&i| pending.contains(&batch.entries()[i].id)).collect();
        let settled = batch.len() - indices.len();
        if settled > 0 {
            self.parts.metrics.dropped(settled);
            warn!(consumer = %self.consumer, entries = settled, "entries older than the ledger tells, settled by somebody, were dropped");
        }
        if indices.is_empty() {
            return Ok(());
        }
        let mut doubtful = batch.pick(&indices);
        doubtful.condemn(Death::from(Malformed::Unjudgeable));
        loop {
            match flush::bury_covered(&self.parts.database, &self.parts.target, doubtful).await {
                Ok(settled) => {
                    self.works_again();
                    self.tell(&settled);
                    return self.hand_on(Receipt::Settled(link.clone(), settled)).await;
                }
                Err(Failed { batch, why: Why::Fault(fault) }) => {
                    self.met(&fault, batch.len(), stop).await?;
                    doubtful = batch;
                }
                Err(Failed { batch, why: Why::Refused(_) }) => doubtful = batch,
            }
        }
    }

    /// Pending ids that the stream has no longer: flushed, if the ledger covers them; else Valkey lost them.
    async fn account_for(&mut self, gone: &[EntryId], stop: &Stop) -> Result<(), Interrupted> {
        let lane = self.parts.target.lane();
        loop {
            match self.parts.database.run(async |c| ledger::uncovered(c, lane, gone).await).await {
                Ok(lost) => {
                    self.works_again();
                    if !lost.is_empty() {
                        self.parts.metrics.lost_upstream(lost.len());
                        let first: Vec<String> = lost.iter().take(IDS_TOLD).map(EntryId::to_string).collect();
                        error!(
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
        let first = !self.trouble.lasts();
        let response = self.trouble.met(fault, Instant::now());
        let (consumer, advice) = (&self.consumer, response.judgement.advice);
        match response.judgement.verdict {
            // Searching for poison is work, not trouble.
            verdict @ (Verdict::Split | Verdict::Shrink) if entries > 1 || verdict == Verdict::Split => {
                debug!(%consumer, %fault, advice, entries, "a batch is halved");
                if first {
                    self.trouble = Trouble::default();
                }
                return Ok(verdict);
            }
            Verdict::Halt if response.tell => error!(%consumer, %fault, advice, entries, "flushing is halted"),
            _ if response.tell => warn!(%consumer, %fault, advice, entries, "flushing is interrupted"),
            _ => {}
        }
        if first {
            self.shared.failing.store(true, Ordering::Relaxed);
            self.parts.metrics.begins_to_fail();
        }
        pause(response.wait, stop).await?;
        Ok(response.judgement.verdict)
    }

    /// So much poison is no poison: something about the table is wrong, and nothing is buried for it.
    async fn halt(&mut self, entries: usize, fault: &Fault, stop: &Stop) -> Result<(), Interrupted> {
        let first = !self.trouble.lasts();
        let response = self.trouble.met(fault, Instant::now());
        if response.tell {
            error!(consumer = %self.consumer, %fault, entries, "flushing is halted: the table refuses so many entries that the cause must lie in it; nothing was buried");
        }
        if first {
            self.shared.failing.store(true, Ordering::Relaxed);
            self.parts.metrics.begins_to_fail();
        }
        pause(response.wait, stop).await
    }

    fn works_again(&mut self) {
        if self.shared.failing.swap(false, Ordering::Relaxed) {
            self.parts.metrics.works_again();
        }
        if let Some((attempts, lasted)) = self.trouble.over(Instant::now()) {
            info!(consumer = %self.consumer, attempts, lasted_ms = lasted.as_millis() as u64, "flushing goes on");
        }
    }
}

impl Drop for Settler {
    /// A settler that ends while it fails must not leave the trimmer waiting for it.
    fn drop(&mut self) {
        if self.shared.failing.swap(false, Ordering::Relaxed) {
            self.parts.metrics.works_again();
        }
    }
}

/// The part that acknowledges what is settled. If that fails nothing is lost: it is delivered again and recognised.
#[derive(Debug)]
pub struct Acker {
    parts: Parts,
    consumer: Arc<str>,
    shared: Arc<Shared>,
    settled: mpsc::Receiver<Receipt>,
}

impl Acker {
    /// Acknowledges until the settler has left and everything is done with; or until the second phase of a stop.
    pub async fn run(mut self, stop: Stop) {
        loop {
            let receipt = tokio::select! {
                receipt = self.settled.recv() => receipt,
                () = stop.forced() => return,
            };
            match receipt {
                Some(Receipt::Settled(link, settled)) => self.acknowledge(&link, &settled).await,
                Some(Receipt::Done) => self.shared.done.send_modify(|done| *done += 1),
                None => return,
            }
        }
    }

    async fn acknowledge(&self, link: &Link, settled: &Settled) {
        let pipeline = self.parts.target.pipeline();
        match ack::ack(link, &pipeline.group(), &pipeline.stream, settled).await {
            Ok(Acked::Removed(_)) => {}
            Ok(Acked::Dropped) => {
                self.parts.metrics.ack_dropped();
                info!(consumer = %self.consumer, entries = settled.ids().len(), "the connection changed: acknowledgement dropped");
            }
            Err(fault) => {
                self.parts.metrics.ack_dropped();
                info!(consumer = %self.consumer, %fault, entries = settled.ids().len(), "acknowledgement failed");
            }
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
