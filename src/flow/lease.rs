//! Lease: who reads a stream alone.
//!
//! A keeper asks Valkey for the lease of one stream, renews it, and gives it back at the end; a taker that holds the other end reads
//! while the lease is held. The lease is a key that expires, and no more than a hint that keeps two processes from doing the
//! same work: two that both believe to hold it meet in the ledger, which lets each entry through once.
//!
//! The keeper has a connection of its own, so that a large reply on the reader's keeps it from nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tracing::info;

use super::position::Claim;
use super::setup::{LONGEST_IDLE, WorkerSetup};
use crate::failpoint;
use crate::model::names;
use crate::retry::{Fault, Incident};
use crate::valkey::{Command, Link, unexpected};

/// It is renewed so often while it lasts; and sooner, where a connection would be idle for too long.
const RENEWALS: u32 = 4;
/// Who waits for it looks so often while it lasts, and when it runs out; and sooner, so that what is handed over is taken at once.
const LOOKS: u32 = 20;
/// The longest between two looks.
const LONGEST_LOOK: Duration = Duration::from_millis(100);
/// The name of its connections.
const NAME: &str = "tidegate:lease";

/// Takes or renews it, if it is free and wanted; gives for how many milliseconds it is still somebody else's (0: it is one's own, -1: nobody's),
/// and how many processes would read this stream. A server whose memory is full would refuse the keys, and reading is what makes room: hence
/// the flag.
const TAKE: &str = "#!lua flags=allow-oom
local lease, readers, token, whole, wanted = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2]), ARGV[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('ZSCORE', readers, token)
local holder = redis.call('GET', lease)
-- Who waits looks often, and need not write each time.
if holder == token or not known or known - now < whole * 3 / 4 then
    redis.call('ZADD', readers, now + whole, token)
    redis.call('PEXPIRE', readers, whole)
end
redis.call('ZREMRANGEBYSCORE', readers, '-inf', now)
local alive = redis.call('ZCARD', readers)
if holder and holder ~= token then return {math.max(redis.call('PTTL', lease), 1), alive} end
if not holder and wanted ~= 'wanted' then return {-1, alive} end
redis.call('SET', lease, token, 'PX', whole)
return {0, alive}";

/// Gives it back, if it is one's own.
const GIVE_BACK: &str = "
if ARGV[3] == 'ends' then redis.call('ZREM', KEYS[2], ARGV[1]) end
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return {0, 0}";

/// The leases of one pipeline's shards in this process: each process holds its share of them.
#[derive(Debug)]
pub struct Shares {
    shards: usize,
    held: AtomicUsize,
}

impl Shares {
    /// Of so many shards.
    pub fn of(shards: usize) -> Shares {
        Shares { shards, held: AtomicUsize::new(0) }
    }

    /// The share of one of so many processes.
    fn fair(&self, processes: usize) -> usize {
        self.shards.div_ceil(processes.max(1))
    }

    /// Whether one more is still within the share.
    fn has_room(&self, processes: usize) -> bool {
        self.held.load(Ordering::Relaxed) < self.fair(processes)
    }

    /// Gives one up, if this process holds more than its share.
    fn give_up(&self, processes: usize) -> bool {
        let less = |held| (held > self.fair(processes)).then(|| held - 1);
        self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

/// How a keeper stands to its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Somebody else has it, or nobody.
    Waits,
    /// It is held, until then at the least.
    Holds(Instant),
    /// It is held, and to be given up as soon as what was read is settled.
    Yields(Instant),
}

impl Standing {
    fn until(self) -> Option<Instant> {
        match self {
            Standing::Waits => None,
            Standing::Holds(until) | Standing::Yields(until) => Some(until),
        }
    }
}

/// A taker's end: dropped, the lease is given back.
#[derive(Debug)]
pub struct Lease {
    /// What it is about.
    pub claim: Claim,
    /// Rung when there is reason to ask at once whether it is still held.
    pub doubt: Arc<Notify>,
    standing: watch::Receiver<Standing>,
    yielded: Arc<Notify>,
}

impl Lease {
    /// Whether it is held, as far as this process's clock tells.
    pub fn is_held(&self) -> bool {
        self.standing.borrow().until().is_some_and(|until| Instant::now() < until)
    }

    /// Whether it is to be given up.
    pub fn is_to_be_yielded(&self) -> bool {
        matches!(*self.standing.borrow(), Standing::Yields(_))
    }

    /// Resolves when it is held. To be asked only by who reads nothing: what is to be given up is given up at once.
    pub async fn held(&self) {
        let mut standing = self.standing.clone();
        loop {
            let now = *standing.borrow_and_update();
            match now {
                Standing::Holds(until) if Instant::now() < until => return,
                Standing::Yields(_) => self.yielded.notify_one(),
                Standing::Holds(_) | Standing::Waits => {}
            }
            if standing.changed().await.is_err() {
                // Its keeper has ended: it will never be held.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Keeps the lease of one stream for one taker.
#[derive(Debug)]
pub struct Keeper {
    setup: WorkerSetup,
    claim: Claim,
    doubt: Arc<Notify>,
    standing: watch::Sender<Standing>,
    yielded: Arc<Notify>,
    incident: Incident,
    /// Since when nobody has it, as far as was seen.
    free_since: Option<Instant>,
    /// How many processes would read the stream.
    processes: usize,
    /// Where it was taken beyond this process's share, for nobody else took it: how many processes there were.
    left_by: Option<usize>,
    /// Whether it was told that somebody else has it.
    told: bool,
}

/// A keeper, and what its taker holds of it. `worker`: its name in log lines.
pub fn lease(setup: &WorkerSetup, worker: &str) -> (Keeper, Lease) {
    let pipeline = setup.lane.pipeline();
    let claim = Claim {
        stream: pipeline.stream.clone(),
        group: pipeline.group(),
        lease: names::lease(&pipeline.stream, &pipeline.name),
        // Another one for each keeper: what comes late from one before it counts for nothing.
        token: format!("{worker}-{:016x}", rand::random::<u64>()),
    };
    let (standing, is_standing) = watch::channel(Standing::Waits);
    let (doubt, yielded) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let lease = Lease { claim: claim.clone(), doubt: doubt.clone(), standing: is_standing, yielded: yielded.clone() };
    let (setup, incident) = (setup.clone(), setup.metrics.reading.incident());
    (
        Keeper {
            setup,
            claim,
            doubt,
            standing,
            yielded,
            incident,
            free_since: None,
            processes: 1,
            left_by: None,
            told: false,
        },
        lease,
    )
}

impl Keeper {
    /// Keeps the lease until its taker has ended, then gives it back.
    pub async fn run(mut self) {
        while !self.standing.is_closed() {
            let fault = match Link::open(&self.setup.valkey, NAME).await {
                Ok(link) => match self.keep(&link).await {
                    Ok(()) => return,
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            let wait = self.setup.met_reading(&mut self.incident, &fault);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.standing.closed() => {}
            }
        }
    }

    /// For as long as the link lasts, or until the taker has ended. A command that was sent is always waited for: none may arrive
    /// behind the one that gives back.
    async fn keep(&mut self, link: &Link) -> Result<(), Fault> {
        let whole = self.setup.lease;
        // What was heard before this link says nothing of now.
        self.free_since = None;
        while !self.standing.is_closed() {
            let (asked_at, had) = (Instant::now(), *self.standing.borrow());
            // Who has less than its share takes what is free at once; what nobody takes for a while anybody may have.
            let has_room = self.setup.shares.has_room(self.processes);
            let is_left = !has_room && self.free_since.is_some_and(|since| asked_at - since >= whole);
            let wants = had != Standing::Waits || is_left || has_room;
            let (theirs, processes) = self.script(link, TAKE, if wants { "wanted" } else { "left" }).await?;
            failpoint::reached("lease.taken");
            self.setup.reads_again(&mut self.incident);
            self.processes = processes;
            self.free_since = (theirs < 0).then(|| self.free_since.unwrap_or(asked_at));
            let wait = if theirs == 0 {
                let until = asked_at + whole;
                if had == Standing::Waits {
                    self.left_by = is_left.then_some(processes);
                }
                let yields = matches!(had, Standing::Yields(_));
                self.stands(if yields { Standing::Yields(until) } else { Standing::Holds(until) });
                // What the others have left once they would leave again.
                if !yields && self.left_by != Some(processes) && self.setup.shares.give_up(processes) {
                    self.stands(Standing::Yields(until));
                }
                (whole / RENEWALS).min(LONGEST_IDLE)
            } else {
                self.stands(Standing::Waits);
                // Nobody's, and left to another process: no reason to look more often.
                let runs_out = if theirs > 0 { Duration::from_millis(theirs.unsigned_abs()) } else { whole };
                runs_out.min(whole / LOOKS).min(LONGEST_LOOK)
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.doubt.notified() => {}
                () = self.standing.closed() => {}
                () = self.yielded.notified() => if matches!(*self.standing.borrow(), Standing::Yields(_)) {
                    self.script(link, GIVE_BACK, "goes on").await?;
                    self.stands(Standing::Waits);
                }
            }
        }
        failpoint::reached("lease.left");
        // If this fails, it runs out.
        self.script(link, GIVE_BACK, "ends").await.map(drop)
    }

    async fn script(&self, link: &Link, script: &str, how: &str) -> Result<(i64, usize), Fault> {
        let command = Command::new("EVAL").arg(script).arg(2).arg(&self.claim.lease);
        let command = command.arg(format!("{}:readers", self.claim.lease)).arg(&self.claim.token);
        let reply = link.commands().call(command.arg(self.setup.lease.as_millis()).arg(how)).await?;
        let mut parts = reply.into_array().ok_or_else(|| unexpected("EVAL"))?.map(|part| part.as_int());
        match (parts.next().flatten(), parts.next().flatten()) {
            (Some(theirs), Some(processes)) => Ok((theirs, processes.unsigned_abs() as usize)),
            _ => Err(unexpected("EVAL")),
        }
    }

    fn stands(&mut self, now: Standing) {
        let (before, pipeline) = (self.standing.send_replace(now), self.setup.lane.pipeline());
        let (name, stream) = (&pipeline.name, &pipeline.stream);
        let held = &self.setup.shares.held;
        match (before, now) {
            (Standing::Waits, Standing::Holds(_)) => {
                self.told = false;
                held.fetch_add(1, Ordering::Relaxed);
                self.setup.metrics.holds_lease(true);
                info!(event = "lease_held", pipeline = %name, %stream, "this process reads the stream alone from now on");
            }
            (Standing::Holds(_) | Standing::Yields(_), Standing::Waits) => {
                self.told = true;
                // What is yielded is no longer counted.
                if matches!(before, Standing::Holds(_)) {
                    held.fetch_sub(1, Ordering::Relaxed);
                }
                self.setup.metrics.holds_lease(false);
                info!(event = "lease_lost", pipeline = %name, %stream, "another process reads the stream from now on");
            }
            (Standing::Waits, Standing::Waits) if !self.told => {
                self.told = true;
                self.setup.metrics.holds_lease(false);
                info!(event = "lease_waits", pipeline = %name, %stream, "another process reads the stream: this one stands by");
            }
            _ => {}
        }
    }
}

impl Drop for Keeper {
    /// A keeper that ends in whatever way leaves its place to the others of this process.
    fn drop(&mut self) {
        if matches!(*self.standing.borrow(), Standing::Holds(_)) {
            self.setup.shares.held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_holds_its_share_and_gives_up_what_is_more() {
        let shares = Shares::of(4);
        shares.held.store(4, Ordering::Relaxed);
        assert!(!shares.give_up(1), "alone it holds all");
        assert!(shares.give_up(2) && shares.give_up(2) && !shares.give_up(2));
        assert!(!shares.has_room(2) && shares.has_room(1));
        let one = Shares::of(1);
        one.held.store(1, Ordering::Relaxed);
        assert!(!one.give_up(5), "a single stream is never given up");
    }
}
