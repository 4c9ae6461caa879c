//! The watch: entries on their way, and when each of them has become visible in PostgreSQL.

use std::collections::BTreeMap;
use std::time::Instant;

use hdrhistogram::Histogram;
use sqlx::Row;

use super::{LANDED_WITHIN, LOOK_EVERY};
use crate::model::entry::EntryId;
use crate::ops::stage::{Stage, Trouble};

/// The longest latency that is told apart, in microseconds.
const LONGEST_LATENCY: u64 = 3_600_000_000;

/// Entries on their way, and what has become visible of the ledger.
pub(super) struct Watch {
    lane: i32,
    waiting: BTreeMap<EntryId, Instant>,
    /// Rows seen: first id, last id, and when. An entry's id may be told later than its row.
    seen: BTreeMap<EntryId, (EntryId, Instant)>,
    pub(super) latency: Histogram<u64>,
}

impl Watch {
    /// Waits until the workers have registered their lane.
    pub(super) async fn begin(stage: &Stage) -> Result<Watch, Trouble> {
        let (name, mut poll) = (&stage.pipeline.name, tokio::time::interval(LOOK_EVERY));
        let deadline = Instant::now() + LANDED_WITHIN;
        loop {
            poll.tick().await;
            let query = "select lane from tidegate.lanes where pipeline = $1";
            let lane =
                stage.database.run(async |c| sqlx::query_scalar(query).bind(name).fetch_optional(c).await).await?;
            if let Some(lane) = lane {
                let latency = Histogram::new_with_bounds(1, LONGEST_LATENCY, 3)?;
                return Ok(Watch { lane, waiting: BTreeMap::new(), seen: BTreeMap::new(), latency });
            }
            if Instant::now() > deadline {
                return Err("no worker has begun".into());
            }
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether an entry that was sent before this moment has not become visible yet.
    pub(super) fn is_waiting_since_before(&self, moment: Instant) -> bool {
        self.waiting.values().any(|sent| *sent <= moment)
    }

    pub(super) fn expect(&mut self, (id, sent): (EntryId, Instant)) {
        match self.seen.range(..=id).next_back() {
            Some((_, (last, visible))) if *last >= id => self.record(sent, *visible),
            _ => drop(self.waiting.insert(id, sent)),
        }
    }

    /// Looks once for new rows, from the oldest entry that is waited for.
    pub(super) async fn look(&mut self, stage: &Stage) -> Result<(), Trouble> {
        let Some((oldest, _)) = self.waiting.first_key_value() else { return Ok(()) };
        let (lane, oldest) = (self.lane, oldest.number().to_string());
        let rows = stage
            .database
            .run(async |c| {
                sqlx::query(
                    "select lower(ids)::text, upper(ids)::text from tidegate.ledger
                     where lane = $1 and ids && numrange($2::numeric, null)",
                )
                .bind(lane)
                .bind(oldest)
                .fetch_all(c)
                .await
            })
            .await?;
        let visible = Instant::now();
        for row in rows {
            let id = |column| Ok::<_, Trouble>(EntryId::from_number(row.try_get::<String, _>(column)?.parse()?));
            let (first, last) = (id(0)?, id(1)?);
            if self.seen.get(&first).is_some_and(|seen| seen.0 == last) {
                continue;
            }
            self.seen.insert(first, (last, visible));
            let landed: Vec<EntryId> = self.waiting.range(first..=last).map(|(id, _)| *id).collect();
            for id in landed {
                if let Some(sent) = self.waiting.remove(&id) {
                    self.record(sent, visible);
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, sent: Instant, visible: Instant) {
        self.latency.saturating_record(visible.saturating_duration_since(sent).as_micros().max(1) as u64);
    }
}
