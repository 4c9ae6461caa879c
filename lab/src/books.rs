//! The checker: holds what the stream has against what PostgreSQL shows, at any moment and at the end.
//!
//! At any moment, in one snapshot of the database: every counter is the sum of the deltas of those entries whose digests the
//! ledger holds, and an entry that cannot be applied is a dead letter if and only if the ledger holds it (I1). At the end also:
//! every entry that a producer was told of is in one of the two, once, and the counters in Valkey are the same.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use sqlx::{Connection, PgConnection, Row};
use tidegate::model::entry::{self, EntryId};

use crate::journal::{COUNTERS, Journal, Meant, Outcome, key};
use crate::operators_table;
use tidegate_lab::harness::{Client, Resp, STREAM};

/// Entries asked for at once.
const PAGE: &str = "2000";
/// Findings that are told in full.
const TOLD: usize = 10;

/// The books of one round.
#[derive(Debug)]
pub struct Books {
    round: u32,
    /// Whether the table with every operator is written, too.
    has_operators: bool,
    /// Everything up to here was there before the round.
    before: EntryId,
    read_to: EntryId,
    /// What the stream was seen to hold, by digest.
    seen: HashMap<u64, (EntryId, Meant)>,
    /// The same by id: more than one where two servers gave the same id.
    ids: BTreeMap<EntryId, Vec<u64>>,
}

/// What a look at the books found.
#[derive(Debug, Default)]
pub struct Findings {
    pub applied: usize,
    pub buried: usize,
    /// Whatever must not be, in words.
    pub wrong: Vec<String>,
}

/// How a round came out, entry by entry.
#[derive(Debug, Default, Clone, Copy)]
pub struct Verdicts {
    pub attempted: usize,
    pub acked: usize,
    pub ok: usize,
    pub buried: usize,
    /// Without an answer, and applied.
    pub recovered: usize,
    /// Without an answer or refused, and nowhere: it never happened.
    pub never: usize,
    /// In the stream or acknowledged to its producer, and not in PostgreSQL: at the writer's beginning, in its middle, at its end.
    pub lost: [usize; 3],
    pub doubled: usize,
    /// In PostgreSQL, and nobody meant it.
    pub unexpected: usize,
    /// Other content under the same id.
    pub collisions: usize,
}

impl Verdicts {
    pub fn hold(&self) -> bool {
        self.lost == [0; 3] && self.doubled == 0 && self.unexpected == 0
    }

    pub fn add(&mut self, other: &Verdicts) {
        let all = [
            (&mut self.attempted, other.attempted),
            (&mut self.acked, other.acked),
            (&mut self.ok, other.ok),
            (&mut self.buried, other.buried),
            (&mut self.recovered, other.recovered),
            (&mut self.never, other.never),
            (&mut self.doubled, other.doubled),
            (&mut self.unexpected, other.unexpected),
            (&mut self.collisions, other.collisions),
        ];
        all.into_iter().for_each(|(sum, more)| *sum += more);
        self.lost.iter_mut().zip(other.lost).for_each(|(sum, more)| *sum += more);
    }
}

/// What the ledger and the table say, in one snapshot.
struct Snapshot {
    applied: HashSet<u64>,
    unknown: usize,
    values: HashMap<String, i64>,
    operators: HashMap<String, Vec<String>>,
    letters: HashSet<u64>,
}

impl Books {
    /// Opens them; what the stream has now is not in them.
    pub async fn open(round: u32, has_operators: bool, client: &mut Client) -> std::io::Result<Books> {
        let last = client.try_pipeline(&[["XREVRANGE", STREAM, "+", "-", "COUNT", "1"]]).await?.remove(0);
        let before = match last {
            Resp::Array(entries) => entries.into_iter().next().map_or(EntryId::MIN, |entry| id_of(&entry.array()[0])),
            _ => EntryId::MIN,
        };
        Ok(Books { round, has_operators, before, read_to: before, seen: HashMap::new(), ids: BTreeMap::new() })
    }

    /// Reads what the stream has more by now. Must be called before the trimmer can have cut it.
    pub async fn read_stream(&mut self, client: &mut Client) -> std::io::Result<()> {
        loop {
            let from = self.read_to.next().unwrap_or(EntryId::MAX).to_string();
            let page = client.try_pipeline(&[["XRANGE", STREAM, &from, "+", "COUNT", PAGE]]).await?.remove(0);
            let Resp::Array(entries) = page else { return Err(std::io::Error::other(format!("{page:?}"))) };
            if entries.is_empty() {
                return Ok(());
            }
            for entry in entries {
                let mut parts = entry.array().into_iter();
                let (Some(id), Some(Resp::Array(fields))) = (parts.next(), parts.next()) else { continue };
                let id = id_of(&id);
                self.read_to = id;
                self.note(id, fields);
            }
        }
    }

    fn note(&mut self, id: EntryId, fields: Vec<Resp>) {
        let strings: Vec<String> = fields.iter().map(Resp::text).collect();
        let mut bytes = Vec::new();
        entry::write_canonical(&mut bytes, id, strings.iter().map(String::as_bytes));
        let op = strings.iter().position(|s| s == "op").and_then(|at| strings.get(at + 1));
        if let Some(meant) = op.and_then(|op| Meant::of_op(op)).filter(|meant| meant.round == self.round) {
            let digest = entry::digest(&bytes);
            if self.seen.insert(digest, (id, meant)).is_none() {
                self.ids.entry(id).or_default().push(digest);
            }
        }
    }

    /// Looks at PostgreSQL first and at the stream second, so that nothing is there whose entry is not known.
    pub async fn look(&mut self, sql: &mut PgConnection, client: &mut Client) -> Result<Findings, String> {
        let snapshot = self.snapshot(sql).await.map_err(|e| e.to_string())?;
        self.read_stream(client).await.map_err(|e| e.to_string())?;
        Ok(self.judge(&snapshot.resolve(self)))
    }

    async fn snapshot(&self, sql: &mut PgConnection) -> Result<Rows, sqlx::Error> {
        let mut transaction = sql.begin_with("begin isolation level repeatable read read only").await?;
        let ledger = sqlx::query(
            "select lower(ids)::text, upper(ids)::text, digests, entries from tidegate.ledger
             where upper(ids) > $1::numeric",
        )
        .bind(self.before.number().to_string())
        .fetch_all(&mut *transaction)
        .await?;
        let number = |row: &sqlx::postgres::PgRow, at: usize| -> Result<EntryId, sqlx::Error> {
            let text: String = row.try_get(at)?;
            Ok(EntryId::from_number(text.parse().unwrap_or(u128::MAX)))
        };
        let mut rows = Rows::default();
        for row in &ledger {
            let digests: Option<Vec<u8>> = row.try_get(2)?;
            let digests =
                digests.map(|bytes| bytes.as_chunks::<8>().0.iter().map(|d| u64::from_le_bytes(*d)).collect());
            rows.ledger.push((number(row, 0)?, number(row, 1)?, digests));
        }
        let values = sqlx::query("select id, value from public.counters where id like $1")
            .bind(format!("r{}:%", self.round))
            .fetch_all(&mut *transaction)
            .await?;
        for row in &values {
            rows.values.insert(row.try_get(0)?, row.try_get(1)?);
        }
        if self.has_operators {
            rows.operators = operators_table::rows(&mut transaction, self.round).await?;
        }
        let letters = sqlx::query_scalar::<_, i64>(
            "select digest from tidegate.dead_letters where id > $1::numeric and reason <> 'cannot_be_judged'",
        )
        .bind(self.before.number().to_string())
        .fetch_all(&mut *transaction)
        .await?;
        rows.letters = letters.into_iter().map(|digest| digest as u64).collect();
        transaction.commit().await?;
        Ok(rows)
    }

    fn judge(&self, snapshot: &Snapshot) -> Findings {
        let mut findings = Findings::default();
        let mut expected: HashMap<String, i64> = HashMap::new();
        for digest in &snapshot.applied {
            let (id, meant) = &self.seen[digest];
            let letter = snapshot.letters.contains(digest);
            if letter != meant.is_bad() {
                findings.wrong.push(format!("{id} {meant:?} is in the ledger, and a dead letter: {letter}"));
            }
            if letter {
                findings.buried += 1;
            } else {
                findings.applied += 1;
                *expected.entry(meant.key()).or_default() += meant.delta();
            }
        }
        if snapshot.unknown > 0 {
            findings.wrong.push(format!("{} digests in the ledger that the stream never had", snapshot.unknown));
        }
        for digest in snapshot.letters.iter().filter(|d| self.seen.contains_key(d) && !snapshot.applied.contains(d)) {
            findings.wrong.push(format!("{:?} is a dead letter, and not in the ledger", self.seen[digest]));
        }
        for counter in 0..COUNTERS {
            let key = key(self.round, counter);
            let (found, expected) =
                (snapshot.values.get(&key).copied().unwrap_or(0), expected.get(&key).copied().unwrap_or(0));
            if found != expected {
                findings.wrong.push(self.explain(&key, found, expected));
            }
        }
        if self.has_operators {
            let of_ledger = snapshot.applied.iter().map(|digest| self.seen[digest]);
            let applied: Vec<(EntryId, Meant)> = of_ledger.filter(|(_, meant)| !meant.is_bad()).collect();
            findings.wrong.extend(operators_table::differences(&snapshot.operators, &applied));
        }
        findings.wrong.truncate(TOLD);
        findings
    }

    /// A difference that is one entry's delta tells which one it was.
    fn explain(&self, key: &str, found: i64, expected: i64) -> String {
        let difference = (found - expected).abs();
        let culprit = self.seen.values().find(|(_, meant)| meant.key() == key && meant.delta() == difference);
        format!("{key} is {found}, the ledger's entries add up to {expected}; the difference is {culprit:?}")
    }

    /// The verdicts, once nothing is pending any more.
    pub async fn close(
        &mut self,
        sql: &mut PgConnection,
        client: &mut Client,
        journal: &Journal,
    ) -> Result<(Verdicts, Findings), String> {
        let snapshot = self.snapshot(sql).await.map_err(|e| e.to_string())?;
        self.read_stream(client).await.map_err(|e| e.to_string())?;
        let snapshot = snapshot.resolve(self);
        let mut findings = self.judge(&snapshot);
        let mut verdicts = Verdicts { unexpected: snapshot.unknown, ..Verdicts::default() };
        let by_meaning: HashMap<(u32, u32), Vec<u64>> =
            self.seen.iter().fold(HashMap::new(), |mut map, (digest, (_, m))| {
                map.entry((m.writer, m.n)).or_insert_with(Vec::new).push(*digest);
                map
            });
        for (meant, outcome) in journal.entries(self.round) {
            verdicts.attempted += 1;
            verdicts.acked += usize::from(outcome == Outcome::Acked);
            let digests = by_meaning.get(&(meant.writer, meant.n)).map_or(&[][..], Vec::as_slice);
            match digests {
                [] if outcome == Outcome::Acked => {
                    findings.wrong.push(format!("{meant:?} was acknowledged by Valkey, and is not in the stream"));
                    verdicts.lost[self.place(&meant, journal)] += 1;
                }
                [] => verdicts.never += 1,
                [digest] if !snapshot.applied.contains(digest) => {
                    findings
                        .wrong
                        .push(format!("{:?} {outcome:?} is in the stream, and not in PostgreSQL", self.seen[digest]));
                    verdicts.lost[self.place(&meant, journal)] += 1;
                }
                [_] if meant.is_bad() => verdicts.buried += 1,
                [_] if outcome == Outcome::Acked => verdicts.ok += 1,
                [_] => verdicts.recovered += 1,
                more => {
                    findings.wrong.push(format!("{meant:?} is in the stream {} times", more.len()));
                    verdicts.unexpected += 1;
                }
            }
        }
        verdicts.collisions = self.ids.values().filter(|digests| digests.len() > 1).count();
        // Everything is in the ledger once: where a counter is too high, something was added twice.
        verdicts.doubled = findings.wrong.iter().filter(|wrong| wrong.contains("add up to")).count();
        findings.wrong.extend(self.compare_with_valkey(client, &snapshot).await.map_err(|e| e.to_string())?);
        findings.wrong.truncate(TOLD);
        Ok((verdicts, findings))
    }

    /// 0: before anything of this writer that landed; 2: behind all of it, 1: in between.
    fn place(&self, meant: &Meant, journal: &Journal) -> usize {
        let landed: BTreeSet<u32> =
            self.seen.values().filter(|(_, m)| m.writer == meant.writer).map(|(_, m)| m.n).collect();
        match (landed.first(), landed.last()) {
            (Some(first), _) if meant.n < *first => 0,
            (_, Some(last)) if meant.n > *last || meant.n as usize + 1 == journal.attempted(meant.writer) => 2,
            _ => 1,
        }
    }

    async fn compare_with_valkey(&self, client: &mut Client, snapshot: &Snapshot) -> std::io::Result<Vec<String>> {
        let keys: Vec<String> = (0..COUNTERS).map(|counter| key(self.round, counter)).collect();
        let gets: Vec<[String; 2]> = keys.iter().map(|key| ["GET".to_owned(), format!("counter:{key}")]).collect();
        let live = client.try_pipeline(&gets).await?;
        let compare = |(key, live): (&String, Resp)| {
            let live: i64 = if live == Resp::Nil { 0 } else { live.text().parse().unwrap_or(i64::MIN) };
            let landed = snapshot.values.get(key).copied().unwrap_or(0);
            (live != landed).then(|| format!("{key} is {live} in Valkey and {landed} in PostgreSQL"))
        };
        Ok(keys.iter().zip(live).filter_map(compare).collect())
    }
}

/// What was read from PostgreSQL.
#[derive(Debug, Default)]
struct Rows {
    ledger: Vec<(EntryId, EntryId, Option<Vec<u64>>)>,
    values: HashMap<String, i64>,
    operators: HashMap<String, Vec<String>>,
    letters: HashSet<u64>,
}

impl Rows {
    /// A row without digests, a compacted one, stands for all that the stream had in its range.
    fn resolve(self, books: &Books) -> Snapshot {
        let mut applied = HashSet::new();
        let mut unknown = 0;
        for (first, last, digests) in &self.ledger {
            match digests {
                Some(digests) => {
                    for digest in digests {
                        if books.seen.contains_key(digest) {
                            applied.insert(*digest);
                        // Below are rows of another time, put there to be compacted.
                        } else if *first > books.before && first.ms > 0 {
                            unknown += 1;
                        }
                    }
                }
                None => applied.extend(books.ids.range(*first..=*last).flat_map(|(_, digests)| digests)),
            }
        }
        let Rows { values, operators, letters, .. } = self;
        Snapshot { applied, unknown, values, operators, letters }
    }
}

fn id_of(resp: &Resp) -> EntryId {
    resp.text().parse().unwrap_or_default()
}
