//! A session of whoever compares a stream with the ledger: a link for commands, and a wire to the same server for entries.
//!
//! Takes where Valkey is; fails with what Valkey said. Entries are read over the wire because it digests the huge ones while they
//! pass: no more of an entry is needed than its digest.

use crate::retry::Fault;
use crate::valkey::resp::Bounds;
use crate::valkey::{Endpoint, Link, Wire};

/// A larger entry is not held while it is digested.
const BOUNDS: Bounds = Bounds { entry: 1 << 20, kept: 0 };

/// A link and a wire to the same server.
#[derive(Debug)]
pub struct Session {
    /// For commands.
    pub link: Link,
    /// For entries.
    pub wire: Wire,
}

impl Session {
    /// Connects both, under this name.
    pub async fn open(address: &Endpoint, name: &str) -> Result<Session, Fault> {
        let link = Link::open(address, name).await?;
        let (wire, _) = link.open_wire(name, BOUNDS).await?;
        Ok(Session { link, wire })
    }

    /// Whether either connection was found broken: then the pair is of no more use.
    pub fn is_lost(&self) -> bool {
        self.link.is_lost() || self.wire.is_lost()
    }
}
