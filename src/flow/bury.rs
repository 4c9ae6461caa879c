//! Dead letters: entries that cannot be applied, kept with every byte and a reason.
//!
//! Takes the entries of a batch that are dead; gives them as columns for the flush statement, in whose transaction they are
//! written. Entries that the ledger covers but cannot judge have no ledger row to write: they are buried by themselves.

use std::sync::Arc;

use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;

use super::batch::{Batch, Death};
use crate::lanes::{Identity, LaneId};

/// Dead letters as columns ready to be bound. `owner` and `strings` run in parallel: a string, and whose it is.
#[derive(Debug, Default)]
pub struct Letters<'a> {
    ids: Vec<String>,
    digests: Vec<i64>,
    reasons: Vec<&'static str>,
    details: Vec<&'a str>,
    owners: Vec<i64>,
    strings: Vec<&'a [u8]>,
}

impl<'a> Letters<'a> {
    /// The letters for these entries.
    pub fn of(batch: &'a Batch, dead: &'a [(usize, Arc<Death>)]) -> Letters<'a> {
        let mut letters = Letters::default();
        for (n, (index, death)) in dead.iter().enumerate() {
            let entry = &batch.entries()[*index];
            letters.ids.push(entry.id.number().to_string());
            letters.digests.push(entry.digest as i64);
            letters.reasons.push(death.reason);
            letters.details.push(&death.detail);
            for string in batch.canonical(entry).strings() {
                letters.owners.push(n as i64 + 1);
                letters.strings.push(string);
            }
        }
        letters
    }

    /// Binds the six columns that [`insert`] expects.
    pub fn bind<'q>(self, query: Query<'q, sqlx::Postgres, PgArguments>) -> Query<'q, sqlx::Postgres, PgArguments> {
        query
            .bind(self.ids)
            .bind(self.digests)
            .bind(self.reasons)
            .bind(self.details)
            .bind(self.owners)
            .bind(self.strings)
    }
}

/// The statement that buries: lane is $1, consumer $2, the letters' columns start at parameter `from`.
///
/// A letter that is there already stays as it is, resolved or not.
pub fn insert(from: usize, condition: &str) -> String {
    let p = |n: usize| from + n;
    format!(
        "insert into tidegate.dead_letters (lane, id, digest, reason, detail, fields, consumer)
         select $1, l.id::numeric, l.digest, l.reason, l.detail, coalesce(f.strings, '{{}}'), $2
         from unnest(${}::text[], ${}::int8[], ${}::text[], ${}::text[])
              with ordinality as l (id, digest, reason, detail, n)
         left join (select s.owner, array_agg(s.string order by s.place) as strings
                    from unnest(${}::int8[], ${}::bytea[]) with ordinality as s (owner, string, place)
                    group by s.owner) f on f.owner = l.n
         where {condition}
         on conflict (lane, id, digest) do nothing",
        p(0),
        p(1),
        p(2),
        p(3),
        p(4),
        p(5)
    )
}

/// Buries all entries of a batch whose ids the ledger covers already. Their reason must have been set.
pub async fn bury(
    connection: &mut PgConnection,
    lane: LaneId,
    identity: &Identity,
    batch: &Batch,
) -> Result<(), sqlx::Error> {
    let dead: Vec<(usize, Arc<Death>)> =
        batch.entries().iter().enumerate().filter_map(|(i, e)| Some((i, e.death.clone()?))).collect();
    let sql = insert(5, "tidegate.verify_lane($1, $3::text[], $4)");
    let query = sqlx::query(AssertSqlSafe(sql)).bind(lane).bind(batch.origin().consumer.to_string());
    let query = query.bind(identity.names().to_vec()).bind(identity.mapping.clone());
    Letters::of(batch, &dead).bind(query).execute(connection).await?;
    Ok(())
}
