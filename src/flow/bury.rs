//! Dead letters: entries that cannot be applied, kept with a reason and with every byte up to a limit.
//!
//! Takes the entries of a batch that are dead; gives them as columns for the flush statement, in whose transaction they are
//! written. Entries that the ledger covers but cannot judge have no ledger row to write: they are buried by themselves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;

use super::batch::{Batch, Death};
use crate::lanes::{Identity, LaneId};
use crate::model::shortened::most_strings;

/// How often burials are told at the most.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Burials that the operator is told of: the first at once, what follows once a second, with its sum. The rest is told with the next flush that is
/// committed a second later.
#[derive(Debug, Default)]
pub struct Burials {
    told: Option<Instant>,
    untold: u64,
}

impl Burials {
    /// So many more were buried; gives how many are to be told of now, if any.
    pub fn to_tell(&mut self, buried: u64, now: Instant) -> Option<u64> {
        self.untold += buried;
        let is_early = self.told.is_some_and(|told| now.saturating_duration_since(told) < TELL_EVERY);
        if self.untold == 0 || is_early {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// Dead letters as columns ready to be bound. `owner` and `strings` run in parallel: a string, and whose it is.
///
/// The strings are slices of the batch, so the letters of a batch hold no more than the batch and are sent in one statement: its
/// bytes once more in what is sent, and a little for each string.
#[derive(Debug, Default)]
pub struct Letters<'a> {
    lanes: Vec<LaneId>,
    ids: Vec<String>,
    digests: Vec<i64>,
    reasons: Vec<&'static str>,
    details: Vec<String>,
    bytes: Vec<i64>,
    shortened: Vec<bool>,
    owners: Vec<i64>,
    strings: Vec<&'a [u8]>,
}

impl<'a> Letters<'a> {
    /// The letters for these entries. One above `max_bytes` keeps only the beginning of each field. `id`: the number of one of the
    /// batch's lanes.
    pub fn of(
        batch: &'a Batch,
        dead: &[(usize, Arc<Death>)],
        max_bytes: usize,
        id: impl Fn(usize) -> LaneId,
    ) -> Letters<'a> {
        let mut letters = Letters::default();
        for (n, (index, death)) in dead.iter().enumerate() {
            let entry = &batch.entries()[*index];
            let canonical = batch.canonical(entry);
            let before = letters.strings.len();
            let is_shortened = if canonical.0.len() > max_bytes {
                letters.strings.extend(shorten(&canonical.strings().collect::<Vec<_>>(), max_bytes));
                true
            } else {
                letters.strings.extend(canonical.strings());
                entry.is_shortened()
            };
            letters.owners.resize(letters.strings.len(), n as i64 + 1);
            letters.lanes.push(id(entry.lane as usize));
            letters.ids.push(entry.id.number().to_string());
            letters.digests.push(entry.digest as i64);
            letters.reasons.push(death.reason);
            letters.details.push(if is_shortened {
                let (fields, bytes) = ((letters.strings.len() - before).div_ceil(2), entry.full_bytes());
                format!("{}; of its {bytes} bytes the beginnings of {fields} fields are kept", death.detail)
            } else {
                death.detail.clone()
            });
            letters.bytes.push(entry.full_bytes().try_into().unwrap_or(i64::MAX));
            letters.shortened.push(is_shortened);
        }
        letters
    }

    /// Binds the columns that [`insert`] expects.
    pub fn bind<'q>(self, query: Query<'q, sqlx::Postgres, PgArguments>) -> Query<'q, sqlx::Postgres, PgArguments> {
        query
            .bind(self.lanes)
            .bind(self.ids)
            .bind(self.digests)
            .bind(self.reasons)
            .bind(self.details)
            .bind(self.bytes)
            .bind(self.shortened)
            .bind(self.owners)
            .bind(self.strings)
    }
}

/// How many parameters the letters take.
pub(super) const COLUMNS: usize = 9;

/// The beginnings of these strings, `limit` bytes in all at the most: short ones whole, long ones cut at the same length. Of very many
/// strings only the first are kept, an even number, so that a name keeps its value.
fn shorten<'a>(strings: &[&'a [u8]], limit: usize) -> Vec<&'a [u8]> {
    let kept = &strings[..strings.len().min(most_strings(limit))];
    let mut lengths: Vec<usize> = kept.iter().map(|string| string.len()).collect();
    lengths.sort_unstable();
    let (mut left, mut longest) = (limit, usize::MAX);
    for (before, length) in lengths.iter().enumerate() {
        let share = left / (lengths.len() - before);
        if *length > share {
            longest = share;
            break;
        }
        left -= length;
    }
    kept.iter().map(|string| &string[..string.len().min(longest)]).collect()
}

/// The statement that buries: the consumer is $2, the letters' columns start at parameter `from`.
///
/// A letter that is there already stays as it is, resolved or not.
pub fn insert(from: usize, condition: &str) -> String {
    let [lane, id, digest, reason, detail, bytes, shortened, owner, string]: [usize; COLUMNS] =
        std::array::from_fn(|n| from + n);
    format!(
        "insert into tidegate.dead_letters (lane, id, digest, reason, detail, bytes, shortened, fields, consumer)
         select l.lane, l.id::numeric, l.digest, l.reason, l.detail, l.bytes, l.shortened, coalesce(f.strings, '{{}}'), $2
         from unnest(${lane}::int4[], ${id}::text[], ${digest}::int8[], ${reason}::text[], ${detail}::text[], ${bytes}::int8[], ${shortened}::bool[])
              with ordinality as l (lane, id, digest, reason, detail, bytes, shortened, n)
         left join (select s.owner, array_agg(s.string order by s.place) as strings
                    from unnest(${owner}::int8[], ${string}::bytea[]) with ordinality as s (owner, string, place)
                    group by s.owner) f on f.owner = l.n
         where {condition}
         on conflict (lane, id, digest) do nothing"
    )
}

/// Buries all entries of a batch, which is of one lane and whose ids the ledger covers already. Their reason must have been set.
pub async fn bury(
    connection: &mut PgConnection,
    lane: LaneId,
    identity: &Identity,
    batch: &Batch,
    max_bytes: usize,
) -> Result<(), sqlx::Error> {
    let dead: Vec<(usize, Arc<Death>)> =
        batch.entries().iter().enumerate().filter_map(|(i, e)| Some((i, e.death.clone()?))).collect();
    let sql = insert(5, "tidegate.verify_lane($1, $3::text[], $4)");
    let query = sqlx::query(AssertSqlSafe(sql)).bind(lane).bind(batch.origin().consumer.to_string());
    let query = query.bind(identity.names().to_vec()).bind(identity.mapping.clone());
    Letters::of(batch, &dead, max_bytes, |_| lane).bind(query).execute(connection).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::{Filling, tests::origin};
    use crate::model::entry::{EntryId, write_canonical};
    use crate::model::shortened::Shortened;
    use proptest::prelude::*;

    #[test]
    fn burials_are_told_at_once_and_then_once_a_second_and_none_is_left_out() {
        let (mut burials, start) = (Burials::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(burials.to_tell(0, at(0)), None);
        assert_eq!(burials.to_tell(3, at(0)), Some(3));
        assert_eq!((burials.to_tell(1, at(10)), burials.to_tell(2, at(999))), (None, None));
        assert_eq!((burials.to_tell(0, at(1_000)), burials.to_tell(0, at(3_000))), (Some(3), None));
    }

    #[test]
    fn a_letter_within_the_limit_keeps_every_byte_and_one_above_it_says_what_is_missing() {
        let mut filling = Filling::new(origin(), 10);
        let long = vec![b'x'; 5000];
        for (ms, padding) in [(1, b"yy".as_slice()), (2, &long)] {
            filling.push(EntryId { ms, seq: 0 }, [b"id".as_slice(), b"a", b"padding", padding]);
        }
        let id = EntryId { ms: 3, seq: 0 };
        let mut canonical = Vec::new();
        write_canonical(&mut canonical, id, [b"id".as_slice(), b"b"]);
        filling.push_shortened(&Shortened { id, digest: 7, full_bytes: 300_000_000, canonical });
        let batch = filling.seal(false);
        let dead: Vec<_> = (0..3).filter_map(|i| Some((i, batch.entries()[i].death.clone()?))).collect();
        let letters = Letters::of(&batch, &dead, 1024, |_| 1);
        assert_eq!(letters.shortened, [false, true, true]);
        assert_eq!(letters.bytes, [16 + 4 * 4 + 12, 16 + 4 * 4 + 10 + 5000, 300_000_000]);
        assert_eq!(letters.owners, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]);
        assert_eq!(letters.strings[3], b"yy");
        assert_eq!(letters.strings[7].len(), 1024 - 10, "the long one has what the short ones leave");
        assert!(
            letters.details[1].ends_with("; of its 5042 bytes the beginnings of 2 fields are kept"),
            "{:?}",
            letters.details
        );
        assert!(!letters.details[0].contains("beginnings"));
    }

    proptest! {
        #[test]
        fn what_is_kept_of_a_letter_is_bounded_and_the_beginning_of_each_string(
            lengths in prop::collection::vec(0usize..300, 0..200), limit in 64usize..2000,
        ) {
            let strings: Vec<Vec<u8>> = lengths.iter().zip(0u8..).map(|(length, n)| vec![n; *length]).collect();
            let slices: Vec<&[u8]> = strings.iter().map(Vec::as_slice).collect();
            let kept = shorten(&slices, limit);
            prop_assert!(kept.iter().map(|string| string.len()).sum::<usize>() <= limit);
            prop_assert!(kept.len() <= slices.len() && kept.len() <= most_strings(limit));
            prop_assert!(kept.iter().zip(&slices).all(|(kept, whole)| whole.starts_with(kept)));
            // Cut at one length: what is shorter than another kept one is whole.
            let longest = kept.iter().map(|string| string.len()).max().unwrap_or(0);
            prop_assert!(kept.iter().zip(&slices).all(|(kept, whole)| kept.len() == whole.len().min(longest)));
        }
    }
}
