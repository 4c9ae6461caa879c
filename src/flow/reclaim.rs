//! Reclaim: entries that somebody took and never settled.
//!
//! Takes a link and a consumer's name; gives a careful batch of what is pending under the names of dead consumers, or under
//! one's own name without being held (a lost reply, a task that panicked). A consumer is dead when it has been silent for
//! `reclaim.dead_after`; to take a living one's entries would be harmless and only waste work.
//!
//! Entries are claimed without their payload and read by XRANGE, which at the same time proves which of them are neighbours:
//! only those may share a row of the ledger (I4).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::batch::{Batch, Death, Filling, Origin};
use super::read::parse_entry;
use crate::failpoint;
use crate::model::entry::{EntryId, Malformed};
use crate::model::pipeline::Pipeline;
use crate::retry::Fault;
use crate::valkey::{Command, Link, Reply, unexpected};

/// Pending entries looked at in one step.
const STEP: usize = 1_000;
/// From this delivery on an entry is suspected of killing its readers, and shares its fate with few.
const SUSPECT_AFTER: i64 = 3;
/// How many suspects share one batch.
const SUSPECTS: usize = 50;
/// From this delivery on it is tried alone.
pub const ALONE_AFTER: i64 = 5;
/// Entries read at first where claimed ones are looked for.
const FIRST_STRIDE: usize = 8;
/// A consumer that holds nothing and has been silent this many times `dead_after` is removed.
const REMOVE_AFTER: u32 = 10;

/// Checks and deletes in one step, so that nothing can be delivered to the consumer in between.
const REMOVE_IF_EMPTY: &str = "
local consumers = server.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
for _, c in ipairs(consumers) do
    local held = {}
    for i = 1, #c, 2 do held[c[i]] = c[i + 1] end
    if held['name'] == ARGV[2] and held['pending'] == 0 and held['idle'] >= tonumber(ARGV[3]) then
        server.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
        return 1
    end
end
return 0";

/// What a look at a consumer's pending entries brought.
#[derive(Debug, Default)]
pub struct Claimed {
    /// Entries to be flushed, carefully.
    pub batch: Option<Batch>,
    /// Ids that are pending no longer because the stream has them no longer.
    pub gone: Vec<EntryId>,
}

/// Takes up what others, or lost replies, left behind.
#[derive(Debug)]
pub struct Reclaimer {
    stream: String,
    group: String,
    consumer: Arc<str>,
    dead_after: Duration,
    max_deliveries: i64,
    max_entry_bytes: usize,
    /// Where to go on in each consumer's list, so that entries which cannot be claimed starve nobody behind them.
    cursors: HashMap<String, EntryId>,
}

/// A consumer, as the group knows it.
#[derive(Debug)]
pub struct Consumer {
    /// Its name.
    pub name: String,
    /// How many entries it holds.
    pub pending: i64,
    /// How long ago it last asked for entries.
    pub idle: Duration,
}

/// A pending entry.
#[derive(Debug, Clone, Copy)]
struct Pending {
    id: EntryId,
    deliveries: i64,
}

impl Reclaimer {
    /// For one consumer of a pipeline's group.
    pub fn new(
        pipeline: &Pipeline,
        consumer: Arc<str>,
        dead_after: Duration,
        max_deliveries: u64,
        max_entry_bytes: usize,
    ) -> Reclaimer {
        Reclaimer {
            stream: pipeline.stream.clone(),
            group: pipeline.group(),
            consumer,
            dead_after,
            max_deliveries: max_deliveries.try_into().unwrap_or(i64::MAX),
            max_entry_bytes,
            cursors: HashMap::new(),
        }
    }

    /// Claims a step of what dead consumers hold. Nothing claimed and nothing gone: there is nothing left for now.
    pub async fn claim_from_the_dead(&mut self, link: &Link) -> Result<Claimed, Fault> {
        let consumers = consumers(link, &self.stream, &self.group).await?;
        self.cursors.retain(|name, _| consumers.iter().any(|c| c.name == *name));
        for consumer in consumers {
            if *consumer.name == *self.consumer || consumer.idle < self.dead_after {
                continue;
            }
            if consumer.pending == 0 {
                if consumer.idle > self.dead_after * REMOVE_AFTER {
                    self.remove_if_empty(link, &consumer.name, consumer.idle).await?;
                }
                continue;
            }
            let claimed = self.claim(link, &consumer.name, 1).await?;
            if claimed.batch.is_some() || !claimed.gone.is_empty() {
                return Ok(claimed);
            }
        }
        Ok(Claimed::default())
    }

    /// Claims a step of what is pending under this consumer's own name. To be asked only while it holds nothing.
    pub async fn claim_own(&mut self, link: &Link) -> Result<Claimed, Fault> {
        let own = self.consumer.to_string();
        self.claim(link, &own, 0).await
    }

    /// Takes this consumer out of the group, if it holds nothing.
    pub async fn leave(&self, link: &Link) -> Result<(), Fault> {
        self.remove_if_empty(link, &self.consumer, Duration::ZERO).await
    }

    /// The first step of entries pending under `owner`, from its cursor on. `bump`: what is added to their deliveries.
    async fn claim(&mut self, link: &Link, owner: &str, bump: i64) -> Result<Claimed, Fault> {
        let from = self.cursors.get(owner).and_then(|id| id.next()).unwrap_or(EntryId::MIN);
        let pending = self.pending(link, owner, from).await?;
        let Some(last) = pending.last() else {
            // The end of the list: the next look starts at its head again.
            self.cursors.remove(owner);
            return Ok(Claimed::default());
        };
        let chosen = alike(&pending);
        failpoint::reached("reclaim.listed");
        self.cursors.insert(owner.to_owned(), chosen.last().unwrap_or(last).id);
        let mut kept = failpoint::during("reclaim.claim", self.take_over(link, chosen, bump)).await?;
        failpoint::reached("reclaim.claimed");
        let filling = self.read(link, &mut kept, chosen).await?;
        let missing: Vec<EntryId> = chosen.iter().map(|p| p.id).filter(|id| !kept.contains(id)).collect();
        // Not claimed and still pending: a peer was quicker. Not claimed and not pending: gone, or settled meanwhile.
        let peers = still_pending(link, &self.stream, &self.group, &missing).await?;
        let gone = missing.into_iter().filter(|id| !peers.contains(id)).collect();
        Ok(Claimed { batch: (!filling.is_empty()).then(|| filling.seal(true)), gone })
    }

    /// Claims these ids; gives those that exist and were not taken by a peer just before.
    async fn take_over(&self, link: &Link, chosen: &[Pending], bump: i64) -> Result<HashSet<EntryId>, Fault> {
        // One's own entries need no waiting; a dead one's may have been claimed by a peer a moment ago.
        let min_idle = if bump == 0 { 0 } else { self.dead_after.as_millis() as i64 };
        let mut kept = HashSet::with_capacity(chosen.len());
        for same in chosen.chunk_by(|a, b| a.deliveries == b.deliveries) {
            let command =
                Command::new("XCLAIM").arg(&*self.stream).arg(&*self.group).arg(&*self.consumer).arg(min_idle);
            let command = command.args(same.iter().map(|p| p.id.to_string()));
            // JUSTID alone would not count the delivery.
            let command = command.arg("RETRYCOUNT").arg(same[0].deliveries + bump).arg("JUSTID");
            let ids = link.commands().call(command).await?.into_array().ok_or_else(|| unexpected("XCLAIM"))?;
            for id in ids {
                kept.insert(id.as_text().and_then(|text| text.parse().ok()).ok_or_else(|| unexpected("XCLAIM"))?);
            }
        }
        Ok(kept)
    }

    /// Reads the claimed entries; a run ends wherever the stream has an entry in between that is not among them.
    async fn read(&self, link: &Link, kept: &mut HashSet<EntryId>, chosen: &[Pending]) -> Result<Filling, Fault> {
        let origin = Origin { generation: link.generation().clone(), consumer: self.consumer.clone() };
        let mut filling = Filling::new(origin, self.max_entry_bytes);
        let wanted: HashMap<EntryId, i64> =
            chosen.iter().filter(|p| kept.contains(&p.id)).map(|p| (p.id, p.deliveries)).collect();
        let mut found = HashSet::with_capacity(wanted.len());
        let mut push = |filling: &mut Filling, id: EntryId, fields: &Reply| {
            filling.push(id, fields.strings());
            if wanted[&id] >= self.max_deliveries {
                filling.condemn_last(Death::from(Malformed::Deadly));
            }
            found.insert(id);
        };
        // At a gallop: longer reads while all they bring is wanted, a jump and a short read where something else lies between.
        let mut ids: Vec<EntryId> = wanted.keys().copied().collect();
        ids.sort_unstable();
        let Some(last) = ids.last().copied() else { return Ok(filling) };
        let (mut from, mut stride) = (ids.first().copied(), FIRST_STRIDE);
        while let Some(start) = from.filter(|start| *start <= last) {
            let (mut seen, mut dense, mut got) = (start, true, 0);
            for entry in self.range(link, start, last, stride).await? {
                let (id, fields) = parse_entry(entry).ok_or_else(|| unexpected("XRANGE"))?;
                (seen, got) = (id, got + 1);
                if wanted.contains_key(&id) {
                    push(&mut filling, id, &fields);
                } else {
                    filling.close_run();
                    dense = false;
                }
            }
            (from, stride) = match (got < stride, dense) {
                (true, _) => (None, stride),
                (false, true) => (seen.next(), (stride * 2).min(STEP)),
                (false, false) => {
                    filling.close_run();
                    (ids.get(ids.partition_point(|id| *id <= seen)).copied(), FIRST_STRIDE)
                }
            };
        }
        filling.close_run();
        // Claimed, then deleted before it could be read: the next look at this consumer's own list meets it again.
        kept.retain(|id| found.contains(id));
        Ok(filling)
    }

    async fn range(
        &self,
        link: &Link,
        first: EntryId,
        last: EntryId,
        count: usize,
    ) -> Result<impl ExactSizeIterator<Item = Reply> + use<>, Fault> {
        let command = Command::new("XRANGE").arg(&*self.stream).arg(first.to_string()).arg(last.to_string());
        let reply = link.commands().call(command.arg("COUNT").arg(count as i64)).await?;
        reply.into_array().ok_or_else(|| unexpected("XRANGE"))
    }

    async fn pending(&self, link: &Link, owner: &str, from: EntryId) -> Result<Vec<Pending>, Fault> {
        let command = Command::new("XPENDING").arg(&*self.stream).arg(&*self.group);
        let command = command.arg(from.to_string()).arg("+").arg(STEP as i64).arg(owner);
        let rows = link.commands().call(command).await?.into_array().ok_or_else(|| unexpected("XPENDING"))?;
        let parse = |row: Reply| {
            let row: Vec<Reply> = row.into_array()?.collect();
            Some(Pending { id: row.first()?.as_text()?.parse().ok()?, deliveries: row.get(3)?.as_int()? })
        };
        rows.map(|row| parse(row).ok_or_else(|| unexpected("XPENDING"))).collect()
    }

    async fn remove_if_empty(&self, link: &Link, consumer: &str, idle: Duration) -> Result<(), Fault> {
        let command = Command::new("EVAL").arg(REMOVE_IF_EMPTY).arg(1).arg(&*self.stream);
        let command = command.arg(&*self.group).arg(consumer).arg(idle.as_millis() as i64);
        link.commands().call(command).await.map(|_| ())
    }
}

/// The consumers of a group.
pub async fn consumers(link: &Link, stream: &str, group: &str) -> Result<Vec<Consumer>, Fault> {
    let command = Command::new("XINFO").arg("CONSUMERS").arg(stream).arg(group);
    let consumers = link.commands().call(command).await?.into_array().ok_or_else(|| unexpected("XINFO"))?;
    let parse = |consumer: Reply| {
        let fields: HashMap<String, Reply> =
            consumer.into_map()?.filter_map(|(name, value)| Some((name.as_text()?.to_owned(), value))).collect();
        Some(Consumer {
            name: fields.get("name")?.as_text()?.to_owned(),
            pending: fields.get("pending")?.as_int()?,
            idle: Duration::from_millis(fields.get("idle")?.as_int()?.max(0).unsigned_abs()),
        })
    };
    consumers.map(|consumer| parse(consumer).ok_or_else(|| unexpected("XINFO CONSUMERS"))).collect()
}

/// Which of these ids the group still has marked as pending, under whatever name.
pub async fn still_pending(link: &Link, stream: &str, group: &str, ids: &[EntryId]) -> Result<HashSet<EntryId>, Fault> {
    let mut pending = HashSet::new();
    for id in ids {
        let command = Command::new("XPENDING").arg(stream).arg(group).arg(id.to_string()).arg(id.to_string()).arg(1);
        let rows = link.commands().call(command).await?.into_array().ok_or_else(|| unexpected("XPENDING"))?;
        if rows.len() > 0 {
            pending.insert(*id);
        }
    }
    Ok(pending)
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

    fn pending(deliveries: &[i64]) -> Vec<Pending> {
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
