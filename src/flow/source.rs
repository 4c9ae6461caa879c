//! Source: whether a stream is flushed, or was, under another name of its Valkey (`valkey.source`).
//!
//! Takes a link to the stream's server, and which lanes other sources have on a stream of this name; gives the other name. Fails with what a server says.
//!
//! The ledger knows a stream by its Valkey's name. Under another one it is empty: what is delivered again, or replayed, would be added once more. But two
//! deployments may rightly have pipelines and streams of the same names, and flush into one table. So it is asked what only one and the same Valkey
//! can answer: whether a consumer of this very group has a connection of the other name, and whether the other ledger knows the stream's settled entries, every one
//! of the newest by its digest.

use std::ops::ControlFlow;
use std::time::Duration;

use super::{ledger, read};
use crate::lanes::LaneId;
use crate::model::entry::{EntryId, digest, write_canonical};
use crate::model::names;
use crate::model::pipeline::Shard;
use crate::postgres::Database;
use crate::retry::Fault;
use crate::valkey::resp::Bounds;
use crate::valkey::{Command, Delivered, Link, info};

/// So many settled entries are compared at the most. Other deployments give the same id to many entries, and the same content to some of them.
const COMPARED: usize = 200;
/// What is held of one entry.
const BOUNDS: Bounds = Bounds { entry: 1 << 20, kept: 4 << 10 };
/// The name of the connection.
const NAME: &str = "tidegate:start";

/// A worker that calls its Valkey by another name: the name, and its consumer's.
pub type Stranger = (String, String);

/// The workers of a pipeline that are connected to this server and call it by another name.
pub async fn strangers(link: &Link, pipeline: &str, source: &str) -> Result<Vec<Stranger>, Fault> {
    let peers = match info::peers(link.commands(), None).await {
        // Not permitted: nobody is seen.
        Err(Fault::Valkey { .. }) => return Ok(Vec::new()),
        peers => peers?,
    };
    let told = peers.iter().filter_map(|peer| names::source_of(&peer.name, pipeline));
    Ok(told.filter(|(of, _)| *of != source).map(|(of, consumer)| (of.to_owned(), consumer.to_owned())).collect())
}

/// The other name under which one of these flushes this shard.
pub async fn of_the_living(link: &Link, shard: &Shard, strangers: &[Stranger]) -> Result<Option<String>, Fault> {
    let consumers = match info::consumers(link.commands(), &shard.stream, &shard.pipeline.group()).await {
        // There is no group yet.
        Err(Fault::Valkey { .. }) => return Ok(None),
        consumers => consumers?,
    };
    let is_here = |(_, name): &&Stranger| consumers.iter().any(|consumer| consumer.name == *name);
    Ok(strangers.iter().find(is_here).map(|(other, _)| other.clone()))
}

/// The other name under which this shard was flushed. `lanes`: those that other sources have on a stream of its name, with their names.
pub async fn of_the_ledger(
    link: &Link,
    database: &Database,
    shard: &Shard,
    lanes: &[(LaneId, String)],
) -> Result<Option<String>, Fault> {
    let frontier = read::frontier(link, &shard.stream, &shard.pipeline.group()).await?;
    let settled = newest(link, &shard.stream, frontier).await?;
    let ids = || settled.iter().map(|(id, _)| *id);
    let (Some(first), Some(last)) = (ids().min(), ids().max()) else { return Ok(None) };
    for (lane, name) in lanes {
        let rows = database.run(async |c| ledger::rows_within(c, *lane, first, last).await).await?;
        // A row without digests tells nothing.
        let known = |(id, digest): &(EntryId, u64)| match rows.iter().find(|row| row.first <= *id && *id <= row.last) {
            Some(row) => row.digests.as_ref().map(|digests| digests.contains(digest)),
            None => Some(false),
        };
        let told: Vec<bool> = settled.iter().filter_map(known).collect();
        if !told.is_empty() && told.iter().all(|known| *known) {
            return Ok(Some(name.clone()));
        }
    }
    Ok(None)
}

/// The newest entries below this id, by id and digest.
async fn newest(link: &Link, stream: &str, below: Option<EntryId>) -> Result<Vec<(EntryId, u64)>, Fault> {
    let (mut wire, _) = link.open_wire(NAME, BOUNDS).await?;
    let (mut entries, mut canonical) = (Vec::new(), Vec::new());
    let end = below.map_or_else(|| "+".to_owned(), |below| format!("({below}"));
    wire.send(&Command::new("XREVRANGE").arg(stream).arg(end).arg("-").arg("COUNT").arg(COMPARED));
    let read = wire.run(Duration::ZERO, |delivered| {
        match delivered {
            Delivered::Whole(id, strings) => {
                canonical.clear();
                write_canonical(&mut canonical, id, strings);
                entries.push((id, digest(&canonical)));
            }
            Delivered::Shortened(entry) => entries.push((entry.id, entry.digest)),
        }
        ControlFlow::Continue(())
    });
    read.await?;
    Ok(entries)
}
