//! Select: which dead letters are meant.
//!
//! Takes ids and filters of the command line; gives the letters that match, by one statement. Fails with what PostgreSQL says.

use std::str::FromStr;
use std::time::{Duration, SystemTime};

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::flow::redrive::LetterId;
use crate::model::entry::EntryId;
use crate::ops::complete::{Name, by};

/// The reason of letters that the ledger could not judge: whether their delta is in the table nobody can know.
pub const DOUBTFUL: &str = "cannot_be_judged";

/// A letter by its entry's id; with its digest where several share the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Which {
    id: EntryId,
    digest: Option<u64>,
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Which, String> {
        let (id, digest) = text.split_once('/').map_or((text, None), |(id, digest)| (id, Some(digest)));
        let digest = digest.map(|digest| u64::from_str_radix(digest, 16)).transpose();
        match (id.parse(), digest) {
            (Ok(id), Ok(digest)) => Ok(Which { id, digest }),
            _ => Err(format!(
                "{text:?} is no letter: write an entry's id such as 1700000000000-0, or id/digest as the list shows it"
            )),
        }
    }
}

/// Which letters.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Filter {
    /// Letters by the id of their entry, or id/digest
    #[arg(value_name = "ID", add = by(Name::Letter))]
    pub ids: Vec<Which>,
    /// Only of these pipelines
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Only of these streams
    #[arg(long = "stream", value_name = "KEY", add = by(Name::Stream))]
    pub streams: Vec<String>,
    /// Only with these reasons, such as bad_amount
    #[arg(long = "reason", value_name = "WORD", add = by(Name::Reason))]
    pub reasons: Vec<String>,
    /// Only of this row's key
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Only those buried since then: a time (2026-01-31T12:00:00Z), or how long ago (30m)
    #[arg(long, value_name = "WHEN", value_parser = Moment::from_str)]
    pub since: Option<Moment>,
    /// Only those buried before then
    #[arg(long, value_name = "WHEN", value_parser = Moment::from_str)]
    pub until: Option<Moment>,
}

impl Filter {
    /// Whether nothing narrows it.
    pub fn is_everything(&self) -> bool {
        let Filter { ids, pipelines, streams, reasons, key, since, until } = self;
        ids.is_empty()
            && pipelines.is_empty()
            && streams.is_empty()
            && reasons.is_empty()
            && key.is_none()
            && since.is_none()
            && until.is_none()
    }
}

/// A moment, as seconds since 1970 or as seconds ago.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Moment {
    /// By this computer's clock.
    At(f64),
    /// By PostgreSQL's clock.
    Ago(Duration),
}

impl Moment {
    fn parts(moment: Option<Moment>) -> (Option<f64>, Option<f64>) {
        match moment {
            None => (None, None),
            Some(Moment::At(seconds)) => (Some(seconds), None),
            Some(Moment::Ago(ago)) => (None, Some(ago.as_secs_f64())),
        }
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Moment, String> {
        if let Ok(ago) = humantime::parse_duration(text) {
            return Ok(Moment::Ago(ago));
        }
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        humantime::parse_rfc3339_weak(text).map(|time| Moment::At(seconds(time))).map_err(|_| {
            format!("{text:?} is no moment: write a time such as 2026-01-31T12:00:00Z, or how long ago, such as 30m")
        })
    }
}

/// Which of many letters are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// So many of the latest are left out.
    pub skip: u32,
    /// So many at the most are listed.
    pub limit: u32,
}

/// Letters in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum State {
    /// Those that wait for somebody
    #[default]
    Open,
    /// Those that were redriven or discarded
    Resolved,
    /// Those that were discarded
    Discarded,
    /// All
    All,
}

/// A letter, as it is kept.
#[derive(Debug, Clone)]
pub struct Letter {
    /// Its lane.
    pub lane: i32,
    /// The pipeline that buried it.
    pub pipeline: String,
    /// The stream it came from.
    pub stream: String,
    /// The table it was meant for.
    pub target: String,
    /// Its entry's id.
    pub id: EntryId,
    /// Its entry's digest.
    pub digest: u64,
    /// Why, in one word.
    pub reason: String,
    /// Why, in one sentence.
    pub detail: String,
    /// Who buried it.
    pub consumer: String,
    /// When, in RFC 3339.
    pub buried_at: String,
    /// How long ago, in milliseconds.
    pub buried_ms_ago: u64,
    /// When it was resolved, in RFC 3339; none while it is open.
    pub resolved_at: Option<String>,
    /// How.
    pub resolution: Option<String>,
    /// How long the whole entry was; none in letters of early versions.
    pub bytes: Option<u64>,
    /// Whether only the beginning of its fields was kept.
    pub shortened: bool,
    /// Name, value, name, value.
    pub fields: Vec<Vec<u8>>,
}

impl Letter {
    /// What tells it from every other one of its lane.
    pub fn letter_id(&self) -> LetterId {
        (self.id, self.digest)
    }

    /// As the list shows it and the command line takes it.
    pub fn name(&self) -> String {
        format!("{}/{:016x}", self.id, self.digest)
    }
}

/// Every condition of a filter, over letters `d` and lanes `l`; parameters 1 to 13.
const MATCHES: &str = "
    l.source = $1
    and ($2 = 'all' or ($2 = 'open') = (d.resolved_at is null))
    and ($2 <> 'discarded' or d.resolution like 'discarded%')
    and (cardinality($3::text[]) = 0 or exists (
        select from unnest($3::text[], $4::int8[]) as w (id, digest)
        where d.id = w.id::numeric and (w.digest is null or d.digest = w.digest)))
    and (cardinality($5::text[]) = 0 or l.pipeline = any($5))
    and (cardinality($6::text[]) = 0 or l.stream = any($6))
    and (cardinality($7::text[]) = 0 or d.reason = any($7))
    and ($8::bytea is null or exists (
        select from generate_subscripts(d.fields, 1) as n
        where n % 2 = 1 and d.fields[n] = any($9::bytea[]) and d.fields[n + 1] = $8))
    and ($10::float8 is null or d.buried_at >= to_timestamp($10))
    and ($11::float8 is null or d.buried_at >= now() - $11 * interval '1 second')
    and ($12::float8 is null or d.buried_at < to_timestamp($12))
    and ($13::float8 is null or d.buried_at < now() - $13 * interval '1 second')";

const COLUMNS: &str = "d.lane, l.pipeline, l.stream, l.target, d.id::text, d.digest, d.reason, d.detail, d.consumer,
    to_char(d.buried_at at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
    greatest(extract(epoch from now() - d.buried_at) * 1000, 0)::bigint,
    to_char(d.resolved_at at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), d.resolution, d.bytes, d.shortened, d.fields";

/// What is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Search<'a> {
    /// The Valkey deployment.
    pub source: &'a str,
    /// Which letters.
    pub filter: &'a Filter,
    /// In which state.
    pub state: State,
    /// The fields that hold keys.
    pub key_fields: &'a [Vec<u8>],
}

impl Search<'_> {
    fn bind<'q>(
        &self,
        query: sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>,
    ) -> sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments> {
        let Filter { ids, pipelines, streams, reasons, key, since, until } = self.filter;
        let (ids, digests): (Vec<String>, Vec<Option<i64>>) =
            ids.iter().map(|which| (which.id.number().to_string(), which.digest.map(|digest| digest as i64))).unzip();
        let state = match self.state {
            State::Open => "open",
            State::Resolved => "resolved",
            State::Discarded => "discarded",
            State::All => "all",
        };
        let ((since_at, since_ago), (until_at, until_ago)) = (Moment::parts(*since), Moment::parts(*until));
        query
            .bind(self.source.to_owned())
            .bind(state)
            .bind(ids)
            .bind(digests)
            .bind(pipelines.clone())
            .bind(streams.clone())
            .bind(reasons.clone())
            .bind(key.clone().map(String::into_bytes))
            .bind(self.key_fields.to_vec())
            .bind(since_at)
            .bind(since_ago)
            .bind(until_at)
            .bind(until_ago)
    }

    /// How many match, by pipeline and reason.
    pub async fn counts(&self, connection: &mut PgConnection) -> Result<Vec<(String, String, u64)>, sqlx::Error> {
        let sql = format!(
            "select l.pipeline, d.reason, count(*) from tidegate.dead_letters d join tidegate.lanes l using (lane)
             where {MATCHES} group by 1, 2 order by 1, 2"
        );
        let rows = self.bind(sqlx::query(sqlx::AssertSqlSafe(sql))).fetch_all(connection).await?;
        let row =
            |row: &PgRow| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get::<i64, _>(2)?.try_into().unwrap_or(0)));
        rows.iter().map(row).collect()
    }

    /// Those that match, the latest first, this piece of them.
    pub async fn letters(&self, connection: &mut PgConnection, piece: Piece) -> Result<Vec<Letter>, sqlx::Error> {
        let sql = format!(
            "select {COLUMNS} from tidegate.dead_letters d join tidegate.lanes l using (lane)
             where {MATCHES} order by d.buried_at desc, d.lane, d.id desc, d.digest limit $14 offset $15"
        );
        let query = self.bind(sqlx::query(sqlx::AssertSqlSafe(sql)));
        let query = query.bind(i64::from(piece.limit)).bind(i64::from(piece.skip));
        query.fetch_all(connection).await?.iter().map(letter).collect()
    }

    /// What tells those that match apart, by lane; with their reasons.
    pub async fn names(&self, connection: &mut PgConnection) -> Result<Vec<(i32, LetterId, String)>, sqlx::Error> {
        let sql = format!(
            "select d.lane, d.id::text, d.digest, d.reason from tidegate.dead_letters d join tidegate.lanes l using (lane)
             where {MATCHES} order by d.lane, d.id, d.digest"
        );
        let rows = self.bind(sqlx::query(sqlx::AssertSqlSafe(sql))).fetch_all(connection).await?;
        rows.iter()
            .map(|row| Ok((row.try_get(0)?, (id(row, 1)?, row.try_get::<i64, _>(2)? as u64), row.try_get(3)?)))
            .collect()
    }

    /// Marks those that match as discarded, or opens them again; gives how many.
    pub async fn mark(&self, connection: &mut PgConnection, resolution: Option<&str>) -> Result<u64, sqlx::Error> {
        let sql = format!(
            "update tidegate.dead_letters d set resolved_at = case when $14::text is null then null else now() end, resolution = $14
             from tidegate.lanes l where l.lane = d.lane and {MATCHES}"
        );
        let query = self.bind(sqlx::query(sqlx::AssertSqlSafe(sql))).bind(resolution.map(str::to_owned));
        Ok(query.execute(connection).await?.rows_affected())
    }
}

/// What the resolution of a discarded letter begins with.
pub const DISCARDED: &str = "discarded";

fn letter(row: &PgRow) -> Result<Letter, sqlx::Error> {
    Ok(Letter {
        lane: row.try_get(0)?,
        pipeline: row.try_get(1)?,
        stream: row.try_get(2)?,
        target: row.try_get(3)?,
        id: id(row, 4)?,
        digest: row.try_get::<i64, _>(5)? as u64,
        reason: row.try_get(6)?,
        detail: row.try_get(7)?,
        consumer: row.try_get(8)?,
        buried_at: row.try_get(9)?,
        buried_ms_ago: row.try_get::<i64, _>(10)?.try_into().unwrap_or(0),
        resolved_at: row.try_get(11)?,
        resolution: row.try_get(12)?,
        bytes: row.try_get::<Option<i64>, _>(13)?.and_then(|bytes| bytes.try_into().ok()),
        shortened: row.try_get(14)?,
        fields: row.try_get(15)?,
    })
}

fn id(row: &PgRow, column: usize) -> Result<EntryId, sqlx::Error> {
    let text: String = row.try_get(column)?;
    text.parse().map(EntryId::from_number).map_err(|e| sqlx::Error::Decode(format!("{text} is no id: {e}").into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_named_by_id_or_by_id_and_digest() {
        let id = EntryId { ms: 17, seq: 3 };
        assert_eq!("17-3".parse(), Ok(Which { id, digest: None }));
        assert_eq!("17-3/00000000000000ff".parse(), Ok(Which { id, digest: Some(255) }));
        for bad in ["", "17", "17-3/", "17-3/xyz", "a-b"] {
            assert!(bad.parse::<Which>().is_err_and(|words| words.contains("write an entry's id")), "{bad}");
        }
    }

    #[test]
    fn a_moment_is_a_time_or_how_long_ago() {
        let moment_of = |text: &str| text.parse::<Moment>();
        assert_eq!(moment_of("30m"), Ok(Moment::Ago(Duration::from_secs(1800))));
        assert_eq!(moment_of("1970-01-01T00:00:05Z"), Ok(Moment::At(5.0)));
        assert!(moment_of("yesterday").is_err());
    }
}
