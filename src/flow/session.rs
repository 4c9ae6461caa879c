//! A session: what one worker reads and commands on, and the consumer that it is meanwhile.
//!
//! Takes where Valkey is and which worker asks; gives a link and a wire to the same server, both by a name that tells source,
//! pipeline and consumer. A consumer is one session: its name holds the number of its link, so that whoever finds entries
//! pending under it can ask the server whether that connection still exists. It fails with what Valkey said.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::model::names;
use crate::retry::Fault;
use crate::valkey::resp::Bounds;
use crate::valkey::{Endpoint, Link, Wire};

/// Which worker it is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The worker's name, the same over all its sessions.
    pub worker: Arc<str>,
    /// What the names of its pipeline's connections begin with.
    pub connections: Arc<str>,
}

/// What a worker reads on: a link, and a wire to the same server.
#[derive(Debug)]
pub struct Session {
    /// For commands.
    pub link: Arc<Link>,
    /// Who it is in the group.
    pub consumer: Arc<str>,
    pub(super) wire: Wire,
    pub(super) wire_id: Option<i64>,
    /// The reads under way, oldest first.
    pub(super) asked: VecDeque<Asked>,
}

/// A read under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    /// How many entries it has asked for.
    pub(super) count: usize,
    /// How many of them have come.
    pub(super) got: usize,
}

impl Session {
    /// Connects both, as a consumer that nobody was before; holds no more than this of one entry.
    pub async fn open(address: &Endpoint, identity: &Identity, bounds: Bounds) -> Result<Session, Fault> {
        let mut consumer: Arc<str> = "".into();
        let name = |run_id: &str, number| {
            consumer = names::consumer(&identity.worker, run_id, number, rand::random()).into();
            format!("{}{consumer}", identity.connections)
        };
        let link = Arc::new(Link::open_as(address, name).await?);
        let (wire, wire_id) = link.open_wire(&format!("{}{consumer}", identity.connections), bounds).await?;
        Ok(Session { link, consumer, wire, wire_id, asked: VecDeque::new() })
    }

    /// Whether no read is under way: nothing is delivered to this consumer that it does not know of.
    pub fn is_quiet(&self) -> bool {
        self.asked.is_empty()
    }

    /// Whether either connection was found broken: then the pair is of no more use.
    pub fn is_lost(&self) -> bool {
        self.link.is_lost() || self.wire.is_lost()
    }
}
