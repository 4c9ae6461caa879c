//! Lease: who reads a stream alone.
//!
//! A keeper asks Valkey for the lease of one stream, renews it, and gives it back at the end; a taker that holds the other end reads
//! while the lease is held. The lease is a key that expires, and no more than a hint that keeps two processes from doing the
//! same work: two that both believe to hold it meet in the ledger, which lets each entry through once.
//!
//! The keeper has a connection of its own, so that a large reply on the reader's keeps it from nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tracing::info;

use super::position::Claim;
use super::setup::WorkerSetup;
use crate::failpoint;
use crate::model::names;
use crate::retry::{Fault, Incident};
use crate::valkey::{Command, Link, unexpected};

/// It is renewed so often while it lasts.
const RENEWALS: u32 = 4;
/// Who waits for it looks so often while it lasts, and when it runs out.
const LOOKS: u32 = 20;
/// The name of its connections.
const NAME: &str = "tidegate:lease";

/// Takes or renews it; gives 0, or for how many milliseconds it is still somebody else's. A server whose memory is full would refuse
/// the key, and reading is what makes room: hence the flag.
const TAKE: &str = "#!lua flags=allow-oom
local holder = server.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return math.max(server.call('PTTL', KEYS[1]), 1) end
server.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 0";

/// Gives it back, if it is one's own.
const GIVE_BACK: &str = "
if server.call('GET', KEYS[1]) == ARGV[1] then return server.call('DEL', KEYS[1]) end
return 0";

/// A taker's end: dropped, the lease is given back.
#[derive(Debug)]
pub struct Lease {
    /// What it is about.
    pub claim: Claim,
    /// Rung when there is reason to ask at once whether it is still held.
    pub doubt: Arc<Notify>,
    held_until: watch::Receiver<Option<Instant>>,
}

impl Lease {
    /// Whether it is held, as far as this process's clock tells.
    pub fn is_held(&self) -> bool {
        self.held_until.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Resolves when it is held.
    pub async fn held(&self) {
        let is_held = |until: &Option<Instant>| until.is_some_and(|until| Instant::now() < until);
        // Its keeper has ended: it will never be held.
        if self.held_until.clone().wait_for(is_held).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Keeps the lease of one stream for one taker.
#[derive(Debug)]
pub struct Keeper {
    setup: WorkerSetup,
    claim: Claim,
    doubt: Arc<Notify>,
    held_until: watch::Sender<Option<Instant>>,
    incident: Incident,
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
    let (held_until, is_held_until) = watch::channel(None);
    let doubt = Arc::new(Notify::new());
    let lease = Lease { claim: claim.clone(), doubt: doubt.clone(), held_until: is_held_until };
    let incident = setup.metrics.reading.incident();
    (Keeper { setup: setup.clone(), claim, doubt, held_until, incident, told: false }, lease)
}

impl Keeper {
    /// Keeps the lease until its taker has ended, then gives it back.
    pub async fn run(mut self) {
        while !self.held_until.is_closed() {
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
                () = self.held_until.closed() => {}
            }
        }
    }

    /// For as long as the link lasts, or until the taker has ended. A command that was sent is always waited for: none may arrive
    /// behind the one that gives back.
    async fn keep(&mut self, link: &Link) -> Result<(), Fault> {
        let whole = self.setup.lease;
        while !self.held_until.is_closed() {
            let asked_at = Instant::now();
            let theirs = self.script(link, TAKE).await?;
            failpoint::reached("lease.taken");
            self.setup.reads_again(&mut self.incident);
            let wait = if theirs == 0 {
                self.is_held_until(Some(asked_at + whole));
                whole / RENEWALS
            } else {
                self.is_held_until(None);
                Duration::from_millis(theirs).min(whole / LOOKS)
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.doubt.notified() => {}
                () = self.held_until.closed() => {}
            }
        }
        failpoint::reached("lease.left");
        // If this fails, it runs out.
        self.script(link, GIVE_BACK).await.map(drop)
    }

    async fn script(&self, link: &Link, script: &str) -> Result<u64, Fault> {
        let command = Command::new("EVAL").arg(script).arg(1).arg(&self.claim.lease).arg(&self.claim.token);
        let reply = link.commands().call(command.arg(self.setup.lease.as_millis())).await?;
        reply.as_int().map(i64::unsigned_abs).ok_or_else(|| unexpected("EVAL"))
    }

    fn is_held_until(&mut self, until: Option<Instant>) {
        let (held, pipeline) = (self.held_until.send_replace(until).is_some(), self.setup.lane.pipeline());
        let (name, stream) = (&pipeline.name, &pipeline.stream);
        match (held, until.is_some()) {
            (false, true) => {
                self.told = false;
                self.setup.metrics.holds_lease(true);
                info!(event = "lease_held", pipeline = %name, %stream, "this process reads the stream alone from now on");
            }
            (true, false) => {
                self.told = true;
                self.setup.metrics.holds_lease(false);
                info!(event = "lease_lost", pipeline = %name, %stream, "another process reads the stream from now on");
            }
            (false, false) if !self.told => {
                self.told = true;
                self.setup.metrics.holds_lease(false);
                info!(event = "lease_waits", pipeline = %name, %stream, "another process reads the stream: this one stands by");
            }
            _ => {}
        }
    }
}
