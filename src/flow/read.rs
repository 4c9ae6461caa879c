//! Read: fresh entries of a stream, in contiguous runs.
//!
//! Takes a link to Valkey and the limits of a batch; gives a batch, or nothing if nothing came in time. It fails
//! with what Valkey said; entries delivered into a reply that was lost stay pending under this consumer and are taken up by
//! [`super::reclaim`].

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;

use super::batch::{Batch, Filling, Origin};
use super::session::{Asked, Session};
use crate::model::entry::EntryId;
use crate::model::pipeline::Pipeline;
use crate::retry::Fault;
use crate::shutdown::Stop;
use crate::telemetry::trace::Trace;
use crate::valkey::resp::Bounds;
use crate::valkey::{Command, Delivered, Link, Progress, info};

/// How many reads are under way at once: while one is received the server works on the next ones, also when this process has
/// to wait for a core. Sixteen were 2 % faster still on two busy cores, and would keep the server's other clients waiting
/// for 16 ms at times, at about 1 ms a read.
const READS_UNDER_WAY: usize = 8;
/// An id that no entry has: reading one's own history behind it is an empty read, and a sign of life. Not the highest of all,
/// which is how the server writes `>`: it would deliver fresh entries.
const BEYOND: &str = "18446744073709551615-18446744073709551614";

/// How many streams are asked about at once.
const ASKED_AT_ONCE: usize = 64;

/// What bounds a batch.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries in a batch.
    pub max_entries: usize,
    /// Bytes in a batch. It may hold one entry more than fits.
    pub max_bytes: usize,
    /// Entries asked for in one read.
    pub read_count: usize,
    /// Bytes of an entry; a larger one is buried.
    pub max_entry_bytes: usize,
    /// Bytes that are kept of an entry that is too large to be held.
    pub max_letter_bytes: usize,
}

impl Limits {
    /// What is held of one entry.
    pub fn bounds(&self) -> Bounds {
        Bounds { entry: self.max_entry_bytes, kept: self.max_letter_bytes }
    }
}

/// One reader of one pipeline's group.
#[derive(Debug)]
pub struct Reader {
    stream: String,
    group: String,
    limits: Limits,
    /// How long a read waits for the first entry.
    block: Duration,
    /// What an entry took lately: keeps a reply within the batch's bytes.
    bytes_per_entry: usize,
    /// Whether the last batch ended at its limits, and not with the backlog.
    more: bool,
    /// The last batch's entries and bytes: the next one will be much like it.
    last: (usize, usize),
}

impl Reader {
    /// A reader of one pipeline's group.
    pub fn new(pipeline: &Pipeline, limits: Limits, block: Duration) -> Reader {
        // Large until the first entries are seen, so that the first read is a small one.
        let bytes_per_entry = limits.max_bytes / FIRST_READ;
        let (stream, group) = (pipeline.stream.clone(), pipeline.group());
        Reader { stream, group, limits, block, bytes_per_entry, more: false, last: (0, 0) }
    }

    /// Whether the last batch ended at its limits, and not with the backlog.
    pub fn has_more(&self) -> bool {
        self.more
    }

    /// Creates the group where there is none: at the stream's start, so that nothing is skipped, and with the stream. False: a
    /// peer has created it.
    ///
    /// Only after NOGROUP: creating needs memory, which a full server has not; reading needs none, and makes room.
    pub async fn create_group(&self, link: &Link) -> Result<bool, Fault> {
        let create = Command::new("XGROUP").arg("CREATE").arg(&*self.stream).arg(&*self.group).arg("0").arg("MKSTREAM");
        match link.commands().call(create).await {
            Ok(_) => Ok(true),
            Err(Fault::Valkey { code, .. }) if code == "BUSYGROUP" => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Waits for entries, then takes what there is, up to the limits: what arrived while the last batch was flushed is
    /// the next one.
    ///
    /// While there is plenty, reads for the next batch are under way before this one is full. Where `only_asked`, it takes
    /// what has been asked for, and asks for nothing.
    pub async fn fill(&mut self, session: &mut Session, stop: &Stop, only_asked: bool) -> Result<Option<Batch>, Fault> {
        let (generation, trace) = (session.link.generation().clone(), Trace::of_batch("read"));
        let origin = Origin { generation, consumer: session.consumer.clone(), trace: trace.clone() };
        let mut filling = Filling::new(origin, self.limits.max_entry_bytes);
        filling.make_room(self.last.0, self.last.1);
        let wait = !(self.more || only_asked) && session.is_quiet();
        let waited = if wait { self.wait(session, &mut filling, stop).await } else { Ok(true) };
        trace.begins();
        self.more = match waited {
            Ok(true) => self.take(session, &mut filling, only_asked).await,
            waited => waited,
        }
        // What was read before a fault is good, and the next call meets the fault again.
        .or_else(|fault| if filling.is_empty() { Err(fault) } else { Ok(false) })?;
        self.last = (filling.len(), filling.bytes());
        Ok((!filling.is_empty()).then(|| filling.seal(false)))
    }

    /// Tells the group that this worker lives although it reads nothing, by the names of its consumers, this session's and
    /// `former` ones, whose entries it may still be flushing; and keeps both connections from being idle.
    pub async fn keep_alive(&self, session: &mut Session, former: &[Arc<str>]) -> Result<(), Fault> {
        for consumer in former {
            session.link.commands().call(self.of_group(consumer, 1, None, BEYOND)).await?;
        }
        let sign_of_life = self.of_group(&session.consumer, 1, None, BEYOND);
        if session.is_quiet() {
            session.wire.send(&sign_of_life);
            session.wire.run(Duration::ZERO, |_| ControlFlow::Continue(())).await?;
        }
        session.link.commands().call(sign_of_life).await.map(|_| ())
    }

    /// Waits for the first entries. Says whether there may be more.
    ///
    /// A stop ends the wait by unblocking it, never by dropping it: a reply that nobody waits for would take its entries
    /// along.
    async fn wait(&mut self, session: &mut Session, filling: &mut Filling, stop: &Stop) -> Result<bool, Fault> {
        let (count, block) = (self.read_size(), self.block);
        session.wire.send(&self.fresh(&session.consumer, count, Some(block)));
        session.asked.push_back(Asked { count, got: 0 });
        let (link, wire_id) = (session.link.clone(), session.wire_id);
        let mut receiving = std::pin::pin!(self.receive(session, filling, block));
        tokio::select! {
            more = &mut receiving => more,
            () = stop.asked() => {
                if let Some(id) = wire_id {
                    link.unblock(id).await;
                }
                receiving.await
            }
        }
    }

    /// Takes what there is without waiting, several reads under way at once, until the batch is full. Says whether there may
    /// be more.
    ///
    /// When the backlog ends, or a read fails, all that was asked for is received before it returns.
    async fn take(&mut self, session: &mut Session, filling: &mut Filling, only_asked: bool) -> Result<bool, Fault> {
        let mut more = Ok(true);
        loop {
            while matches!(more, Ok(true)) && !only_asked && session.asked.len() < READS_UNDER_WAY {
                let under_way = session.asked.iter().map(|asked| asked.count - asked.got).sum::<usize>();
                let count = self.read_size();
                // What is under way must fit into one batch.
                if under_way > 0 && !self.fits(under_way + count, 0, 0) {
                    break;
                }
                session.wire.send(&self.fresh(&session.consumer, count, None));
                session.asked.push_back(Asked { count, got: 0 });
            }
            let Some(next) = session.asked.front() else { return more };
            if !filling.is_empty() && !self.fits(next.count - next.got, filling.len(), filling.bytes()) {
                return more;
            }
            match self.receive(session, filling, Duration::ZERO).await {
                Ok(true) => {}
                Ok(false) => more = more.and(Ok(false)),
                Err(fault) if session.wire.is_lost() => return Err(fault),
                Err(fault) => more = more.and(Err(fault)),
            }
        }
    }

    /// How many entries one read asks for: as many as a batch can hold, if they are as large as those seen last.
    fn read_size(&self) -> usize {
        let by_bytes = self.limits.max_bytes / self.bytes_per_entry.max(1);
        self.limits.read_count.min(self.limits.max_entries).min(by_bytes).max(1)
    }

    /// Whether a batch of so many entries and bytes has room for so many entries more.
    fn fits(&self, count: usize, entries: usize, bytes: usize) -> bool {
        entries + count <= self.limits.max_entries && bytes + count * self.bytes_per_entry <= self.limits.max_bytes
    }

    /// Receives what answers the oldest read, as far as the batch has room for it: one contiguous run. Says whether there may be
    /// more behind it.
    async fn receive(&mut self, session: &mut Session, filling: &mut Filling, block: Duration) -> Result<bool, Fault> {
        let (had, weighed, max_bytes) = (filling.len(), filling.bytes(), self.limits.max_bytes);
        let received = session.wire.run(block, |delivered| {
            put(delivered, filling);
            if filling.bytes() < max_bytes { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        let received = received.await;
        filling.close_run();
        let got = filling.len() - had;
        if let Some(average) = (filling.bytes() - weighed).checked_div(got) {
            self.bytes_per_entry = average.max(1);
        }
        let Some(asked) = session.asked.front_mut() else { return received.map(|_| false) };
        asked.got += got;
        if matches!(received, Ok(Progress::Paused)) {
            return Ok(true);
        }
        let is_full = asked.got == asked.count;
        session.asked.pop_front();
        received.map(|_| is_full)
    }

    /// A read of entries that nobody has read.
    fn fresh(&self, consumer: &str, count: usize, block: Option<Duration>) -> Command {
        self.of_group(consumer, count, block, ">")
    }

    fn of_group(&self, consumer: &str, count: usize, block: Option<Duration>, from: &'static str) -> Command {
        let mut command = Command::new("XREADGROUP").arg("GROUP").arg(&*self.group).arg(consumer);
        command = command.arg("COUNT").arg(count as i64);
        if let Some(block) = block {
            command = command.arg("BLOCK").arg(block.as_millis() as i64);
        }
        command.arg("STREAMS").arg(&*self.stream).arg(from)
    }
}

/// A read of many streams by ids, each from behind an entry: it leaves no mark for any entry.
pub(super) fn behind(streams: &[(&str, EntryId)], count: usize, block: Option<Duration>) -> Command {
    let mut command = Command::new("XREAD").arg("COUNT").arg(count);
    if let Some(block) = block {
        command = command.arg("BLOCK").arg(block.as_millis().max(1));
    }
    let command = command.arg("STREAMS").args(streams.iter().map(|(stream, _)| stream));
    command.args(streams.iter().map(|(_, after)| after))
}

/// Tells the groups of these streams that a consumer lives: reading one's own history behind every id is an empty read.
pub(super) fn sign_of_life(group: &str, consumer: &str, streams: &[&str]) -> Command {
    let command = Command::new("XREADGROUP").arg("GROUP").arg(group).arg(consumer).arg("COUNT").arg(1);
    command.arg("STREAMS").args(streams).args(streams.iter().map(|_| BEYOND))
}

/// What this Valkey evicts when its memory is full: its `maxmemory-policy`.
pub async fn eviction_policy(link: &Link) -> Result<String, Fault> {
    info::eviction_policy(link.commands()).await
}

/// What a group has yet to settle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Read by somebody and not yet acknowledged.
    pub pending: u64,
    /// Not yet read by anybody; none where the server cannot tell (after XDEL, XSETID or the like).
    pub undelivered: Option<u64>,
    /// Whether there is nothing of either kind. Pending entries count although the stream may have them no longer.
    pub is_empty: bool,
    /// The lowest id of either kind; none if there is none.
    pub first: Option<EntryId>,
    /// How long ago that entry was added, by the server's clock.
    pub oldest: Option<Duration>,
    /// The server's time, in milliseconds since 1970.
    pub now_ms: u64,
}

/// Asks for a group's backlog. A group that does not exist yet has all the stream before it.
pub async fn backlog(link: &Link, stream: &str, group: &str) -> Result<Backlog, Fault> {
    let standing = info::standing(link.commands(), stream, group).await?;
    let is_empty = standing.pending == 0 && standing.first_undelivered.is_none();
    let first = [standing.oldest_pending, standing.first_undelivered].into_iter().flatten().min();
    Ok(Backlog {
        pending: standing.pending,
        undelivered: if is_empty { Some(0) } else { standing.undelivered },
        is_empty,
        first,
        oldest: first.map(|id| Duration::from_millis(standing.now_ms.saturating_sub(id.ms))),
        now_ms: standing.now_ms,
    })
}

/// Whether this group has settled everything in all of these streams.
pub async fn are_empty(link: &Link, streams: &[String], group: &str) -> Result<bool, Fault> {
    for some in streams.chunks(ASKED_AT_ONCE) {
        let backlogs = try_join_all(some.iter().map(|stream| backlog(link, stream, group))).await?;
        if !backlogs.iter().all(|backlog| backlog.is_empty) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many undelivered entries are counted one by one; of more the rest is estimated from the ids' times.
const COUNTED: u64 = 100_000;

/// How many entries a group has not been given, where the server cannot tell (after XDEL, XSETID or the like): counted, and beyond
/// 100,000 estimated.
pub async fn count_undelivered(link: &Link, stream: &str, group: &str) -> Result<u64, Fault> {
    let Some(told) = info::group(link.commands(), stream, group).await? else { return Ok(0) };
    let counted = info::count_behind(link.commands(), stream, told.last_delivered, COUNTED).await?;
    let Some(reached) = counted.more_behind else { return Ok(counted.entries) };
    let Some(about) = info::stream(link.commands(), stream).await? else { return Ok(0) };
    let (from, to) = (told.last_delivered.ms.max(about.first.map_or(0, |first| first.ms)), about.last_generated.ms);
    let part = reached.ms.saturating_sub(from).max(1) as f64 / to.saturating_sub(from).max(1) as f64;
    let estimate = (counted.entries as f64 / part.clamp(f64::MIN_POSITIVE, 1.0)) as u64;
    Ok(estimate.clamp(counted.entries, about.length.max(counted.entries)))
}

/// The id below which a group has settled and acknowledged everything that it was given; none if there is no such group.
pub async fn frontier(link: &Link, stream: &str, group: &str) -> Result<Option<EntryId>, Fault> {
    let Some(told) = info::group(link.commands(), stream, group).await? else { return Ok(None) };
    // What is delivered after this look is above it; what was is pending or acknowledged by the next one.
    let behind = told.last_delivered.next().unwrap_or(EntryId::MAX);
    let oldest = info::standing(link.commands(), stream, group).await?.oldest_pending;
    Ok(Some(oldest.map_or(behind, |oldest| oldest.min(behind))))
}

/// How many entries the first read asks for at the most, before their size is known.
pub(super) const FIRST_READ: usize = 100;

/// Adds an entry as it was delivered, to the run that is open.
#[inline]
pub(super) fn put(delivered: Delivered<'_>, filling: &mut Filling) {
    match delivered {
        Delivered::Whole(id, strings) => filling.push(id, strings),
        Delivered::Shortened(entry) => filling.push_shortened(entry),
    }
}
