//! Room: what of a primary's memory cannot be evicted, and how long the rest lasts: the *runway*.
//!
//! Takes a connection and what is to be looked at; gives bytes and rates. While PostgreSQL is away entries pile up and each counter that is touched becomes
//! dirty; when nothing is left that can be evicted, Valkey refuses increments. The runway is how long that takes at the rate of this moment. It only
//! reads, and asks about samples. Fails with what Valkey said; a key that may not be measured counts as one that cannot be evicted.

use std::collections::{BTreeMap, HashMap};

use super::spread::{Known, Spread};
use crate::client::invalidate::scan;
use crate::functions::gate;
use crate::model::entry::EntryId;
use crate::model::pipeline::{Pipeline, ShardKeys};
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Reply, info, unexpected};

/// What one more field of the index takes, as measured on Valkey 8.0 (9.1: 54); a long index is measured itself.
const INDEX_FIELD_BYTES: f64 = 96.0;
/// An index with so many fields is a hash table and tells what a field of it takes.
const LONG_INDEX: u64 = 1_000;
/// What a TTL takes beside the key, which MEMORY USAGE does not count: measured 49 on Valkey 8.0, 32 on 9.1.
const TTL_BYTES: f64 = 40.0;
/// An entry with an id, an amount and a lane, where there is none to be looked at.
const ENTRY_BYTES: f64 = 47.0;
/// What a stream takes beside its packed entries, as measured on Valkey 8.0 and 9.1.
const PACKED_IN: f64 = 1.05;

/// How much is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// How many of the newest entries tell how many counters are touched.
    pub newest: usize,
    /// How many keys are looked at.
    pub keys: usize,
    /// How many keys of each kind are measured.
    pub measured: usize,
}

/// What a server says of its memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// Bytes in use.
    pub used: u64,
    /// `maxmemory`; 0 is no limit.
    pub max: u64,
    /// `maxmemory-policy`.
    pub policy: String,
    /// Keys that were ever evicted.
    pub evicted: u64,
    /// Keys with a TTL.
    pub with_ttl: u64,
    /// All keys.
    pub keys: u64,
}

/// How far a shard has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mark {
    /// Entries that were ever added to its stream.
    pub added: u64,
    /// Counters that cannot be evicted; none where they are not managed.
    pub dirty: u64,
    /// Every entry below it is settled.
    pub frontier: Option<EntryId>,
}

/// What was added to a shard between two marks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Growth {
    /// How far it has come by now.
    pub now: Mark,
    /// Entries that were added.
    pub entries: u64,
    /// And in a second.
    pub per_second: f64,
    /// How many counters they made dirty; none where that cannot be told, for some were made clean meanwhile.
    pub made_dirty: Option<u64>,
}

/// What was seen of one shard.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filled {
    /// Entries in its stream.
    pub entries: u64,
    /// What they take.
    pub stream_bytes: u64,
    /// Counters that cannot be evicted; none where they are not managed.
    pub dirty: u64,
    /// Those of them whose value is not there, as a sample tells.
    pub blind: u64,
    /// What one more entry takes.
    pub entry_bytes: f64,
    /// Entries that are added a second.
    pub rate: f64,
    /// How these entries are spread over counters; over none where they are not managed.
    pub spread: Spread,
    /// What the value of a counter takes that is touched next, those that are absent included.
    pub value_bytes: f64,
    /// What one more field of its index takes.
    pub field_bytes: f64,
}

/// What the keys of one kind take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kind {
    /// How many were looked at.
    pub keys: u64,
    /// How many of them were measured.
    pub measured: u32,
    /// What those take.
    pub bytes: u64,
    /// How many of those have a TTL.
    pub with_ttl: u32,
    /// What these take.
    pub ttl_bytes: u64,
    /// Whether this user may not ask about them.
    pub is_refused: bool,
}

/// What this server says of its memory.
pub async fn memory(connection: &Connection) -> Result<Memory, Fault> {
    let info = connection.call(Command::new("INFO").arg("everything")).await?;
    let text = info.as_text().ok_or_else(|| unexpected("INFO"))?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let number = |name: &str| field(name).and_then(|value| value.parse().ok()).unwrap_or(0);
    let of_keys = |name: &str| -> u64 {
        let lines = text.lines().filter(|line| line.starts_with("db") && line.contains("keys="));
        let value = |line: &str| {
            line.split([':', ','])
                .find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok())
        };
        lines.filter_map(value).sum()
    };
    Ok(Memory {
        used: number("used_memory"),
        max: number("maxmemory"),
        policy: field("maxmemory_policy").unwrap_or_default().to_owned(),
        evicted: number("evicted_keys"),
        with_ttl: of_keys("expires"),
        keys: of_keys("keys"),
    })
}

/// How far a shard has come by now.
pub async fn mark(connection: &Connection, pipeline: &Pipeline, keys: &ShardKeys) -> Result<Mark, Fault> {
    let added = info::stream(connection, &keys.stream).await?.and_then(|stream| stream.added).unwrap_or(0);
    if !pipeline.is_managed() {
        return Ok(Mark { added, ..Mark::default() });
    }
    let standing = gate::standing(connection, keys).await?;
    Ok(Mark { added, dirty: standing.dirty, frontier: standing.frontier })
}

impl Mark {
    /// What was added since an earlier mark, which is so many seconds old.
    pub fn since(self, before: Mark, seconds: f64) -> Growth {
        let entries = self.added.saturating_sub(before.added);
        let is_unsettled = self.frontier.is_some() && self.frontier == before.frontier;
        Growth {
            now: self,
            entries,
            per_second: entries as f64 / seconds.max(0.001),
            made_dirty: self.dirty.checked_sub(before.dirty).filter(|_| is_unsettled),
        }
    }
}

/// Looks at a shard, of which it is known how it grows.
pub async fn filled(
    connection: &Connection,
    pipeline: &Pipeline,
    keys: &ShardKeys,
    growth: Growth,
    extent: Extent,
) -> Result<Filled, Fault> {
    let Some(stream) = info::stream(connection, &keys.stream).await? else { return Ok(Filled::default()) };
    let stream_bytes = usage(connection, keys.stream.as_bytes()).await?.unwrap_or(0);
    let mut seen = Filled {
        entries: stream.length,
        stream_bytes,
        dirty: growth.now.dirty,
        rate: growth.per_second,
        entry_bytes: ENTRY_BYTES,
        field_bytes: INDEX_FIELD_BYTES,
        ..Filled::default()
    };
    if pipeline.is_managed() {
        seen.blind = blind(connection, keys, seen.dirty, extent.measured).await?;
    }
    // One to which nothing is added fills nothing.
    if seen.rate == 0.0 {
        return Ok(seen);
    }
    // Where counters do not matter a few entries tell what one takes.
    let count = if pipeline.is_managed() { extent.newest } else { extent.measured };
    let newest = newest(connection, pipeline, keys, count).await?;
    seen.entry_bytes = newest.entry_bytes.unwrap_or(ENTRY_BYTES);
    if !pipeline.is_managed() {
        return Ok(seen);
    }
    let (mut bytes, mut looked) = (0, 0);
    // What is touched next, and was not before, is like what is touched seldom.
    let seldom = newest.ids.values().min().copied();
    let seldom = newest.ids.iter().filter(|(_, times)| Some(**times) == seldom).map(|(id, _)| id);
    for id in seldom.take(extent.measured) {
        bytes += usage(connection, keys.counter(&String::from_utf8_lossy(id)).as_bytes()).await?.unwrap_or(0);
        looked += 1;
    }
    if seen.dirty >= LONG_INDEX
        && let Some(bytes) = usage(connection, keys.index.as_bytes()).await?
    {
        seen.field_bytes = bytes as f64 / seen.dirty as f64;
    }
    let group = info::group(connection, &keys.stream, &keys.group).await?;
    seen.spread = Spread::of(&Known {
        occurrences: newest.ids.into_values().collect(),
        dirty: seen.dirty,
        unsettled: group.and_then(|group| Some(group.pending + group.undelivered?)),
        latest: growth.made_dirty.map(|made_dirty| (growth.entries, made_dirty)),
    });
    seen.value_bytes = bytes as f64 / f64::from(looked.max(1));
    Ok(seen)
}

/// What the newest entries of a stream tell.
#[derive(Debug, Default)]
struct Newest {
    /// Their counters, each with how many of them.
    ids: HashMap<Vec<u8>, usize>,
    /// What one of them takes in the stream.
    entry_bytes: Option<f64>,
}

/// Answers for each of the newest entries the value of a field, none if it has none or no field is named, and what its values take in the stream, whose entries
/// are packed one behind another. (MEMORY USAGE does not tell: it counts half a kilobyte for each entry that is pending, of which 85 to 95 bytes are true.)
///
/// Nothing else of an entry leaves the server: it may be huge, or kill whoever reads it. After 1 MiB it is enough.
const NEWEST: &str = "
local function packed(value)
    if #value <= 19 and (value == '0' or string.find(value, '^%-?[1-9]%d*$')) then
        local number = tonumber(value)
        if number >= 0 and number <= 127 then return 2 end
        if number >= -4096 and number < 4096 then return 3 end
        if number >= -32768 and number < 32768 then return 4 end
        if number >= -8388608 and number < 8388608 then return 5 end
        if number >= -2147483648 and number < 2147483648 then return 6 end
        return 10
    end
    local head = #value < 64 and 1 or #value < 4096 and 2 or 5
    return head + #value + (head + #value < 128 and 1 or 2)
end
local told, looked, from = {}, 0, '+'
for n = 1, tonumber(ARGV[1]) do
    if looked > 1048576 then break end
    local entry = redis.call('XREVRANGE', KEYS[1], from, '-', 'COUNT', 1)[1]
    if not entry then break end
    from = '(' .. entry[1]
    local bytes, field = 0, ''
    for at = 2, #entry[2], 2 do
        bytes = bytes + packed(entry[2][at])
        if entry[2][at - 1] == ARGV[2] and field == '' then field = string.sub(entry[2][at], 1, 512) end
    end
    looked = looked + bytes
    told[n] = {field, bytes}
end
return told";

/// What an entry takes beside its values, where it has the same fields as the one before: flags, id, and the way back.
const ENTRY_HEAD: u64 = 10;

async fn newest(connection: &Connection, pipeline: &Pipeline, keys: &ShardKeys, count: usize) -> Result<Newest, Fault> {
    let field = if pipeline.is_managed() { pipeline.key_field.as_str() } else { "" };
    let eval = Command::new("EVAL").arg(NEWEST).arg(1).arg(&keys.stream).arg(count).arg(field);
    let entries = connection.call(eval).await?.into_array().ok_or_else(|| unexpected("EVAL"))?;
    let (mut ids, mut bytes, mut seen) = (HashMap::new(), 0, 0);
    for mut entry in entries.filter_map(Reply::into_array) {
        let id = entry.next();
        bytes += ENTRY_HEAD + entry.next().and_then(|bytes| bytes.as_int()?.try_into().ok()).unwrap_or(0u64);
        seen += 1;
        if let Some(id) = id.as_ref().and_then(Reply::as_bytes).filter(|id| !id.is_empty()) {
            *ids.entry(id.to_vec()).or_default() += 1;
        }
    }
    let entry_bytes = (seen > 0).then(|| bytes as f64 / f64::from(seen) * PACKED_IN);
    Ok(Newest { ids, entry_bytes })
}

/// How many of the dirty counters have no value, as some of them tell.
async fn blind(connection: &Connection, keys: &ShardKeys, dirty: u64, sample: usize) -> Result<u64, Fault> {
    if dirty == 0 {
        return Ok(0);
    }
    let page = Command::new("HSCAN").arg(&keys.index).arg(0).arg("COUNT").arg(sample);
    let page = connection.call(page).await?.into_array().and_then(|mut parts| parts.nth(1));
    let page = page.ok_or_else(|| unexpected("HSCAN"))?;
    let ids: Vec<String> = page.strings().step_by(2).map(|id| String::from_utf8_lossy(id).into_owned()).collect();
    if ids.is_empty() {
        return Ok(0);
    }
    let exists = ids.iter().fold(Command::new("EXISTS"), |command, id| command.arg(keys.counter(id)));
    let present = match connection.call(exists).await {
        // Their slot is on its way: a moment later they are together again.
        Err(fault) if fault.is_redirection() || fault.code() == "TRYAGAIN" => return Ok(0),
        present => present?.as_int().unwrap_or(0) as f64,
    };
    Ok(((1.0 - present / ids.len() as f64).max(0.0) * dirty as f64).round() as u64)
}

/// Looks at some keys of this server, sorted by what their names begin with.
pub async fn kinds(
    connection: &Connection,
    pipelines: &[Pipeline],
    extent: Extent,
) -> Result<BTreeMap<String, Kind>, Fault> {
    let prefixes: Vec<&str> = pipelines.iter().map(|pipeline| pipeline.counters.as_str()).collect();
    let (mut kinds, mut cursor, mut looked) = (BTreeMap::<String, Kind>::new(), "0".to_owned(), 0);
    while looked < extent.keys {
        let step = scan(connection, &cursor, "*").await?;
        looked += step.keys.len();
        for key in &step.keys {
            let kind = kinds.entry(kind_of(&String::from_utf8_lossy(key), &prefixes)).or_default();
            kind.keys += 1;
            if kind.measured as usize >= extent.measured || kind.is_refused {
                continue;
            }
            let left = match connection.call(Command::new("PTTL").bytes(key)).await {
                Err(fault) if is_others(&fault) => None,
                left => left?.as_int(),
            };
            // What may not be measured stays where it is, as far as is known.
            let bytes = usage(connection, key).await?;
            kind.is_refused = bytes.is_none();
            kind.measured += 1;
            kind.bytes += bytes.unwrap_or(0);
            if let (Some(0..), Some(bytes)) = (left, bytes) {
                kind.with_ttl += 1;
                kind.ttl_bytes += bytes;
            }
        }
        match step.next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    Ok(kinds)
}

fn kind_of(key: &str, prefixes: &[&str]) -> String {
    match prefixes.iter().find(|prefix| key.strip_prefix(**prefix).is_some_and(|rest| rest.starts_with(':'))) {
        Some(prefix) => format!("{prefix}:*"),
        None if key.starts_with("tidegate:hydrate:") => "leases of counters".into(),
        None if key.starts_with("tidegate:load:") => "leases of rows".into(),
        None => {
            let words = if key.starts_with("cache:") { 2 } else { 1 };
            format!("{}:*", key.split(':').take(words).collect::<Vec<_>>().join(":"))
        }
    }
}

/// The bytes of one key; 0 if it is gone or another server's, none if it may not be measured.
async fn usage(connection: &Connection, key: &[u8]) -> Result<Option<u64>, Fault> {
    match connection.call(Command::new("MEMORY").arg("USAGE").bytes(key).arg("SAMPLES").arg(20)).await {
        Ok(reply) => Ok(Some(reply.as_int().unwrap_or(0).unsigned_abs())),
        Err(fault) if fault.is_redirection() => Ok(Some(0)),
        Err(fault) if is_others(&fault) => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Whether a key is another server's, or nothing that this user may ask about.
fn is_others(fault: &Fault) -> bool {
    fault.is_redirection() || fault.code() == "NOPERM"
}

/// The bytes that can be evicted: each kind of key counts as often as it was met.
pub fn evictable(memory: &Memory, kinds: &BTreeMap<String, Kind>) -> f64 {
    if !memory.policy.starts_with("volatile-") {
        return 0.0;
    }
    let looked: u64 = kinds.values().map(|kind| kind.keys).sum();
    let of = |kind: &Kind| {
        let ttl_bytes = kind.ttl_bytes as f64 + f64::from(kind.with_ttl) * TTL_BYTES;
        kind.keys as f64 * ttl_bytes / f64::from(kind.measured.max(1))
    };
    let bytes = kinds.values().map(of).sum::<f64>() * memory.keys as f64 / looked.max(1) as f64;
    bytes.min(memory.used as f64)
}

/// The bytes that can still be filled: what is free, and what can be evicted.
pub fn left(memory: &Memory, kinds: &BTreeMap<String, Kind>) -> f64 {
    memory.max.saturating_sub(memory.used) as f64 + evictable(memory, kinds)
}

impl Filled {
    /// So many shards like this one, in one.
    pub fn times(self, shards: f64) -> Filled {
        let of = |count: u64| (count as f64 * shards).round() as u64;
        Filled {
            entries: of(self.entries),
            stream_bytes: of(self.stream_bytes),
            dirty: of(self.dirty),
            blind: of(self.blind),
            rate: self.rate * shards,
            spread: self.spread.times(shards),
            ..self
        }
    }

    /// The bytes that are filled so many seconds from now.
    fn after(&self, seconds: f64) -> f64 {
        let added = self.rate * seconds;
        added * self.entry_bytes + self.spread.becomes_dirty(added) * (self.value_bytes + self.field_bytes)
    }
}

/// Seconds until entries and dirty counters fill what is left; none if nothing is added.
pub fn runway(left: f64, shards: &[Filled]) -> Option<f64> {
    let filled = |seconds: f64| -> f64 { shards.iter().map(|shard| shard.after(seconds)).sum() };
    if filled(1.0) <= 0.0 {
        return None;
    }
    let (mut low, mut high) = (0.0, 1.0);
    while filled(high) < left && high < 1e10 {
        high *= 2.0;
    }
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if filled(middle) < left { low = middle } else { high = middle }
    }
    Some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runway_is_longer_where_the_same_counters_are_touched_again() {
        let of = |occurrences| Filled {
            entry_bytes: 44.0,
            rate: 1_000.0,
            value_bytes: 74.0,
            field_bytes: 96.0,
            spread: Spread::of(&Known { occurrences, ..Known::default() }),
            ..Filled::default()
        };
        let hot = runway(1e8, &[of(vec![1_000; 10])]).expect("an end");
        let cold = runway(1e8, &[of(vec![1; 10_000])]).expect("an end");
        assert!((hot - 1e8 / 44_000.0).abs() < 1.0, "{hot}");
        assert!(cold < hot * 0.4, "{cold} {hot}");
        assert_eq!(runway(1e8, &[Filled { rate: 0.0, ..of(vec![1; 10_000]) }]), None);
    }

    #[test]
    fn how_many_counters_became_dirty_is_known_while_nothing_is_settled() {
        let mark = |added, dirty, frontier: Option<u64>| Mark {
            added,
            dirty,
            frontier: frontier.map(|ms| EntryId { ms, seq: 0 }),
        };
        let growth = mark(150, 30, Some(5)).since(mark(50, 10, Some(5)), 2.0);
        assert_eq!((growth.entries, growth.per_second, growth.made_dirty), (100, 50.0, Some(20)));
        let unknown = [
            (mark(150, 30, Some(6)), mark(50, 10, Some(5))),
            (mark(150, 5, Some(5)), mark(50, 10, Some(5))),
            (mark(150, 30, None), mark(50, 10, None)),
        ];
        for (now, before) in unknown {
            assert_eq!(now.since(before, 2.0).made_dirty, None, "{now:?}");
        }
        // Its stream was made anew.
        assert_eq!(mark(7, 0, None).since(mark(50, 0, None), 1.0).entries, 0);
    }

    #[test]
    fn each_kind_of_key_counts_as_often_as_it_was_met() {
        let kind = |keys, bytes, with_ttl: u32| Kind {
            keys,
            measured: 100,
            bytes: bytes * 100,
            with_ttl,
            ttl_bytes: bytes * u64::from(with_ttl),
            is_refused: false,
        };
        let memory = Memory {
            used: 100_000_000,
            max: 120_000_000,
            policy: "volatile-lru".into(),
            keys: 100_000,
            with_ttl: 99_900,
            ..Memory::default()
        };
        // Many small counters and a few large rows; and as many large keys without a TTL.
        let kinds =
            [("counter:*", kind(9_880, 60, 100)), ("cache:x", kind(100, 9_960, 100)), ("y", kind(20, 9_000, 0))];
        let kinds: BTreeMap<String, Kind> = kinds.map(|(name, kind)| (name.to_owned(), kind)).into();
        assert_eq!(evictable(&memory, &kinds), 10.0 * (9_880.0 * 100.0 + 100.0 * 10_000.0));
        assert_eq!(left(&memory, &kinds), 20_000_000.0 + 19_880_000.0);
        let none = Memory { policy: "noeviction".into(), ..memory };
        assert_eq!(left(&none, &kinds), 20_000_000.0);
    }

    #[test]
    fn keys_are_told_apart_by_what_their_names_begin_with() {
        let kind = |key| kind_of(key, &["counter", "views:{1}"]);
        assert_eq!((kind("counter:a:b"), kind("counters:a")), ("counter:*".into(), "counters:*".into()));
        assert_eq!((kind("views:{1}:a"), kind("cache:users:{7}")), ("views:{1}:*".into(), "cache:users:*".into()));
        assert_eq!(kind("tidegate:load:users:{7}"), "leases of rows");
    }
}
