//! Strangers: values of managed counters that may be wrong are dropped, after COMMIT and before anything is acknowledged.
//!
//! Takes a batch that was flushed; gives the counters whose values in Valkey are not to be trusted: those of entries without the mark of a managed
//! increment, which the index does not know; and, where something was buried, all of the batch, for a dead letter's delta is in the value and not in the
//! table. Drops them, and the leases on them. It fails with what Valkey said; then nothing may be acknowledged. A kill in between is no loss: the entries
//! come again, are recognised, and the values are dropped then.

use std::collections::{BTreeMap, BTreeSet};

use super::batch::Batch;
use crate::client::MARK_FIELD;
use crate::functions::{self, Call, Function};
use crate::model::entry::Canonical;
use crate::model::pipeline::Pipeline;
use crate::model::row;
use crate::retry::Fault;
use crate::telemetry::contract::Tally;
use crate::valkey::Link;

/// How many values one call drops.
const PER_CALL: usize = 500;

/// Counters of a shard.
type Ids<'a> = BTreeSet<&'a str>;

/// The counters of a managed pipeline whose values are to be dropped, now that this batch is flushed, by the lane of the batch that they are of; and how
/// many of its entries were strangers'.
pub(super) fn of<'a>(batch: &'a Batch, pipeline: &Pipeline, tally: &Tally) -> (BTreeMap<usize, Ids<'a>>, u64) {
    let (mut counters, mut strangers) = (BTreeMap::<usize, Ids>::new(), 0);
    if !pipeline.is_managed() {
        return (counters, strangers);
    }
    for entry in batch.entries() {
        let canonical = batch.canonical(entry);
        let is_marked = is_marked(canonical);
        strangers += u64::from(!is_marked);
        if (!is_marked || tally.buried > 0)
            && let Some(key) = key(canonical, pipeline)
        {
            counters.entry(entry.lane as usize).or_default().insert(key);
        }
    }
    (counters, strangers)
}

/// Whether an entry has the mark of a managed increment.
pub(crate) fn is_marked(canonical: Canonical<'_>) -> bool {
    canonical.fields().any(|(name, value)| name == MARK_FIELD.as_bytes() && value == b"1")
}

/// The key of the row that an entry is about, even where its delta makes no sense.
fn key<'a>(canonical: Canonical<'a>, pipeline: &Pipeline) -> Option<&'a str> {
    match row::decode(canonical, pipeline) {
        Ok(delta) => Some(delta.key),
        Err(_) => {
            let named = canonical.fields().find(|(name, _)| *name == pipeline.key_field.as_bytes());
            named.and_then(|(_, key)| std::str::from_utf8(key).ok())
        }
    }
}

/// Drops the values of these counters of one shard, and the leases on them; nothing where the shard is not managed yet.
pub(super) async fn drop_values(link: &Link, pipeline: &Pipeline, counters: &Ids<'_>) -> Result<(), Fault> {
    let keys = pipeline.keys_of(0);
    let ids: Vec<&str> = counters.iter().copied().collect();
    for ids in ids.chunks(PER_CALL) {
        let mut all = vec![keys.index.clone(), keys.state.clone()];
        all.extend(ids.iter().flat_map(|id| [keys.counter(id), keys.lease(id)]));
        let call = Call::new(Function::Drop, all).arg(1).args(ids);
        match call.clone().send(link.commands()).await {
            Err(Fault::Valkey { code, .. }) if code == functions::NO_FUNCTION => {
                functions::load(link.commands()).await?;
                call.send(link.commands()).await?;
            }
            sent => drop(sent?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::{Filling, Origin};
    use crate::model::entry::{EntryId, Generation};
    use crate::model::pipeline::Mode;
    use crate::telemetry::trace::Trace;
    use std::sync::Arc;

    fn batch(lanes: &[&[&[&[u8]]]]) -> Batch {
        let generation = Generation { run_id: "r".into(), replication_id: "h".into(), epoch: 1 };
        let origin = Origin { generation: Arc::new(generation), consumer: "c".into(), trace: Trace::default() };
        let mut filling = Filling::new(origin, usize::MAX);
        for (lane, entries) in lanes.iter().enumerate() {
            filling.begin_lane(lane);
            for (n, fields) in entries.iter().enumerate() {
                filling.push(EntryId { ms: 1, seq: n as u64 }, fields.iter().copied());
            }
        }
        filling.seal(false)
    }

    #[test]
    fn entries_without_the_mark_are_strangers_and_a_burial_puts_all_in_doubt() {
        let managed = Pipeline { mode: Mode::Managed, ..Pipeline::counters() };
        let batch = batch(&[&[
            &[b"id", b"a", b"amount", b"1", b"t", b"1"],
            &[b"id", b"b", b"amount", b"1"],
            &[b"id", b"c", b"amount", b"1", b"t", b"1700000000"],
            &[b"id", b"d", b"amount", b"bad"],
        ]]);
        let of_lane = |ids: &[&'static str]| BTreeMap::from([(0, ids.iter().copied().collect::<Ids>())]);
        assert_eq!(of(&batch, &managed, &Tally::default()), (of_lane(&["b", "c", "d"]), 3));
        let (dropped, _) = of(&batch, &managed, &Tally { buried: 1, ..Tally::default() });
        assert_eq!(dropped, of_lane(&["a", "b", "c", "d"]));
        assert!(of(&batch, &Pipeline::counters(), &Tally { buried: 1, ..Tally::default() }).0.is_empty());
    }

    #[test]
    fn strangers_are_told_by_the_lane_that_they_came_from() {
        let managed = Pipeline { mode: Mode::Managed, shards: 3, ..Pipeline::counters() };
        let batch = batch(&[
            &[&[b"id", b"a", b"amount", b"1"]],
            &[&[b"id", b"b", b"amount", b"1", b"t", b"1"]],
            &[&[b"id", b"c", b"amount", b"1"], &[b"id", b"a", b"amount", b"1"]],
        ]);
        let (dropped, strangers) = of(&batch, &managed, &Tally::default());
        assert_eq!(dropped, BTreeMap::from([(0, Ids::from(["a"])), (2, Ids::from(["a", "c"]))]));
        assert_eq!(strangers, 3);
    }
}
