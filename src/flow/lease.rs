//! Lease: who reads a stream alone.
//!
//! A keeper asks Valkey for the leases of a pipeline's streams, renews them, and gives them back at the end; a holder that has the other
//! ends reads the streams whose leases are held. A lease is a key that expires, and no more than a hint that keeps two processes from
//! doing the same work: two that both believe to hold it meet in the ledger, which lets each entry through once.
//!
//! The keeper has a connection of its own, so that a large reply on the reader's keeps it from nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tracing::{debug, info};

use super::position::Claim;
use super::setup::{LONGEST_IDLE, WorkerSetup};
use crate::failpoint;
use crate::model::names;
use crate::retry::{Fault, Incident};
use crate::valkey::{Command, Link, unexpected};

/// A lease is renewed so often while it lasts; and sooner, where a connection would be idle for too long.
const RENEWALS: u32 = 4;
/// The same where there are many: these last longer.
const RENEWALS_OF_MANY: u32 = 3;
/// Of many leases those that are due within this part of the time between two renewals are renewed together, so that looking which ones are due does not
/// become the work.
const TOGETHER: u32 = 4;
/// Who waits for it looks so often while it lasts, and when it runs out; and sooner, so that what is handed over is taken at once.
const LOOKS: u32 = 20;
/// The longest between two looks.
const LONGEST_LOOK: Duration = Duration::from_millis(100);
/// What a lease lasts at the least for each stream of its pipeline: renewing them all must not become the work.
const LEAST_PER_STREAM: Duration = Duration::from_millis(1);
/// Leases asked for in one script: a fraction of a millisecond of the server's time.
const ASKED_AT_ONCE: usize = 64;
/// Up to so many streams each change is an event of its own.
pub(super) const FEW: usize = 16;
/// The name of its connections.
const NAME: &str = "tidegate:lease";

/// Takes or renews leases, those that are free and wanted; gives of each for how many milliseconds it is still somebody else's (0: it is one's own,
/// -1: nobody's), and how many processes would read this stream; 0 where that was not looked at, because a lease that is held was only renewed. A server whose memory is full would refuse the keys, and reading is what makes
/// room: hence the flag.
const TAKE: &str = "#!lua flags=allow-oom
local token, whole = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function take(lease, readers, wanted)
    local holder = redis.call('GET', lease)
    if wanted == 'kept' and holder == token then
        redis.call('PEXPIRE', lease, whole)
        return 0, 0
    end
    local known = redis.call('ZSCORE', readers, token)
    -- Who waits looks often, and need not write each time; who holds renews four times while it lasts, and writes every second time.
    if not known or known - now < whole * (holder == token and 0.6 or 0.75) then
        redis.call('ZADD', readers, now + whole, token)
        redis.call('PEXPIRE', readers, whole)
    end
    redis.call('ZREMRANGEBYSCORE', readers, '-inf', now)
    local alive = redis.call('ZCARD', readers)
    if holder and holder ~= token then return math.max(redis.call('PTTL', lease), 1), alive end
    if not holder and wanted == 'left' then return -1, alive end
    redis.call('SET', lease, token, 'PX', whole)
    return 0, alive
end
local replies = {}
for n = 1, #KEYS / 2 do
    replies[2 * n - 1], replies[2 * n] = take(KEYS[2 * n - 1], KEYS[2 * n], ARGV[n + 2])
end
return replies";

/// Gives leases back, those that are one's own.
const GIVE_BACK: &str = "
local replies = {}
for n = 1, #KEYS / 2 do
    if ARGV[n + 2] == 'ends' then redis.call('ZREM', KEYS[2 * n], ARGV[1]) end
    if redis.call('GET', KEYS[2 * n - 1]) == ARGV[1] then redis.call('DEL', KEYS[2 * n - 1]) end
    replies[2 * n - 1], replies[2 * n] = 0, 0
end
return replies";

/// An event of its own where there are few streams; else no more than a line for who looks closely.
macro_rules! tell {
    ($few:expr, $($what:tt)*) => { if $few { info!($($what)*) } else { debug!($($what)*) } };
}

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
    fn has_room(&self, processes: usize, taken: usize) -> bool {
        self.held.load(Ordering::Relaxed) + taken < self.fair(processes)
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

/// The holder's end of one lease.
#[derive(Debug, Clone)]
pub struct Lease {
    /// What it is about.
    pub claim: Claim,
    standing: watch::Receiver<Standing>,
    wish: Arc<Wish>,
    asked: Arc<Notify>,
}

/// What a holder asks its keeper for.
#[derive(Debug, Default)]
struct Wish {
    /// Whether the lease is still this process's is to be looked at now.
    doubt: AtomicBool,
    /// What was to be given up is settled.
    yielded: AtomicBool,
}

/// There is reason to ask at once whether a lease is still held.
#[derive(Debug, Clone)]
pub struct Doubt {
    wish: Arc<Wish>,
    asked: Arc<Notify>,
}

impl Doubt {
    /// Asks.
    pub fn raise(&self) {
        self.wish.doubt.store(true, Ordering::Relaxed);
        self.asked.notify_one();
    }
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

    /// Nothing that was read by it is unsettled: it is given up.
    pub fn give_up(&self) {
        self.wish.yielded.store(true, Ordering::Relaxed);
        self.asked.notify_one();
    }

    /// Where doubts are raised.
    pub fn doubt(&self) -> Doubt {
        Doubt { wish: self.wish.clone(), asked: self.asked.clone() }
    }
}

/// The holder's end: dropped, the leases are given back.
#[derive(Debug)]
pub struct Leases {
    /// One for each stream, in the order of the setup's lanes.
    pub all: Vec<Lease>,
    /// Rung when one was taken, lost, or is to be given up.
    pub changed: Arc<Notify>,
    /// Dropped with this, so that the keeper knows.
    _open: watch::Receiver<()>,
}

/// Keeps the leases of a pipeline's streams for one holder.
#[derive(Debug)]
pub struct Keeper {
    setup: WorkerSetup,
    kept: Vec<Kept>,
    token: String,
    whole: Duration,
    /// Rung when a holder wishes something.
    asked: Arc<Notify>,
    changed: Arc<Notify>,
    open: watch::Sender<()>,
    incident: Incident,
}

/// One lease.
#[derive(Debug)]
struct Kept {
    claim: Claim,
    standing: watch::Sender<Standing>,
    wish: Arc<Wish>,
    /// When it is looked at next.
    due: Instant,
    /// Since when nobody has it, as far as was seen.
    free_since: Option<Instant>,
    /// How many processes would read the stream.
    processes: usize,
    /// Whether it is held, and was noted among those processes when it was asked for last.
    is_noted: bool,
    /// Where it was taken beyond this process's share, for nobody else took it: how many processes there were.
    left_by: Option<usize>,
    /// Whether it was told that somebody else has it.
    told: bool,
}

/// The two ends of the leases of a worker's streams.
pub fn leases(setup: &WorkerSetup, worker: &str) -> (Keeper, Leases) {
    // Another one for each keeper: what comes late from one before it counts for nothing.
    let token = format!("{worker}-{:016x}", rand::random::<u64>());
    let (asked, changed, now) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Instant::now());
    let (kept, all) = setup
        .lanes
        .iter()
        .map(|lane| {
            let pipeline = lane.pipeline();
            let claim = Claim {
                stream: pipeline.stream.clone(),
                group: pipeline.group(),
                lease: names::lease(&pipeline.stream, &pipeline.name),
                token: token.clone(),
            };
            let ((standing, is_standing), wish) = (watch::channel(Standing::Waits), Arc::new(Wish::default()));
            let lease = Lease { claim: claim.clone(), standing: is_standing, wish: wish.clone(), asked: asked.clone() };
            let kept = Kept {
                claim,
                standing,
                wish,
                due: now,
                free_since: None,
                processes: 1,
                is_noted: false,
                left_by: None,
                told: false,
            };
            (kept, lease)
        })
        .unzip();
    let whole = setup.lease.max(LEAST_PER_STREAM * setup.lanes.len() as u32);
    let (open, is_open) = watch::channel(());
    let (setup, incident) = (setup.clone(), setup.metrics.reading.incident());
    let keeper = Keeper { setup, kept, token, whole, asked, changed: changed.clone(), open, incident };
    (keeper, Leases { all, changed, _open: is_open })
}

impl Keeper {
    /// Keeps the leases until their holder has gone.
    pub async fn run(mut self) {
        while !self.open.is_closed() {
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
                () = self.open.closed() => {}
            }
        }
    }

    /// Takes, renews and gives up, for the life of one link.
    async fn keep(&mut self, link: &Link) -> Result<(), Fault> {
        // What was heard before this link says nothing of now.
        for kept in &mut self.kept {
            (kept.free_since, kept.is_noted, kept.due) = (None, false, Instant::now());
        }
        while !self.open.is_closed() {
            let (due, yielded) = self.due(Instant::now());
            for some in yielded.chunks(ASKED_AT_ONCE) {
                self.script(link, GIVE_BACK, some.iter().map(|n| (*n, "goes on")).collect()).await?;
                some.iter().for_each(|n| self.stands(*n, Standing::Waits));
            }
            for some in due.chunks(ASKED_AT_ONCE) {
                self.take(link, some).await?;
            }
            let next = self.kept.iter().map(|kept| kept.due).min();
            tokio::select! {
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into()) => {}
                () = self.asked.notified() => {}
                () = self.open.closed() => {}
            }
        }
        failpoint::reached("lease.left");
        // If this fails, they run out.
        let all: Vec<usize> = (0..self.kept.len()).collect();
        for some in all.chunks(ASKED_AT_ONCE) {
            self.script(link, GIVE_BACK, some.iter().map(|n| (*n, "ends")).collect()).await?;
        }
        Ok(())
    }

    /// Which are to be looked at by now, and which are given up.
    fn due(&mut self, now: Instant) -> (Vec<usize>, Vec<usize>) {
        let (mut due, mut yielded) = (Vec::new(), Vec::new());
        let soon = if self.kept.len() > FEW { now + self.whole / RENEWALS_OF_MANY / TOGETHER } else { now };
        for (n, kept) in self.kept.iter_mut().enumerate() {
            let doubt = kept.wish.doubt.swap(false, Ordering::Relaxed);
            let standing = *kept.standing.borrow();
            if kept.wish.yielded.swap(false, Ordering::Relaxed) && matches!(standing, Standing::Yields(_)) {
                yielded.push(n);
            }
            // Only what is held can be renewed before its time: what is another's is free when that has run out.
            let by = if matches!(standing, Standing::Holds(_)) { soon } else { now };
            if doubt || kept.due <= by {
                due.push(n);
            }
        }
        (due, yielded)
    }

    /// Takes or renews some of them.
    async fn take(&mut self, link: &Link, some: &[usize]) -> Result<(), Fault> {
        let (whole, asked_at) = (self.whole, Instant::now());
        let mut taken = 0;
        let mut asks = Vec::with_capacity(some.len());
        for n in some {
            let kept = &self.kept[*n];
            // Who has less than its share takes what is free at once; what nobody takes for a while anybody may have.
            let has_room = self.setup.shares.has_room(kept.processes, taken);
            let is_left = !has_room && kept.free_since.is_some_and(|since| asked_at - since >= whole);
            let waits = *kept.standing.borrow() == Standing::Waits;
            taken += usize::from(waits && has_room);
            asks.push((is_left, !waits || is_left || has_room));
        }
        let are_many = self.kept.len() > FEW;
        let wanted = |n: usize, wants| match wants {
            // Of many every second time.
            true if are_many && self.kept[n].is_noted => "kept",
            true => "wanted",
            false => "left",
        };
        let of = some.iter().zip(&asks).map(|(n, (_, wants))| (*n, wanted(*n, *wants))).collect();
        let replies = self.script(link, TAKE, of).await?;
        failpoint::reached("lease.taken");
        self.setup.reads_again(&mut self.incident);
        for ((n, (is_left, _)), (theirs, processes)) in some.iter().copied().zip(asks).zip(replies) {
            let had = *self.kept[n].standing.borrow();
            let kept = &mut self.kept[n];
            // Whether it was noted among the readers just now, by its holder.
            kept.is_noted = theirs == 0 && processes > 0;
            let processes = if processes > 0 { processes } else { kept.processes };
            kept.processes = processes;
            kept.free_since = (theirs < 0).then(|| kept.free_since.unwrap_or(asked_at));
            let wait = if theirs == 0 {
                let until = asked_at + whole;
                if had == Standing::Waits {
                    kept.left_by = is_left.then_some(processes);
                }
                let (left_by, yields) = (kept.left_by, matches!(had, Standing::Yields(_)));
                self.stands(n, if yields { Standing::Yields(until) } else { Standing::Holds(until) });
                // What the others have left once they would leave again.
                if !yields && left_by != Some(processes) && self.setup.shares.give_up(processes) {
                    self.stands(n, Standing::Yields(until));
                }
                if self.kept.len() > FEW { whole / RENEWALS_OF_MANY } else { (whole / RENEWALS).min(LONGEST_IDLE) }
            } else {
                self.stands(n, Standing::Waits);
                // Nobody's, and left to another process: no reason to look more often.
                let runs_out = if theirs > 0 { Duration::from_millis(theirs.unsigned_abs()) } else { whole };
                let often = whole / LOOKS;
                runs_out.min(often).min(LONGEST_LOOK.max(LEAST_PER_STREAM * self.kept.len() as u32))
            };
            self.kept[n].due = asked_at + wait;
        }
        Ok(())
    }

    /// Asks for some of them; each answer comes with how many processes there are.
    async fn script(&self, link: &Link, script: &str, of: Vec<(usize, &str)>) -> Result<Vec<(i64, usize)>, Fault> {
        let command = Command::new("EVAL").arg(script).arg(2 * of.len());
        let leases = of.iter().map(|(n, _)| &self.kept[*n].claim.lease);
        let command = leases.fold(command, |command, lease| command.arg(lease).arg(format!("{lease}:readers")));
        let command = command.arg(&self.token).arg(self.whole.as_millis()).args(of.iter().map(|(_, how)| *how));
        let reply = link.commands().call(command).await?;
        let parts = reply.into_array().map(|parts| parts.filter_map(|part| part.as_int()).collect::<Vec<i64>>());
        let parts = parts.filter(|parts| parts.len() == 2 * of.len()).ok_or_else(|| unexpected("EVAL"))?;
        Ok(parts.chunks_exact(2).map(|pair| (pair[0], pair[1].unsigned_abs() as usize)).collect())
    }

    /// Says how it stands; tells what changed.
    fn stands(&mut self, n: usize, now: Standing) {
        let few = self.kept.len() <= FEW;
        let kept = &mut self.kept[n];
        let mut before = now;
        // Nobody waits for it, and there may be very many: one that is only renewed wakes nobody.
        kept.standing.send_if_modified(|standing| {
            before = std::mem::replace(standing, now);
            false
        });
        let (name, stream) = (&self.setup.pipeline.name, &kept.claim.stream);
        let held = &self.setup.shares.held;
        match (before, now) {
            (Standing::Waits, Standing::Holds(_)) => {
                kept.told = false;
                held.fetch_add(1, Ordering::Relaxed);
                tell!(few, event = "lease_held", pipeline = %name, %stream, "this process reads the stream alone from now on");
            }
            (Standing::Holds(_) | Standing::Yields(_), Standing::Waits) => {
                kept.told = true;
                // What is yielded is no longer counted.
                if matches!(before, Standing::Holds(_)) {
                    held.fetch_sub(1, Ordering::Relaxed);
                }
                tell!(few, event = "lease_lost", pipeline = %name, %stream, "another process reads the stream from now on");
            }
            (Standing::Waits, Standing::Waits) if !kept.told => {
                kept.told = true;
                tell!(few, event = "lease_waits", pipeline = %name, %stream, "another process reads the stream: this one stands by");
            }
            (Standing::Holds(_), Standing::Yields(_)) => {}
            _ => return,
        }
        self.setup.metrics.holds_leases(held.load(Ordering::Relaxed));
        self.changed.notify_one();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let held = |kept: &&Kept| matches!(*kept.standing.borrow(), Standing::Holds(_));
        self.setup.shares.held.fetch_sub(self.kept.iter().filter(held).count(), Ordering::Relaxed);
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
        assert!(!shares.has_room(2, 0) && shares.has_room(1, 1) && !shares.has_room(1, 2));
        let one = Shares::of(1);
        one.held.store(1, Ordering::Relaxed);
        assert!(!one.give_up(5), "a single stream is never given up");
    }
}
