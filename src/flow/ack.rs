//! Ack: what is settled leaves the group's pending list.
//!
//! Takes a [`Settled`] and the link it was read on; gives how many marks were removed. Where the link is another one, or the
//! server behind it is no longer what it was, nothing is sent: the entries are delivered again and the ledger recognises
//! them. On another server an id may stand for another entry, whose mark would be destroyed (I3).

use futures_util::future::try_join_all;

use crate::failpoint;
use crate::flow::flush::Settled;
use crate::retry::Fault;
use crate::valkey::{Command, Link, unexpected};

/// Ids in one XACK: keeps the server's other clients waiting for a few milliseconds at most.
const CHUNK: usize = 10_000;

/// What became of an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acked {
    /// Sent; this many were still marked as pending.
    Removed(u64),
    /// Not sent: it was read in another life of the connection or of the server.
    Dropped,
}

/// Acknowledges, on the very generation the entries were read on.
pub async fn ack(link: &Link, group: &str, stream: &str, settled: &Settled) -> Result<Acked, Fault> {
    let is_ours = settled.generation() == &**link.generation();
    if !is_ours || link.is_lost() || !link.is_same_server().await? {
        return Ok(Acked::Dropped);
    }
    let acks = settled.ids().chunks(CHUNK).map(|ids| {
        let command = Command::new("XACK").arg(stream).arg(group).args(ids);
        async {
            let removed = failpoint::during("ack.sent", link.commands().call(command)).await?;
            failpoint::reached("ack.chunk");
            removed.as_int().ok_or_else(|| unexpected("XACK"))
        }
    });
    let removed = try_join_all(acks).await?;
    Ok(Acked::Removed(removed.into_iter().map(i64::unsigned_abs).sum()))
}
