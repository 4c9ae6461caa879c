//! Upstream: what Valkey lost, by the ledger's account.
//!
//! Takes a stream's lanes and a session; counts what was flushed and is gone from the stream above the trim line, and tells the
//! stream to give ids above the ledger's. Fails with what a server says.
//!
//! The ledger is read first and the stream second, so that what is flushed meanwhile is not taken for lost; and the trim line
//! last, so that neither is what is trimmed meanwhile. To compare only the highest ids would not do: they agree again as soon as
//! traffic resumes. Everything is read in pages, newest first: what a failover loses is the newest.

use std::collections::HashSet;
use std::time::Duration;

use tracing::{error, info};

use super::session::Session;
use super::setup::CaretakerSetup;
use super::trim;
use crate::flow::ledger::{self, Extent};
use crate::functions::gate;
use crate::model::entry::EntryId;
use crate::retry::Fault;
use crate::shutdown::Stop;
use crate::valkey::Link;

/// Entries of the stream read in one step.
const STEP: usize = 1_000;
/// Ledger rows read in one step.
const PAGE: i64 = 1_000;
/// So many entries found where the ledger has them, newest first, and the rest is taken to be there too.
const INTACT_IS_ENOUGH: usize = 100_000;
/// How far ahead of the server's clock a stream's last id may be raised. At the highest id of all a stream refuses XADD
/// for good; a clock that is this wrong is a matter for people.
const AHEAD_OF_CLOCK: Duration = Duration::from_secs(10);

/// Compares each lane's ledger with the stream.
pub(super) async fn look(setup: &CaretakerSetup, session: &mut Session, stop: &Stop) -> Result<(), Fault> {
    for (lane, metrics) in &setup.lanes {
        let id = lane.id();
        let lost = lost(setup, session, id, stop).await?;
        if lost > 0 {
            metrics.lost_flushed(lost);
            error!(
                event = "lost_upstream", flushed = "yes", stream = %setup.stream, pipeline = %lane.pipeline().name, entries = lost,
                "entries that were flushed are gone from the stream: Valkey lost them (a failover or restart without its tail?); PostgreSQL keeps what was flushed"
            );
        }
        if let Some(highest) = setup.database.run(async |c| ledger::highest(c, id).await).await? {
            keep_ids_ascending(setup, &session.link, highest).await?;
        }
    }
    Ok(())
}

/// How many entries of a lane the stream has lost that nobody had counted yet.
async fn lost(setup: &CaretakerSetup, session: &mut Session, lane: i32, stop: &Stop) -> Result<usize, Fault> {
    let (mut intact, mut lost, mut before) = (0, 0, None);
    while intact < INTACT_IS_ENOUGH && !stop.is_asked() {
        let page = setup.database.run(async |c| ledger::retained(c, lane, before, PAGE).await).await?;
        let Some(oldest) = page.last() else { break };
        before = Some(oldest.first);
        let mut rest = &page[..];
        while !rest.is_empty() && intact < INTACT_IS_ENOUGH && !stop.is_asked() {
            let (group, behind) = rest.split_at(group_length(rest));
            rest = behind;
            let (last, first) = (group[0].last, group[group.len() - 1].first);
            let rows = setup.database.run(async |c| ledger::rows_within(c, lane, first, last).await).await?;
            // Rows may have been merged meanwhile with others, and then reach further.
            let first = rows.first().map_or(first, |row| row.first.min(first));
            let last = rows.last().map_or(last, |row| row.last.max(last));
            let present = digests_between(&setup.stream, session, first, last).await?;
            intact += present.len();
            for row in &rows {
                let missing = row.digests.as_ref().map_or(0, |d| d.difference(&present).count());
                if missing > row.lost.unsigned_abs() as usize {
                    // Before it is recorded: once it is, nobody would see it again. What was trimmed meanwhile is not lost.
                    if setup.database.run(async |c| ledger::is_retained(c, lane, row).await).await? {
                        doubt_values(setup, &session.link, lane).await?;
                    }
                    lost += setup.database.run(async |c| ledger::mark_lost(c, lane, row, missing).await).await?;
                }
            }
        }
    }
    Ok(lost)
}

async fn digests_between(
    stream: &str,
    session: &mut Session,
    first: EntryId,
    last: EntryId,
) -> Result<HashSet<u64>, Fault> {
    let (mut digests, mut from) = (HashSet::new(), Some(first));
    while let Some(start) = from.filter(|start| *start <= last) {
        let page = trim::page(session, stream, start, last, STEP).await?;
        digests.extend(page.entries().iter().map(|e| e.digest));
        from = page.entries().last().filter(|_| page.len() == STEP).and_then(|e| e.id.next());
    }
    Ok(digests)
}

/// If the stream gives ids that the ledger has used already, it is told to start above them.
async fn keep_ids_ascending(setup: &CaretakerSetup, link: &Link, highest: EntryId) -> Result<(), Fault> {
    let stream = &setup.stream;
    let Some((last, now_ms)) = trim::last_id(link, stream).await? else { return Ok(()) };
    if last >= highest {
        return Ok(());
    }
    if highest.ms > now_ms + AHEAD_OF_CLOCK.as_millis() as u64 {
        error!(%stream, %last, %highest, "the stream is behind the ledger by more than its clock allows: set right the server's clock; until then entries may come under used ids, which cost time and are told apart by their content");
        return Ok(());
    }
    for (lane, _) in &setup.lanes {
        doubt_values(setup, link, lane.id()).await?;
    }
    match trim::raise_last_id(link, stream, highest).await {
        Ok(()) => info!(%stream, from = %last, to = %highest, "raised the stream's last id to the ledger's"),
        // An entry was added meanwhile; the next look sees it.
        Err(Fault::Valkey { code, .. }) if code == "ERR" => {}
        Err(fault) => return Err(fault),
    }
    Ok(())
}

/// Where Valkey lost entries that were flushed, it has older values of their counters, too: those of a managed pipeline are dropped.
async fn doubt_values(setup: &CaretakerSetup, link: &Link, lane: i32) -> Result<(), Fault> {
    for (lane, _) in setup.lanes.iter().filter(|(of, _)| of.id() == lane && of.pipeline().is_managed()) {
        gate::close_surely(link.commands(), &lane.pipeline().keys_of(0), "Valkey lost entries").await?;
    }
    Ok(())
}

/// How many of these rows, one at least, make up about a [`STEP`] of entries.
fn group_length(rows: &[Extent]) -> usize {
    let mut entries = 0;
    rows.iter()
        .take_while(|row| {
            let before = entries;
            entries += row.entries.unsigned_abs() as usize;
            before == 0 || entries <= STEP
        })
        .count()
        .max(1)
}
