//! Reclaim: entries that somebody took and never settled.
//!
//! Takes a session; gives a careful batch of what is pending under the names of dead consumers ([`super::liveness`] tells who is
//! dead), or under one's own name, of this session or an earlier one, without being held (a lost reply). It fails with what
//! Valkey said; what was claimed by then is pending under this session's name and found again.
//!
//! Entries are claimed without their payload and read by XRANGE, which at the same time proves which of them are neighbours:
//! only those may share a row of the ledger (I4). They are read over the wire, so that no entry is held that is too large.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;

use super::batch::{Batch, Death, Filling, Origin};
use super::liveness::{Liveness, Roster, Silence};
use super::read::{Limits, put};
use super::session::Session;
use crate::failpoint;
use crate::model::entry::{EntryId, Malformed};
use crate::model::names;
use crate::model::pipeline::Pipeline;
use crate::retry::Fault;
use crate::telemetry::trace::Trace;
use crate::valkey::info::{self, Pending};
use crate::valkey::{Command, Link, unexpected};

/// Pending entries looked at in one step.
const STEP: usize = 1_000;
/// From this delivery on an entry is suspected of killing its readers, and shares its fate with few.
const SUSPECT_AFTER: u64 = 3;
/// How many suspects share one batch.
const SUSPECTS: usize = 50;
/// From this delivery on it is tried alone. Its count stays here while nothing but servers fail: see [`acquit`].
pub const ALONE_AFTER: u64 = 5;
/// Entries read at first where claimed ones are looked for.
const FIRST_STRIDE: usize = 8;
/// Ids asked for in one round trip.
const ASKED_AT_ONCE: usize = 100;
/// How many of its own former consumers a worker remembers; what older ones hold its peers take up.
const MOST_FORMER: usize = 64;

/// What a look at a consumer's pending entries brought.
#[derive(Debug, Default)]
pub struct Claimed {
    /// Entries to be flushed, carefully.
    pub batch: Option<Batch>,
    /// Ids that are pending no longer because the stream has them no longer.
    pub gone: Vec<EntryId>,
    /// Set where the batch is one entry that was delivered often and is tried alone: to be acquitted when its flush is sent.
    pub suspect: Option<EntryId>,
    /// Whether more was claimed than the batch holds: it is pending under this session's own name.
    pub has_more: bool,
}

impl Claimed {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.batch.is_none() && self.gone.is_empty()
    }
}

/// What a look at a group's consumers brought.
#[derive(Debug, Default)]
pub struct Survey {
    /// Who is dead and holds entries.
    pub dead: Vec<(String, Liveness)>,
    /// How many entries are pending under this session's own name.
    pub own_pending: u64,
    /// How many others are at work.
    pub alive: usize,
    /// Whether any of them is of another process.
    pub has_peers: bool,
    /// How many have died that were not met dead before.
    pub died: usize,
}

/// What bounds a reclaimer.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long after its last word a consumer without a connection is dead.
    pub gone_after: Duration,
    /// How long after its last word any consumer is dead.
    pub dead_after: Duration,
    /// When an entry that was tried alone is buried, if its readers died of it each time.
    pub max_deliveries: u64,
}

/// How claimed entries came.
#[derive(Debug, Clone, Copy)]
enum Taken {
    /// From a consumer that this worker is, or was.
    Back,
    /// From a peer in this state.
    From(Liveness),
}

/// Takes up what others, or lost replies, left behind.
#[derive(Debug)]
pub struct Reclaimer {
    stream: String,
    group: String,
    roster: Roster,
    max_deliveries: u64,
    limits: Limits,
    /// The consumers that this worker was before, and that may hold entries.
    former: Vec<Arc<str>>,
    /// Where to go on in each consumer's list, so that entries which cannot be claimed starve nobody behind them.
    cursors: HashMap<String, EntryId>,
    /// What the names of this process's consumers begin with.
    process: String,
    /// The dead that were met and are still in the group.
    met_dead: HashSet<String>,
}

impl Reclaimer {
    /// For one worker of a pipeline. `connections`: what the names of the pipeline's connections begin with; `process`: the same for
    /// this process's consumers.
    pub fn new(
        pipeline: &Pipeline,
        connections: &str,
        process: String,
        patience: Patience,
        limits: Limits,
    ) -> Reclaimer {
        let (stream, group) = (pipeline.stream.clone(), pipeline.group());
        let Patience { gone_after, dead_after, max_deliveries } = patience;
        Reclaimer {
            roster: Roster::new(stream.clone(), group.clone(), connections.to_owned(), gone_after, dead_after),
            stream,
            group,
            max_deliveries,
            limits,
            former: Vec::new(),
            cursors: HashMap::new(),
            process,
            met_dead: HashSet::new(),
        }
    }

    /// A session has ended: what it held, or what was sent to it and lost, is pending under this consumer's name.
    pub fn left_behind(&mut self, consumer: Arc<str>) {
        if self.former.len() == MOST_FORMER {
            self.former.remove(0);
        }
        self.former.push(consumer);
    }

    /// The consumers that this worker was before, and that may hold entries.
    pub fn former(&self) -> &[Arc<str>] {
        &self.former
    }

    /// Looks at all consumers of the group; those who are dead and hold nothing are removed.
    pub async fn survey(&mut self, session: &Session, silence: Silence) -> Result<Survey, Fault> {
        let link = &session.link;
        let consumers = info::consumers(link.commands(), &self.stream, &self.group).await?;
        self.cursors.retain(|name, _| consumers.iter().any(|c| c.name == *name));
        self.met_dead.retain(|name| consumers.iter().any(|c| c.name == *name));
        let mut survey = Survey::default();
        for consumer in consumers {
            if *consumer.name == *session.consumer {
                survey.own_pending = consumer.pending;
                continue;
            }
            if self.former.iter().any(|former| **former == *consumer.name) {
                continue;
            }
            let liveness = self.roster.look(link, &consumer, silence).await?;
            match liveness {
                Liveness::Alive => {
                    survey.alive += 1;
                    survey.has_peers |= !consumer.name.starts_with(&self.process);
                }
                Liveness::Gone | Liveness::Silent => {
                    survey.died += usize::from(self.met_dead.insert(consumer.name.clone()))
                }
            }
            match liveness {
                Liveness::Alive => {}
                liveness if consumer.pending == 0 => self.roster.remove(link, &consumer, liveness).await?,
                liveness => survey.dead.push((consumer.name, liveness)),
            }
        }
        Ok(survey)
    }

    /// Claims a step of what dead consumers hold. Nothing claimed and nothing gone: there is nothing left for now.
    pub async fn claim_from_the_dead(&mut self, session: &mut Session, silence: Silence) -> Result<Claimed, Fault> {
        for (name, liveness) in self.survey(session, silence).await?.dead {
            let claimed = self.claim(session, &name, Taken::From(liveness)).await?;
            if !claimed.is_empty() {
                return Ok(claimed);
            }
        }
        Ok(Claimed::default())
    }

    /// Claims a step of what is pending under this worker's own names, of this session and of those before. To be asked only
    /// while the worker holds nothing.
    pub async fn claim_own(&mut self, session: &mut Session) -> Result<Claimed, Fault> {
        while let Some(former) = self.former.first().cloned() {
            // What it sent and the server has yet to read must not come after this.
            if names::connection_of(&former, &session.link.generation().run_id).is_some() {
                self.roster.disconnect(&session.link, &former).await?;
            }
            let claimed = self.claim(session, &former, Taken::Back).await?;
            if !claimed.is_empty() {
                return Ok(claimed);
            }
            self.roster.remove_if_empty(&session.link, &former, Duration::ZERO).await?;
            self.former.remove(0);
        }
        let own = session.consumer.clone();
        self.claim(session, &own, Taken::Back).await
    }

    /// Takes this consumer out of the group, if it holds nothing.
    pub async fn leave(&self, session: &Session) -> Result<(), Fault> {
        self.roster.remove_if_empty(&session.link, &session.consumer, Duration::ZERO).await
    }

    /// The first step of entries pending under `owner`, from its cursor on.
    async fn claim(&mut self, session: &mut Session, owner: &str, taken: Taken) -> Result<Claimed, Fault> {
        let link = &session.link.clone();
        let from = self.cursors.get(owner).and_then(|id| id.next()).unwrap_or(EntryId::MIN);
        let range = (from, EntryId::MAX);
        let pending = info::pending(link.commands(), (&self.stream, &self.group), range, STEP, Some(owner)).await?;
        let Some(last) = pending.last() else {
            // The end of the list: the next look starts at its head again.
            self.cursors.remove(owner);
            return Ok(Claimed::default());
        };
        let chosen = alike(&pending);
        failpoint::reached("reclaim.listed");
        self.cursors.insert(owner.to_owned(), chosen.last().unwrap_or(last).id);
        let kept = failpoint::during("reclaim.claim", self.take_over(session, chosen, taken)).await?;
        failpoint::reached("reclaim.claimed");
        let (filling, has_more) = self.read(session, &kept, chosen).await?;
        if has_more {
            // What did not fit lies at the head of this session's own list when the batch is settled.
            self.cursors.remove(&*session.consumer);
        }
        let missing: Vec<EntryId> = chosen.iter().map(|p| p.id).filter(|id| !kept.contains(id)).collect();
        // Not claimed and still pending: a peer was quicker. Not pending, and the stream has it: settled meanwhile. Else: gone.
        let peers = still_pending(link, &self.stream, &self.group, &missing).await?;
        let mut gone: Vec<EntryId> = missing.into_iter().filter(|id| !peers.contains(id)).collect();
        if !gone.is_empty() {
            let settled = info::existing(link.commands(), &self.stream, &gone).await?;
            gone.retain(|id| !settled.contains(id));
        }
        let suspect = suspect(chosen).map(|suspect| suspect.id).filter(|_| !filling.is_empty());
        Ok(Claimed { batch: (!filling.is_empty()).then(|| filling.seal(true)), gone, suspect, has_more })
    }

    /// Claims these ids; gives those that exist and were not taken by a peer just before.
    async fn take_over(&self, session: &Session, chosen: &[Pending], taken: Taken) -> Result<HashSet<EntryId>, Fault> {
        // One's own entries need no waiting; a dead one's may have been claimed by a peer a moment ago. What a dead one held
        // may have killed it, so it counts as delivered once more.
        let (min_idle, more) = match taken {
            Taken::Back => (Duration::ZERO, 0),
            Taken::From(liveness) => (self.roster.min_idle(liveness), 1),
        };
        let mut kept = HashSet::with_capacity(chosen.len());
        for same in chosen.chunk_by(|a, b| a.deliveries == b.deliveries) {
            let command = Command::new("XCLAIM").arg(&*self.stream).arg(&*self.group).arg(&*session.consumer);
            let command = command.arg(min_idle.as_millis()).args(same.iter().map(|p| p.id));
            // JUSTID alone would not count the delivery.
            let command = command.arg("RETRYCOUNT").arg(same[0].deliveries + more).arg("JUSTID");
            let ids = session.link.commands().call(command).await?.into_array().ok_or_else(|| unexpected("XCLAIM"))?;
            for id in ids {
                kept.insert(id.as_text().and_then(|text| text.parse().ok()).ok_or_else(|| unexpected("XCLAIM"))?);
            }
        }
        Ok(kept)
    }

    /// Reads the claimed entries, as many as one batch holds; a run ends wherever the stream has an entry in between that is not
    /// among them. Says whether some did not fit. What did not, and what was deleted before it could be read, is pending under this
    /// session's own name and met again there.
    async fn read(
        &self,
        session: &mut Session,
        kept: &HashSet<EntryId>,
        chosen: &[Pending],
    ) -> Result<(Filling, bool), Fault> {
        let (generation, trace) = (session.link.generation().clone(), Trace::of_batch("reclaim"));
        trace.begins();
        let origin = Origin { generation, consumer: session.consumer.clone(), trace };
        let mut filling = Filling::new(origin, self.limits.max_entry_bytes);
        let mut ids: Vec<EntryId> = chosen.iter().map(|p| p.id).filter(|id| kept.contains(id)).collect();
        ids.sort_unstable();
        let deadly = suspect(chosen).is_some_and(|suspect| suspect.deliveries >= self.max_deliveries);
        let Some(last) = ids.last().copied() else { return Ok((filling, false)) };
        // At a gallop: longer reads while all they bring is wanted, a jump and a short read where something else lies between.
        let (mut from, mut stride, mut is_full) = (ids.first().copied(), FIRST_STRIDE, false);
        while let Some(start) = from.filter(|start| *start <= last && !is_full) {
            let (mut seen, mut dense, mut got) = (start, true, 0);
            let range = Command::new("XRANGE").arg(&*self.stream).arg(start).arg(last).arg("COUNT").arg(stride);
            session.wire.send(&range);
            let read = session.wire.run(Duration::ZERO, |delivered| {
                let id = delivered.id();
                (seen, got) = (id, got + 1);
                is_full |= filling.bytes() >= self.limits.max_bytes;
                if is_full {
                    return ControlFlow::Continue(());
                }
                if kept.contains(&id) {
                    put(delivered, &mut filling);
                    if deadly {
                        filling.condemn_last(Death::from(Malformed::Deadly));
                    }
                } else {
                    filling.close_run();
                    dense = false;
                }
                ControlFlow::Continue(())
            });
            read.await?;
            // What is read and does not fit is read again: not much of it.
            let average = filling.bytes().checked_div(filling.len()).unwrap_or(0).max(1);
            let room = (self.limits.max_bytes.saturating_sub(filling.bytes()) / average).max(1);
            (from, stride) = match (got < stride, dense) {
                (true, _) => (None, stride),
                (false, true) => (seen.next(), (stride * 2).min(STEP).min(room)),
                (false, false) => {
                    filling.close_run();
                    (ids.get(ids.partition_point(|id| *id <= seen)).copied(), FIRST_STRIDE.min(room))
                }
            };
        }
        filling.close_run();
        Ok((filling, is_full))
    }
}

/// Which of these ids the group still has marked as pending, under whatever name.
pub async fn still_pending(link: &Link, stream: &str, group: &str, ids: &[EntryId]) -> Result<HashSet<EntryId>, Fault> {
    let mut pending = HashSet::new();
    // Some ids a round trip, each asked for by itself: between two of them any number of others may be pending.
    for some in ids.chunks(ASKED_AT_ONCE) {
        let ask = |id: &EntryId| {
            let id = *id;
            async move { info::pending(link.commands(), (stream, group), (id, id), 1, None).await }
        };
        let found = try_join_all(some.iter().map(ask)).await?;
        pending.extend(found.into_iter().flatten().map(|p| p.id));
    }
    Ok(pending)
}

/// Says of an entry that was tried alone: if this process dies from here on, the entry is not the cause. Called right before its
/// flush is sent, so that deliveries beyond [`ALONE_AFTER`] count only processes that died before that moment; and when a
/// stop leaves it pending.
pub async fn acquit(link: &Link, stream: &str, group: &str, consumer: &str, id: EntryId) -> Result<(), Fault> {
    let command = Command::new("XCLAIM").arg(stream).arg(group).arg(consumer).arg(0).arg(id);
    link.commands().call(command.arg("RETRYCOUNT").arg(ALONE_AFTER).arg("JUSTID")).await.map(|_| ())
}

/// The one entry of a claim that is tried alone; none where there are others with it.
fn suspect(chosen: &[Pending]) -> Option<&Pending> {
    match chosen {
        [alone] if alone.deliveries >= ALONE_AFTER => Some(alone),
        _ => None,
    }
}

/// The entries at the head of the list that may share a batch: an entry that was delivered often shares it with few.
fn alike(pending: &[Pending]) -> &[Pending] {
    let limit = |p: &Pending| match p.deliveries {
        n if n >= ALONE_AFTER => 1,
        n if n >= SUSPECT_AFTER => SUSPECTS,
        _ => STEP,
    };
    let Some(head) = pending.first() else { return pending };
    let length = pending.iter().take(limit(head)).take_while(|p| limit(p) == limit(head)).count();
    &pending[..length]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(deliveries: &[u64]) -> Vec<Pending> {
        deliveries.iter().zip(1..).map(|(d, ms)| Pending { id: EntryId { ms, seq: 0 }, deliveries: *d }).collect()
    }

    #[test]
    fn an_entry_that_was_delivered_often_shares_its_batch_with_few() {
        assert_eq!(alike(&pending(&[1, 2, 1, 3, 1])).len(), 3);
        assert_eq!(alike(&pending(&[3, 4, 5, 3])).len(), 2);
        assert_eq!(alike(&pending(&[5, 5])).len(), 1);
        assert_eq!(alike(&pending(&[3; 200])).len(), SUSPECTS);
        assert!(alike(&[]).is_empty());
    }
}
