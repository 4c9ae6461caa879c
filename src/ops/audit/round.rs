//! Round: one look at a set of counters, their rows, and what is on the way.
//!
//! Takes the servers and keys; gives the sums of each, all as of the moment at which its counter was read. Fails with what a server says;
//! gives a [`Round::Partial`] where something was trimmed, or a server became another one, while it was read: then nothing can be said.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Row};

use super::judge::Sums;
use super::{Opts, TOGETHER};
use crate::client::invalidate::literal;
use crate::flow::batch::{Batch, Filling, Origin};
use crate::flow::{judge, ledger, read};
use crate::lanes::{self, Identity, LaneId};
use crate::model::entry::{Canonical, EntryId, write_canonical};
use crate::model::pipeline::{Pipeline, Shard};
use crate::model::row;
use crate::model::slot::hash_tag;
use crate::ops::Failure;
use crate::ops::observe::Servers;
use crate::retry::Fault;
use crate::target::Fit;
use crate::telemetry::trace::Trace;
use crate::valkey::resp::Bounds;
use crate::valkey::{Command, Delivered, Home, Link, Reply, Wire, info, unexpected};

/// Counters read by one script.
const COUNTERS: usize = 500;
/// Entries read in one step.
const STEP: usize = 5_000;
/// What is held of one entry.
const BOUNDS: Bounds = Bounds { entry: 1 << 20, kept: 4 << 10 };

/// What one look gave.
#[derive(Debug)]
pub(super) enum Round {
    /// The sums of each key.
    Whole(BTreeMap<String, Sums>),
    /// Not everything could be read, for this reason.
    Partial(String),
}

/// How keys, rows and counters are named.
#[derive(Debug)]
pub(super) struct Keys {
    pipeline: Pipeline,
    /// The type that a key is compared as.
    sql_type: String,
    is_typed: bool,
}

impl Keys {
    pub(super) fn new(pipeline: &Pipeline, fit: &Fit) -> Keys {
        Keys { pipeline: pipeline.clone(), sql_type: fit.keys[0].clone(), is_typed: fit.is_grouped }
    }

    /// The table, quoted.
    fn table(&self) -> String {
        self.pipeline.table.quoted()
    }

    /// The keys that are to be judged, in groups.
    pub(super) fn groups(&self, opts: &Opts, _servers: &Servers) -> Groups<'_> {
        let stage = match (opts.full, opts.keys.is_empty()) {
            (true, _) => Stage::Rows(None),
            (false, false) => Stage::Named(opts.keys.iter().cloned().collect()),
            (false, true) => Stage::Sample(opts.sample),
        };
        Groups { keys: self, stage }
    }

    /// Keys in the form in which the table shows them; a text that is no key of this type has none.
    async fn canonical(
        &self,
        connection: &mut PgConnection,
        keys: &[String],
    ) -> Result<Vec<Option<String>>, sqlx::Error> {
        if !self.is_typed {
            return Ok(keys.iter().cloned().map(Some).collect());
        }
        let sql = format!(
            "select (k.key::{})::text from unnest($1::text[]) with ordinality as k (key, n) order by k.n",
            self.sql_type
        );
        let (mut found, mut work) = (vec![None; keys.len()], vec![(0, keys.len())]);
        while let Some((start, end)) = work.pop().filter(|(start, end)| start < end) {
            let mut savepoint = connection.begin().await?;
            let cast: Result<Vec<Option<String>>, _> =
                sqlx::query_scalar(AssertSqlSafe(sql.clone())).bind(&keys[start..end]).fetch_all(&mut *savepoint).await;
            match cast {
                Ok(texts) => {
                    savepoint.commit().await?;
                    found[start..end].clone_from_slice(&texts);
                }
                Err(sqlx::Error::Database(_)) => {
                    savepoint.rollback().await?;
                    let middle = start + (end - start) / 2;
                    if end - start > 1 {
                        work.extend([(start, middle), (middle, end)]);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The key that a counter in Valkey belongs to.
    fn of_counter(&self, counter: &str) -> Option<String> {
        let below = counter.strip_prefix(&self.pipeline.counters)?.strip_prefix(':')?;
        let id = match hash_tag(&self.pipeline.stream_of(0)) {
            Some(_) => below.strip_prefix('{')?.split_once("}:")?.1,
            None => below,
        };
        (self.pipeline.counter_of(id) == counter).then(|| id.to_owned())
    }
}

/// Groups of keys to be judged together.
pub(super) struct Groups<'a> {
    keys: &'a Keys,
    stage: Stage,
}

enum Stage {
    Named(BTreeSet<String>),
    Sample(u32),
    /// Every row, from behind this key on.
    Rows(Option<String>),
    /// Every counter of Valkey that has no row: on these primaries, on the last of them from this cursor on.
    Counters(Vec<Home>, String),
    Over,
}

impl Groups<'_> {
    pub(super) async fn next(&mut self, servers: &mut Servers) -> Result<Option<BTreeSet<String>>, Failure> {
        loop {
            let stage = std::mem::replace(&mut self.stage, Stage::Over);
            match stage {
                Stage::Over => return Ok(None),
                Stage::Named(keys) => return Ok(Some(keys)),
                Stage::Sample(size) => return self.sample(servers, size).await.map(Some),
                Stage::Rows(behind) => {
                    let rows = self.rows(servers, behind.as_deref()).await?;
                    self.stage = match rows.last() {
                        Some(last) if rows.len() == TOGETHER => Stage::Rows(Some(last.clone())),
                        _ => Stage::Counters(servers.valkey.homes().await?, "0".into()),
                    };
                    if !rows.is_empty() {
                        return Ok(Some(rows.into_iter().collect()));
                    }
                }
                Stage::Counters(mut homes, cursor) => {
                    let Some(home) = homes.last() else { return Ok(None) };
                    let (next, found) = self.counters(servers, home, &cursor, TOGETHER).await?;
                    if next == "0" {
                        homes.pop();
                    }
                    self.stage = Stage::Counters(homes, next);
                    let without_row = self.without_row(servers, found).await?;
                    if !without_row.is_empty() {
                        return Ok(Some(without_row));
                    }
                }
            }
        }
    }

    async fn rows(&self, servers: &Servers, behind: Option<&str>) -> Result<Vec<String>, Failure> {
        let (key, table, kind) = (self.keys.pipeline.key.quoted(), self.keys.table(), &self.keys.sql_type);
        let from = if behind.is_some() { format!("where {key} > $2::{kind}") } else { "where $2::text is null".into() };
        let sql = format!("select {key}::text from {table} {from} order by {key} limit $1");
        let rows: Vec<Option<String>> = servers
            .database
            .run(async |c| sqlx::query_scalar(AssertSqlSafe(sql)).bind(TOGETHER as i64).bind(behind).fetch_all(c).await)
            .await?;
        Ok(rows.into_iter().flatten().collect())
    }

    /// Rows at random, and counters from a place at random: what only one side has is met as well.
    async fn sample(&self, servers: &mut Servers, size: u32) -> Result<BTreeSet<String>, Failure> {
        let (key, table) = (self.keys.pipeline.key.quoted(), self.keys.table());
        let estimate = "select greatest(reltuples, 0)::bigint from pg_class where oid = $1::regclass";
        let name = table.clone();
        let rows: i64 =
            servers.database.run(async |c| sqlx::query_scalar(estimate).bind(name).fetch_one(c).await).await?;
        // A large table is not read for a few of its rows.
        let source = match rows > 200_000 {
            true => format!(
                "{table} tablesample system ({:.6})",
                (f64::from(size) * 300.0 / rows as f64).clamp(0.000_1, 100.0)
            ),
            false => table,
        };
        let sql = format!("select {key}::text from {source} order by random() limit $1");
        let found: Vec<Option<String>> = servers
            .database
            .run(async |c| sqlx::query_scalar(AssertSqlSafe(sql)).bind(i64::from(size)).fetch_all(c).await)
            .await?;
        let mut keys: BTreeSet<String> = found.into_iter().flatten().collect();
        let homes = servers.valkey.homes().await?;
        let wanted = (size as usize / 4 + 1).div_ceil(homes.len().max(1));
        for home in &homes {
            let cursor = rand::random::<u16>().to_string();
            let (_, counters) = self.counters(servers, home, &cursor, wanted).await?;
            // Behind the last one comes the first: of few counters all are met, wherever it began.
            if counters.len() < wanted {
                keys.extend(self.counters(servers, home, "0", wanted - counters.len()).await?.1);
            }
            keys.extend(counters);
        }
        Ok(keys)
    }

    /// Counters on one primary from a cursor on, at least so many if there are: keys, and where to go on.
    async fn counters(
        &self,
        servers: &mut Servers,
        home: &Home,
        cursor: &str,
        most: usize,
    ) -> Result<(String, Vec<String>), Failure> {
        let link = servers.link_at(home).await?;
        let (mut cursor, mut found) = (cursor.to_owned(), Vec::new());
        let pattern = format!("{}:*", literal(&self.keys.pipeline.counters));
        loop {
            let scan = Command::new("SCAN").arg(&cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1_000);
            let parts: Vec<Reply> =
                link.commands().call(scan).await?.into_array().ok_or_else(|| unexpected("SCAN"))?.collect();
            let (next, names) = (parts.first().and_then(Reply::as_text), parts.get(1));
            let (Some(next), Some(names)) = (next, names) else { return Err(unexpected("SCAN").into()) };
            cursor = next.to_owned();
            found.extend(names.strings().filter_map(|name| self.keys.of_counter(std::str::from_utf8(name).ok()?)));
            if cursor == "0" || found.len() >= most {
                return Ok((cursor, found));
            }
        }
    }

    async fn without_row(&self, servers: &Servers, keys: Vec<String>) -> Result<BTreeSet<String>, Failure> {
        let (key, table, kind) = (self.keys.pipeline.key.quoted(), self.keys.table(), self.keys.sql_type.clone());
        let sql = format!(
            "select k.key from unnest($1::text[]) as k (key) where not exists (select from {table} t where t.{key} = k.key::{kind})"
        );
        let without = servers.database.transact(async |session| {
            let mut transaction = session.begin().await?;
            let canonical: Vec<String> =
                self.keys.canonical(&mut transaction, &keys).await?.into_iter().flatten().collect();
            let without: Vec<String> =
                sqlx::query_scalar(AssertSqlSafe(sql)).bind(canonical).fetch_all(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(without)
        });
        Ok(without.await?.into_iter().collect())
    }
}

/// A stream of the pipeline, and where reading begins.
struct Source {
    shard: Shard,
    link: Arc<Link>,
    lane: Option<LaneId>,
    /// Everything below is settled.
    frontier: EntryId,
    /// The last id when the round began.
    end: EntryId,
}

/// When a counter was read: the stream's last id at that moment, and what it held.
struct Counted {
    value: Option<i128>,
    doubt: Option<String>,
    /// Which stream's, and up to where.
    own: usize,
    up_to: EntryId,
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
    let highest = counted.values().map(|counted| counted.up_to).chain(sources.iter().map(|source| source.end)).max();
    // A connection of its own: the snapshot lasts for as long as the streams are read.
    let session = servers.database.address().connect().await?;
    let mut connection = session.into_connection();
    let read = read_snapshot(servers, keys, &sources, &counted, highest.unwrap_or(EntryId::MIN), &mut connection).await;
    // If it cannot be closed it is closed already.
    let _ = tokio::time::timeout(Duration::from_secs(1), connection.close()).await;
    let sums = match read? {
        Ok(sums) => sums,
        Err(partial) => return Ok(Round::Partial(partial)),
    };
    for source in &sources {
        if source.link.is_lost() || !source.link.is_same_server().await? {
            return Ok(Round::Partial("Valkey became another server".into()));
        }
    }
    Ok(Round::Whole(sums))
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
        let end = info::stream(link.commands(), &shard.stream).await?.map_or(EntryId::MIN, |told| told.last_generated);
        sources.push(Source { shard, link, lane, frontier, end });
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

/// Reads rows, letters and ledger in one snapshot, and the streams beside it.
async fn read_snapshot(
    servers: &Servers,
    keys: &Keys,
    sources: &[Source],
    counted: &BTreeMap<String, Counted>,
    highest: EntryId,
    connection: &mut PgConnection,
) -> Result<Result<BTreeMap<String, Sums>, String>, Failure> {
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
    let mut partial = None;
    for (n, source) in sources.iter().enumerate() {
        let Some(lane) = source.lane else {
            partial = stream(n, source, None, highest, &mut snapshot, keys, &mut book, &HashSet::new()).await?;
            continue;
        };
        let letters = letters(&mut snapshot, lane).await.map_err(fault)?;
        let held: HashSet<(EntryId, u64)> = letters.iter().map(|letter| (letter.id, letter.digest)).collect();
        for letter in letters {
            book.letter(n, &letter, &keys.pipeline);
        }
        partial = stream(n, source, Some(lane), highest, &mut snapshot, keys, &mut book, &held).await?;
        if partial.is_some() {
            break;
        }
    }
    // Behind this transaction a pooler's connection may be somebody else's.
    snapshot.clear_cached_statements().await.map_err(fault)?;
    snapshot.rollback().await.map_err(fault)?;
    Ok(match partial {
        Some(why) => Err(why),
        None => Ok(book.close()),
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

struct Letter {
    id: EntryId,
    digest: u64,
    reason: String,
    canonical: Vec<u8>,
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

/// Reads a stream from where everything is settled, as far as anything of it can matter. Says why, where a part of it is gone.
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
) -> Result<Option<String>, Failure> {
    let fault = |error: sqlx::Error| Failure::from(Fault::PostgresLost(format!("the ledger cannot be read: {error}")));
    let in_ledger = match lane {
        Some(lane) => ledger::highest(&mut *snapshot, lane).await.map_err(fault)?.unwrap_or(EntryId::MIN),
        None => EntryId::MIN,
    };
    let end = highest.max(in_ledger);
    let (mut wire, _) = source.link.open_wire("tidegate:audit", BOUNDS).await?;
    let (mut from, mut known_behind) = (Some(source.frontier), 0u64);
    while let Some(start) = from.filter(|start| *start <= end) {
        let page = page(&mut wire, source, start, end).await?;
        let (Some(first), Some(last)) = (page.entries().first(), page.entries().last()) else { break };
        let rows = match lane {
            Some(lane) => ledger::rows_within(&mut *snapshot, lane, first.id, last.id).await.map_err(fault)?,
            None => Vec::new(),
        };
        let findings = judge::examine(&page, &rows);
        let starts_behind =
            |id: EntryId| rows.iter().any(|row| row.first >= source.frontier && row.first <= id && id <= row.last);
        known_behind += findings.known.iter().filter(|&&index| starts_behind(page.entries()[index].id)).count() as u64;
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
    let Some(lane) = lane else { return Ok(None) };
    // Entries that the snapshot has, behind where reading began, and that the stream had no longer: whose they were cannot be known.
    let sql = "select coalesce(sum(entries), 0)::bigint from tidegate.ledger
               where lane = $1 and lower(ids) >= $2::numeric and lower(ids) <= $3::numeric and digests is not null";
    let expected: i64 = sqlx::query_scalar(sql)
        .bind(lane)
        .bind(source.frontier.number().to_string())
        .bind(end.number().to_string())
        .fetch_one(snapshot)
        .await
        .map_err(fault)?;
    let missing = (expected.max(0) as u64).saturating_sub(known_behind);
    Ok((missing > 0)
        .then(|| format!("{missing} entries of {} were trimmed or deleted while they were read", source.shard.stream)))
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

/// What the snapshot says of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is not in it.
    Missing,
    /// It is.
    Known,
    /// The ledger cannot tell.
    Doubtful,
}

/// The sums of all keys of a round, being added up.
struct Book<'a> {
    counted: &'a BTreeMap<String, Counted>,
    /// The texts that stand for one row's key.
    spellings: HashMap<String, Vec<String>>,
    /// The row's key that a text stands for.
    canonical: HashMap<String, String>,
    sums: BTreeMap<String, Sums>,
}

impl<'a> Book<'a> {
    fn open(counted: &'a BTreeMap<String, Counted>, ids: &[String], forms: &[Option<String>]) -> Book<'a> {
        let mut book = Book { counted, spellings: HashMap::new(), canonical: HashMap::new(), sums: BTreeMap::new() };
        for (id, form) in ids.iter().zip(forms) {
            let key = form.clone().unwrap_or_else(|| id.clone());
            let sums = book.sums.entry(key.clone()).or_default();
            let told = &counted[id];
            if let Some(value) = told.value {
                *sums.valkey.get_or_insert(0) += value;
            }
            if form.is_none() {
                sums.doubt = Some("its text is no key of the table's type".into());
            }
            if let Some(doubt) = &told.doubt {
                sums.doubt = Some(doubt.clone());
            }
            book.canonical.insert(id.clone(), key.clone());
            book.spellings.entry(key).or_default().push(id.clone());
        }
        book
    }

    fn store(&mut self, key: &str, value: Option<String>) {
        let Some(sums) = self.sums.get_mut(key) else { return };
        match value.as_deref().map(whole) {
            None => sums.stored = Some(0),
            Some(Some(value)) => sums.stored = Some(value),
            Some(None) => sums.doubt = Some("the row's value is no whole number".into()),
        }
    }

    /// Whether a counter had an entry of a stream when it was read.
    fn had(&self, id: &str, stream: usize, entry: EntryId) -> bool {
        match self.counted.get(id) {
            // The entries of another stream than its own were there before: a stream that the pipeline has no longer.
            Some(told) => told.own != stream || entry <= told.up_to,
            None => true,
        }
    }

    fn entry(
        &mut self,
        stream: usize,
        id: EntryId,
        canonical: Canonical<'_>,
        state: State,
        is_letter: bool,
        pipeline: &Pipeline,
    ) {
        let (key, amount) = match row::decode(canonical, pipeline) {
            Ok(delta) => (delta.key, Some(delta.amount)),
            Err(_) => match key_of(canonical, pipeline) {
                Some(key) => (key, None),
                None => return,
            },
        };
        let had = self.had(key, stream, id);
        let Some(sums) = self.canonical.get(key).and_then(|key| self.sums.get_mut(key)) else { return };
        match (state, amount, had) {
            // Letters are added up by themselves.
            (State::Known, ..) if is_letter => {}
            (State::Doubtful, ..) => {
                sums.doubt = Some(format!("the ledger no longer tells whether entry {id} was flushed"));
            }
            (State::Missing, Some(amount), true) => sums.pending += i128::from(amount),
            (State::Known, Some(amount), false) => sums.ahead += i128::from(amount),
            (State::Missing, None, true) => sums.doubt = Some(format!("the amount of entry {id} cannot be read")),
            (State::Missing, _, false) | (State::Known, _, true) | (State::Known, None, false) => {}
        }
    }

    fn letter(&mut self, stream: usize, letter: &Letter, pipeline: &Pipeline) {
        let canonical = Canonical(&letter.canonical);
        let Some(key) = key_of(canonical, pipeline) else { return };
        if !self.had(key, stream, letter.id) {
            return;
        }
        let Some(sums) = self.canonical.get(key).and_then(|key| self.sums.get_mut(key)) else { return };
        match row::decode(canonical, pipeline) {
            _ if letter.reason == "cannot_be_judged" => {
                sums.doubt = Some(format!("whether the dead letter {} was applied cannot be known", letter.id));
            }
            Ok(delta) => sums.letters += i128::from(delta.amount),
            Err(_) => sums.doubt = Some(format!("the amount of the dead letter {} cannot be read", letter.id)),
        }
    }

    fn close(self) -> BTreeMap<String, Sums> {
        // By the text that was asked for; several of one row are one.
        let Book { spellings, mut sums, .. } = self;
        spellings
            .into_iter()
            .filter_map(|(key, mut ids)| {
                ids.sort_unstable();
                let name = if ids.contains(&key) { key.clone() } else { ids.swap_remove(0) };
                Some((name, sums.remove(&key)?))
            })
            .collect()
    }
}

/// A number without a fraction, as PostgreSQL writes it.
fn whole(text: &str) -> Option<i128> {
    let (number, fraction) = text.split_once('.').unwrap_or((text, ""));
    fraction.bytes().all(|digit| digit == b'0').then(|| number.parse().ok())?
}

/// The key of an entry whose amount may be anything.
fn key_of<'a>(canonical: Canonical<'a>, pipeline: &Pipeline) -> Option<&'a str> {
    let mut keys = canonical.fields().filter(|(name, _)| *name == pipeline.key_field.as_bytes());
    let (_, key) = keys.next()?;
    std::str::from_utf8(key).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_of_any_type_are_read() {
        assert_eq!((whole("12"), whole("-3.00"), whole("1.5"), whole("NaN")), (Some(12), Some(-3), None, None));
    }

    #[test]
    fn counters_are_named_as_producers_name_them() {
        let fit =
            Fit { keys: vec!["text".into()], values: vec!["bigint".into()], is_grouped: false, is_checked: false };
        let plain = Keys::new(&Pipeline::counters(), &fit);
        assert_eq!((plain.of_counter("counter:a:b"), plain.of_counter("other:a")), (Some("a:b".into()), None));
        let sharded = Keys::new(&Pipeline { shards: 4, ..Pipeline::counters() }, &fit);
        assert_eq!(sharded.of_counter("counter:{3}:a"), Some("a".into()));
        assert_eq!(sharded.of_counter("counter:{0}:a"), None, "another shard's");
        let tagged = Pipeline { stream: "flush:{likes}".into(), counters: "likes".into(), ..Pipeline::counters() };
        let tagged = Keys::new(&tagged, &fit);
        assert_eq!(tagged.of_counter("likes:{likes}:a}:b"), Some("a}:b".into()));
        assert_eq!(tagged.of_counter("counter:{likes}:a"), None, "another pipeline's");
    }
}
