//! Round: one look at a set of counters, their rows, and what is on the way.
//!
//! Takes the servers and keys; gives the sums of each, all as of the moment at which its counter was read. Fails with what a server says;
//! gives a [`Round::Partial`] where something was trimmed, or a server became another one, while it was read: then nothing can be said.
//!
//! Entries that the ledger has and the stream lacks are of two kinds. Those that were removed while the round was under way make it void: a counter may
//! have been read before one of them was added, and whose it was cannot be known. Those that were gone before the round began were either in the counters
//! and removed since (XDEL, trimming), or lost with the increments that belong to them (Valkey came back with an older copy): both are as the counters
//! and rows say. Which of the two it was is told by how many entries the stream has ever given away.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Row};

use super::book::{Book, Counted, Letter, State};
use super::judge::Sums;
use super::keys::Keys;
use crate::flow::batch::{Batch, Filling, Origin};
use crate::flow::{judge, ledger, read};
use crate::lanes::{self, Identity, LaneId};
use crate::model::entry::{EntryId, write_canonical};
use crate::model::pipeline::{Pipeline, Shard};
use crate::ops::Failure;
use crate::ops::observe::Servers;
use crate::retry::Fault;
use crate::telemetry::trace::Trace;
use crate::valkey::info::Stream;
use crate::valkey::resp::Bounds;
use crate::valkey::{Command, Delivered, Link, Reply, Wire, info, unexpected};

/// Counters read by one script.
const COUNTERS: usize = 500;
/// Entries read in one step.
const STEP: usize = 5_000;
/// What is held of one entry.
const BOUNDS: Bounds = Bounds { entry: 1 << 20, kept: 4 << 10 };

/// What one look gave.
#[derive(Debug)]
pub(super) enum Round {
    /// The sums of each key; and how many entries the ledger has that no stream had any more when the round began.
    Whole(BTreeMap<String, Sums>, u64),
    /// Not everything could be read, for this reason.
    Partial(String),
}

/// A stream of the pipeline, and where reading begins.
struct Source {
    shard: Shard,
    link: Arc<Link>,
    lane: Option<LaneId>,
    /// Everything below is settled.
    frontier: EntryId,
    /// The stream when the round began, before any counter was read; none if there was none.
    began: Option<Stream>,
}

impl Source {
    /// The last id when the round began.
    fn end(&self) -> EntryId {
        self.began.as_ref().map_or(EntryId::MIN, |told| told.last_generated)
    }

    /// Whether no entry has left the stream since the round began.
    async fn lost_nothing_since(&self) -> Result<bool, Fault> {
        let now = info::stream(self.link.commands(), &self.shard.stream).await?;
        Ok(match (&self.began, &now) {
            // What came and went meanwhile would have left a stream behind, unless that was deleted with it.
            (None, now) => now.is_none(),
            (Some(_), None) => false,
            (Some(before), Some(now)) => {
                removed(before).is_some_and(|before| removed(now) == Some(before))
                    && now.added >= before.added
                    && before.first.is_none_or(|first| now.first == Some(first))
            }
        })
    }
}

/// How many entries have left a stream, in all its life; none where the server does not tell.
fn removed(stream: &Stream) -> Option<u64> {
    stream.added?.checked_sub(stream.length)
}

/// Answers the counters' values, each `v` and the value, `n` for none, or `e` and an error; and the stream's last id.
const READ: &str = "
local told = redis.pcall('XINFO', 'STREAM', KEYS[1])
local last = '0-0'
if not told.err then
    for i = 1, #told, 2 do if told[i] == 'last-generated-id' then last = told[i + 1] end end
end
local values = {last}
for i = 2, #KEYS do
    local value = redis.pcall('GET', KEYS[i])
    if type(value) == 'table' and value.err then values[i] = 'e' .. value.err
    elseif value then values[i] = 'v' .. value
    else values[i] = 'n' end
end
return values";

/// Takes one look.
pub(super) async fn take(
    servers: &mut Servers,
    pipeline: &Pipeline,
    keys: &Keys,
    ids: &BTreeSet<String>,
) -> Result<Round, Failure> {
    let sources = sources(servers, pipeline).await?;
    let counted = counters(pipeline, &sources, ids).await?;
    let highest = counted.values().map(|counted| counted.up_to).chain(sources.iter().map(Source::end)).max();
    // A connection of its own: the snapshot lasts for as long as the streams are read.
    let session = servers.database.address().connect().await?;
    let mut connection = session.into_connection();
    let read = read_snapshot(servers, keys, &sources, &counted, highest.unwrap_or(EntryId::MIN), &mut connection).await;
    // If it cannot be closed it is closed already.
    let _ = tokio::time::timeout(Duration::from_secs(1), connection.close()).await;
    let (sums, gone) = match read? {
        Ok(whole) => whole,
        Err(partial) => return Ok(Round::Partial(partial)),
    };
    for source in &sources {
        if source.link.is_lost() || !source.link.is_same_server().await? {
            return Ok(Round::Partial("Valkey became another server".into()));
        }
    }
    Ok(Round::Whole(sums, gone))
}

async fn sources(servers: &mut Servers, pipeline: &Pipeline) -> Result<Vec<Source>, Failure> {
    let shards = servers.database.run(async |c| lanes::shards(c, &servers.source, pipeline).await).await?;
    let mut sources = Vec::new();
    for shard in shards {
        let link = servers.link(&shard.stream).await?;
        let identity = Identity::of(&servers.source, &shard);
        let lane = servers.database.run(async |c| lanes::find(c, &identity).await).await?;
        // Without a group nothing is known to be settled.
        let frontier = read::frontier(&link, &shard.stream, &shard.pipeline.group()).await?.unwrap_or(EntryId::MIN);
        let began = info::stream(link.commands(), &shard.stream).await?;
        sources.push(Source { shard, link, lane, frontier, began });
    }
    Ok(sources)
}

/// Reads the counters, each chunk with its stream's last id in one step.
async fn counters(
    pipeline: &Pipeline,
    sources: &[Source],
    ids: &BTreeSet<String>,
) -> Result<BTreeMap<String, Counted>, Failure> {
    let mut by_stream: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for id in ids {
        let shard = crate::model::shard::shard_of(id, pipeline.shards);
        by_stream.entry(pipeline.stream_of(shard)).or_default().push(id);
    }
    let mut counted = BTreeMap::new();
    for (stream, ids) in by_stream {
        // All shards of the pipeline are among its sources. What is read of one, counters and entries, is read on one link.
        let Some(own) = sources.iter().position(|source| source.shard.stream == stream) else { continue };
        let link = &sources[own].link;
        for ids in ids.chunks(COUNTERS) {
            let names = ids.iter().map(|id| pipeline.counter_of(id));
            let eval = Command::new("EVAL").arg(READ).arg(ids.len() + 1).arg(&stream).args(names);
            let reply = link.commands().call(eval).await?;
            let told: Vec<Reply> = reply.into_array().ok_or_else(|| unexpected("EVAL"))?.collect();
            let up_to: Option<EntryId> = told.first().and_then(Reply::as_text).and_then(|id| id.parse().ok());
            let (Some(up_to), true) = (up_to, told.len() == ids.len() + 1) else {
                return Err(unexpected("EVAL").into());
            };
            for (id, value) in ids.iter().zip(&told[1..]) {
                let text =
                    value.as_bytes().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default();
                let (value, doubt) = match (text.get(..1), text.get(1..)) {
                    (Some("n"), _) => (None, None),
                    (Some("v"), Some(number)) => match number.parse() {
                        Ok(number) => (Some(number), None),
                        Err(_) => (None, Some("the counter in Valkey is no whole number".to_owned())),
                    },
                    (_, words) => (None, Some(format!("the counter cannot be read: {}", words.unwrap_or_default()))),
                };
                counted.insert((*id).clone(), Counted { value, doubt, own, up_to });
            }
        }
    }
    Ok(counted)
}

/// Reads rows, letters and ledger in one snapshot, and the streams beside it. Gives the sums, and how many entries were gone before.
async fn read_snapshot(
    servers: &Servers,
    keys: &Keys,
    sources: &[Source],
    counted: &BTreeMap<String, Counted>,
    highest: EntryId,
    connection: &mut PgConnection,
) -> Result<Result<(BTreeMap<String, Sums>, u64), String>, Failure> {
    let fault = |error: sqlx::Error| -> Failure {
        match &error {
            sqlx::Error::Database(refused) => crate::postgres::refusal(&**refused).into(),
            _ => Fault::PostgresLost(format!("the connection to PostgreSQL broke: {error}")).into(),
        }
    };
    let mut snapshot = connection.begin_with("begin isolation level repeatable read read only").await.map_err(fault)?;
    // Between two statements streams are read. Set here, because a pooler takes no settings at the start.
    let limit = servers.database.address().statement_timeout.as_millis();
    let settings = format!(
        "set local idle_in_transaction_session_timeout = 0; set local search_path = public; set local statement_timeout = {limit}"
    );
    sqlx::raw_sql(AssertSqlSafe(settings)).execute(&mut *snapshot).await.map_err(fault)?;
    let ids: Vec<String> = counted.keys().cloned().collect();
    let forms = keys.canonical(&mut snapshot, &ids).await.map_err(fault)?;
    let mut book = Book::open(counted, &ids, &forms);
    let stored = stored(&mut snapshot, keys, forms.iter().flatten().cloned().collect()).await.map_err(fault)?;
    for (key, value) in stored {
        book.store(&key, value);
    }
    let (mut partial, mut gone) = (None, 0);
    for (n, source) in sources.iter().enumerate() {
        let Some(lane) = source.lane else {
            stream(n, source, None, highest, &mut snapshot, keys, &mut book, &HashSet::new()).await?;
            continue;
        };
        let letters = letters(&mut snapshot, lane).await.map_err(fault)?;
        let held: HashSet<(EntryId, u64)> = letters.iter().map(|letter| (letter.id, letter.digest)).collect();
        for letter in letters {
            book.letter(n, &letter, &keys.pipeline);
        }
        let Lacking { missing, retained } =
            stream(n, source, Some(lane), highest, &mut snapshot, keys, &mut book, &held).await?;
        if missing > 0 && !source.lost_nothing_since().await? {
            let name = &source.shard.stream;
            partial = Some(format!("{missing} entries of {name} were trimmed or deleted while they were read"));
            break;
        }
        gone += retained;
    }
    // Behind this transaction a pooler's connection may be somebody else's.
    snapshot.clear_cached_statements().await.map_err(fault)?;
    snapshot.rollback().await.map_err(fault)?;
    Ok(match partial {
        Some(why) => Err(why),
        None => Ok((book.close(), gone)),
    })
}

async fn stored(
    connection: &mut PgConnection,
    keys: &Keys,
    wanted: Vec<String>,
) -> Result<Vec<(String, Option<String>)>, sqlx::Error> {
    let (key, value, kind) = (keys.pipeline.key.quoted(), keys.pipeline.value.quoted(), &keys.sql_type);
    let sql = format!(
        "select t.{key}::text, t.{value}::text from {} t where t.{key} = any(array(select k::{kind} from unnest($1::text[]) k))",
        keys.table()
    );
    let rows = sqlx::query(AssertSqlSafe(sql)).bind(wanted).fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Letters that are not applied: open, or given up.
async fn letters(connection: &mut PgConnection, lane: LaneId) -> Result<Vec<Letter>, sqlx::Error> {
    let rows = sqlx::query(
        "select id::text, digest, reason, fields from tidegate.dead_letters
         where lane = $1 and (resolved_at is null or resolution like 'discarded%')",
    )
    .bind(lane)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let id: String = row.try_get(0)?;
            let number = id.parse().map_err(|e| sqlx::Error::Decode(format!("{id} is no id: {e}").into()))?;
            let (id, fields) = (EntryId::from_number(number), row.try_get::<Vec<Vec<u8>>, _>(3)?);
            let mut canonical = Vec::new();
            write_canonical(&mut canonical, id, fields.iter().map(Vec::as_slice));
            Ok(Letter { id, digest: row.try_get::<i64, _>(1)? as u64, reason: row.try_get(2)?, canonical })
        })
        .collect()
}

/// Entries that the snapshot has, behind where reading began, and that the stream has no longer: whose they were cannot be known.
#[derive(Default)]
struct Lacking {
    /// All of them.
    missing: u64,
    /// Those above the trim line, which nothing has trimmed.
    retained: u64,
}

/// Reads a stream from where everything is settled, as far as anything of it can matter.
#[expect(clippy::too_many_arguments, reason = "one step of the round, cut out for reading")]
async fn stream(
    n: usize,
    source: &Source,
    lane: Option<LaneId>,
    highest: EntryId,
    snapshot: &mut PgConnection,
    keys: &Keys,
    book: &mut Book<'_>,
    letters: &HashSet<(EntryId, u64)>,
) -> Result<Lacking, Failure> {
    let fault = |error: sqlx::Error| Failure::from(Fault::PostgresLost(format!("the ledger cannot be read: {error}")));
    let in_ledger = match lane {
        Some(lane) => ledger::highest(&mut *snapshot, lane).await.map_err(fault)?.unwrap_or(EntryId::MIN),
        None => EntryId::MIN,
    };
    let end = highest.max(in_ledger);
    let (mut wire, _) = source.link.open_wire("tidegate:audit", BOUNDS).await?;
    let trimmed_below = match lane {
        Some(lane) => lanes::trimmed_below(&mut *snapshot, lane).await.map_err(fault)?,
        None => EntryId::MIN,
    };
    let froms = [source.frontier, source.frontier.max(trimmed_below)];
    let (mut from, mut known) = (Some(source.frontier), [0u64; 2]);
    while let Some(start) = from.filter(|start| *start <= end) {
        let page = page(&mut wire, source, start, end).await?;
        let (Some(first), Some(last)) = (page.entries().first(), page.entries().last()) else { break };
        let rows = match lane {
            Some(lane) => ledger::rows_within(&mut *snapshot, lane, first.id, last.id).await.map_err(fault)?,
            None => Vec::new(),
        };
        let findings = judge::examine(&page, &rows);
        let starts_behind =
            |from: EntryId, id: EntryId| rows.iter().any(|row| row.first >= from && row.first <= id && id <= row.last);
        for (from, known) in froms.iter().zip(&mut known) {
            let is_behind = |&&index: &&usize| starts_behind(*from, page.entries()[index].id);
            *known += findings.known.iter().filter(is_behind).count() as u64;
        }
        for (state, indices) in
            [(State::Missing, &findings.new), (State::Known, &findings.known), (State::Doubtful, &findings.unjudgeable)]
        {
            for &index in indices {
                let entry = &page.entries()[index];
                let is_letter = letters.contains(&(entry.id, entry.digest));
                book.entry(n, entry.id, page.canonical(entry), state, is_letter, &keys.pipeline);
            }
        }
        from = last.id.next().filter(|_| page.len() == STEP);
    }
    let Some(lane) = lane else { return Ok(Lacking::default()) };
    let sql = "select coalesce(sum(entries), 0)::bigint from tidegate.ledger
               where lane = $1 and lower(ids) >= $2::numeric and lower(ids) <= $3::numeric and digests is not null";
    let mut lacking = [0; 2];
    for ((from, known), lacking) in froms.iter().zip(known).zip(&mut lacking) {
        let query = sqlx::query_scalar(sql).bind(lane).bind(from.number().to_string()).bind(end.number().to_string());
        let expected: i64 = query.fetch_one(&mut *snapshot).await.map_err(fault)?;
        *lacking = (expected.max(0) as u64).saturating_sub(known);
    }
    let [missing, retained] = lacking;
    Ok(Lacking { missing, retained })
}

async fn page(wire: &mut Wire, source: &Source, first: EntryId, last: EntryId) -> Result<Batch, Fault> {
    let origin =
        Origin { generation: source.link.generation().clone(), consumer: "audit".into(), trace: Trace::default() };
    let mut filling = Filling::new(origin, usize::MAX);
    let range = Command::new("XRANGE").arg(&source.shard.stream).arg(first).arg(last).arg("COUNT").arg(STEP);
    wire.send(&range);
    let read = wire.run(Duration::ZERO, |delivered| {
        match delivered {
            Delivered::Whole(id, strings) => filling.push(id, strings),
            Delivered::Shortened(entry) => filling.push_shortened(entry),
        }
        ControlFlow::Continue(())
    });
    read.await?;
    filling.close_run();
    Ok(filling.seal(true))
}
