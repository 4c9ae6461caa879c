//! A worker: a taker takes batches from Valkey, settlers settle them in PostgreSQL, an acker gives back what is settled.
//!
//! ```text
//!  Valkey ──▶ Taker ──[one batch]──▶ Settler ──▶ PostgreSQL
//!    ▲                                  │
//!    └──────────── Acker ◀──[settled]───┘
//! ```
//!
//! They work at once: while one batch is flushed the next is read and the one before is acknowledged. The taker
//! reserves the room before it reads, so a settler holds two batches at the most, the ids of two more, and what a few reads
//! under way bring; when PostgreSQL is slow reading stops and the backlog stays in Valkey. What arrives while a batch is
//! flushed is the next batch: under low load entries land at once, under high load batches grow by themselves.
//!
//! A worker of a group has one settler, and there are several workers. Where one process reads a pipeline's streams alone there is one
//! [`Soloist`], with several settlers and a keeper of the leases; and for each stream that cannot be read alone yet a worker of the group.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::acker::Acker;
use super::handoff::{Outlets, Shared};
use super::holder::{Enlisted, Holder, Returned};
use super::lease::{self, Keeper, Lease};
use super::member::Membership;
use super::read::Reader;
use super::reclaim::Reclaimer;
use super::session::Identity;
use super::settler::Settler;
use super::setup::WorkerSetup;
use super::taker::Taker;
use crate::model::names;

/// Receipts between a settler and the acker: one flush and the end of its batch.
const RECEIPTS: usize = 2;

/// The actors of a worker of a group.
#[derive(Debug)]
pub struct Worker {
    /// Takes batches from Valkey.
    pub taker: Taker,
    /// Settles them in PostgreSQL.
    pub settlers: Vec<Settler>,
    /// Gives back what is settled.
    pub acker: Acker,
}

/// The actors that read a pipeline's streams alone.
#[derive(Debug)]
pub struct Soloist {
    /// Reads the streams whose leases are held.
    pub holder: Holder,
    /// Settle the batches in PostgreSQL.
    pub settlers: Vec<Settler>,
    /// Moves the groups' positions over what is settled.
    pub acker: Acker,
    /// Keeps the leases.
    pub keeper: Keeper,
    /// The streams that workers of the group are to read.
    pub enlisted: mpsc::UnboundedReceiver<Enlisted>,
    /// To be told when such a worker has left.
    pub returned: mpsc::UnboundedSender<Returned>,
    /// The leases, for these workers.
    pub leases: Vec<Lease>,
}

/// What takers and their settlers have in common.
struct Downstream {
    shared: Arc<Shared>,
    outlets: Outlets,
    settlers: Vec<Settler>,
    acker: Acker,
}

fn downstream(setup: &WorkerSetup, name: &Arc<str>, count: usize) -> Downstream {
    let (receipts, settled) = mpsc::channel(RECEIPTS * count);
    let shared = Arc::new(Shared::of(count));
    let (outlets, settlers) = (0..count)
        .map(|slot| {
            let (sender, receiver) = mpsc::channel(1);
            (sender, Settler::new(setup.clone(), name.clone(), (shared.clone(), slot), receiver, receipts.clone()))
        })
        .unzip();
    let acker = Acker::new(setup.clone(), name.clone(), shared.clone(), settled);
    Downstream { shared, outlets: Outlets::to(outlets), settlers, acker }
}

fn identity(setup: &WorkerSetup, name: Arc<str>) -> Identity {
    let connections = names::connections_of(setup.lanes[0].source(), &setup.pipeline.name);
    Identity { worker: name, connections: connections.into() }
}

/// The actors of a worker. `name`: its name in log lines; its consumers' names begin with it. `membership`: until when it reads, where the
/// stream is to be read alone.
pub fn assemble(setup: WorkerSetup, name: Arc<str>, membership: Option<Membership>) -> Worker {
    let count = if membership.is_some() { setup.settlers } else { 1 };
    let Downstream { shared, outlets, settlers, acker } = downstream(&setup, &name, count);
    let (pipeline, identity) = (&setup.pipeline, identity(&setup, name));
    let process = names::consumers_of(&names::host(), std::process::id());
    let taker = Taker {
        reader: Reader::new(pipeline, setup.limits, setup.block()),
        reclaimer: Reclaimer::new(pipeline, &identity.connections, process, setup.patience, setup.limits),
        identity,
        shared,
        outlets: Some(outlets),
        sent: 0,
        suspect: None,
        met: None,
        has_group: membership.is_some(),
        membership,
        incident: setup.metrics.reading.incident(),
        setup,
    };
    Worker { taker, settlers, acker }
}

/// The actors that read the streams of the setup's lanes alone.
pub fn assemble_soloist(setup: WorkerSetup, name: Arc<str>) -> Soloist {
    let Downstream { shared, outlets, settlers, acker } = downstream(&setup, &name, setup.settlers);
    let (keeper, leases) = lease::leases(&setup, &name);
    let (enlist, enlisted) = mpsc::unbounded_channel();
    let (returned, is_returned) = mpsc::unbounded_channel();
    let of_members = leases.all.clone();
    let holder = Holder::new(setup.clone(), identity(&setup, name), leases, (shared, outlets), (enlist, is_returned));
    Soloist { holder, settlers, acker, keeper, enlisted, returned, leases: of_members }
}
