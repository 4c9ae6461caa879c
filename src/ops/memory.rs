//! `tidegate memory`: what fills Valkey, what of it can be evicted, and how long PostgreSQL may stay away.
//!
//! Takes the configured pipelines; gives bytes by kind of key from a sample, the counters that cannot be evicted, what the eviction policy means for them,
//! and the *runway*: while PostgreSQL is away entries pile up and each counter that is touched becomes dirty; when nothing is left that can be evicted,
//! Valkey refuses increments. The runway is how long that takes at the rate of this moment, by the entries that were added while the verb ran.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::time::Duration;

use serde::Serialize;

use super::columns::{Page, printable};
use super::context::Report;
use super::{Context, Exit, Failure};
use crate::client::invalidate::scan;
use crate::config::{Config, Needs};
use crate::functions;
use crate::functions::gate;
use crate::model::entry::EntryId;
use crate::model::pipeline::{Pipeline, ShardKeys};
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Endpoint, Home, Links, info, unexpected};

/// How many of the newest entries tell how many counters are touched.
const NEWEST: usize = 2_000;
/// How many keys of each kind are measured.
const MEASURED: usize = 200;
/// What one more field of the index takes, as measured on Valkey 8.0 and 9.1.
const INDEX_FIELD_BYTES: f64 = 96.0;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// For how many seconds the rate is observed
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub observe: u64,
    /// How many keys are looked at
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub sample: usize,
}

/// What a server says of its memory.
#[derive(Debug, Clone, Default)]
struct Memory {
    used: u64,
    max: u64,
    policy: String,
    evicted: u64,
    /// Keys with a TTL, and all keys.
    with_ttl: u64,
    keys: u64,
    advice: String,
}

/// What was seen of one shard.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Shard {
    entries: u64,
    stream_bytes: u64,
    dirty: u64,
    /// Entries a second.
    rate: f64,
    /// How many counters these entries are spread over, as far as the newest ones tell.
    spread: f64,
    /// What a counter's value takes.
    value_bytes: f64,
}

/// What fills Valkey.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MemoryReport {
    /// Each primary by itself: one, or those of a cluster.
    pub primaries: Vec<PrimaryMemory>,
}

/// What fills one primary.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PrimaryMemory {
    /// Where it is, in a cluster; else null.
    pub primary: Option<String>,
    /// Bytes in use.
    pub used_bytes: u64,
    /// `maxmemory`; null where there is no limit.
    pub max_bytes: Option<u64>,
    /// How many keys there are.
    pub keys: u64,
    /// How many of them have a TTL.
    pub keys_with_ttl: u64,
    /// Keys evicted a second while this ran.
    pub evictions_per_second: f64,
    /// `maxmemory-policy`.
    pub policy: String,
    /// What that means for counters and streams.
    pub policy_advice: &'static str,
    /// What MEMORY DOCTOR says, or why it may not be asked.
    pub doctor: String,
    /// The keys that were looked at, by kind.
    pub kinds: Vec<KindOfKeys>,
    /// The streams.
    pub streams: Vec<StreamMemory>,
    /// How long PostgreSQL may stay away at the rate of this moment, in seconds; null where there is no limit, or nothing was added.
    pub runway_seconds: Option<u64>,
}

/// Keys of one kind.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct KindOfKeys {
    /// What their names begin with.
    pub kind: String,
    /// How many of those looked at are of this kind.
    pub keys: u64,
    /// What each takes, in bytes, on average.
    pub bytes_each: u64,
}

/// A stream, as far as memory goes.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StreamMemory {
    /// Its key.
    pub stream: String,
    /// Entries in it.
    pub entries: u64,
    /// What they take, in bytes.
    pub bytes: u64,
    /// Entries added a second while this ran.
    pub per_second: f64,
    /// Counters that cannot be evicted; null where the pipeline is plain.
    pub dirty: Option<u64>,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::VALKEY)?;
    let primaries = observe(&config, &config.valkey.address()?, &opts).await?;
    let primaries = primaries.iter().map(|(home, primary)| PrimaryMemory::of(home, primary)).collect();
    context.print(&MemoryReport { primaries })?;
    Ok(Exit::Ok)
}

/// What was seen of one primary; each fills by itself.
#[derive(Debug, Default)]
struct Primary {
    memory: Memory,
    /// Keys evicted a second.
    evictions: f64,
    /// Its streams, each with whether its counters are managed.
    shards: Vec<(String, bool, Shard)>,
    kinds: BTreeMap<String, Kind>,
}

/// Looks at every primary twice, `opts.observe` apart.
async fn observe(config: &Config, address: &Endpoint, opts: &Opts) -> Result<BTreeMap<Home, Primary>, Fault> {
    let mut links = Links::to(address, "tidegate:memory");
    let shards: Vec<(&Pipeline, ShardKeys)> = config
        .pipelines
        .iter()
        .flat_map(|pipeline| (0..pipeline.shards.max(1)).map(move |shard| (pipeline, pipeline.keys_of(shard))))
        .collect();
    let (mut evicted, mut added) = (BTreeMap::new(), Vec::new());
    for home in address.homes().await? {
        let link = links.at(&home).await?;
        functions::load(link.commands()).await?;
        evicted.insert(home, memory(link.commands()).await?.evicted);
    }
    for (_, keys) in &shards {
        added.push(added_to(links.to_stream(&keys.stream).await?.commands(), keys).await?);
    }
    tokio::time::sleep(Duration::from_secs(opts.observe)).await;
    let mut primaries = BTreeMap::<Home, Primary>::new();
    for ((pipeline, keys), before) in shards.iter().zip(added) {
        let link = links.to_stream(&keys.stream).await?;
        let connection = link.commands();
        let rate = added_to(connection, keys).await?.saturating_sub(before) as f64 / opts.observe as f64;
        let seen = shard(connection, pipeline, keys, rate).await?;
        let primary = primaries.entry(connection.home()).or_default();
        primary.shards.push((keys.stream.clone(), pipeline.is_managed(), seen));
    }
    let sample = opts.sample.div_ceil(evicted.len().max(1));
    for (home, evicted) in evicted {
        let link = links.at(&home).await?;
        let primary = primaries.entry(home).or_default();
        primary.memory = memory(link.commands()).await?;
        primary.evictions = primary.memory.evicted.saturating_sub(evicted) as f64 / opts.observe as f64;
        primary.kinds = kinds(link.commands(), config, sample).await?;
    }
    Ok(primaries)
}

impl PrimaryMemory {
    fn of(home: &Home, primary: &Primary) -> PrimaryMemory {
        let Primary { memory, evictions, shards: seen, kinds } = primary;
        let shards: Vec<Shard> = seen.iter().map(|(.., shard)| *shard).collect();
        let runway = runway(memory_left(memory, kinds), &shards).filter(|_| memory.max > 0);
        let kind = |(kind, of): (&String, &Kind)| KindOfKeys {
            kind: kind.clone(),
            keys: of.keys,
            bytes_each: (of.bytes as f64 / f64::from(of.measured.max(1))).round() as u64,
        };
        let stream = |(stream, is_managed, shard): &(String, bool, Shard)| StreamMemory {
            stream: stream.clone(),
            entries: shard.entries,
            bytes: shard.stream_bytes,
            per_second: shard.rate,
            dirty: is_managed.then_some(shard.dirty),
        };
        PrimaryMemory {
            primary: home.is_of_cluster().then(|| home.to_string()),
            used_bytes: memory.used,
            max_bytes: (memory.max > 0).then_some(memory.max),
            keys: memory.keys,
            keys_with_ttl: memory.with_ttl,
            evictions_per_second: *evictions,
            policy: memory.policy.clone(),
            policy_advice: policy_advice(&memory.policy),
            doctor: memory.advice.clone(),
            kinds: kinds.iter().map(kind).collect(),
            streams: seen.iter().map(stream).collect(),
            runway_seconds: runway.map(|seconds| seconds as u64),
        }
    }
}

impl Report for MemoryReport {
    fn show(&self, page: &mut Page) {
        self.primaries.iter().for_each(|primary| primary.show(page));
    }
}

impl PrimaryMemory {
    fn show(&self, page: &mut Page) {
        if let Some(primary) = &self.primary {
            page.line(format!("primary {primary}"));
        }
        let limit = self.max_bytes.map_or_else(|| "no limit".to_owned(), |max| size(max as f64));
        page.line(format!(
            "memory         {} of {limit}, {} keys, {} with a TTL",
            size(self.used_bytes as f64),
            self.keys,
            self.keys_with_ttl
        ));
        page.line(format!("evictions      {:.0} /s", self.evictions_per_second));
        page.line(format!("policy         {}: {}", self.policy, self.policy_advice));
        page.line(format!("MEMORY DOCTOR  {}", printable(&self.doctor)));
        for KindOfKeys { kind, keys, bytes_each } in &self.kinds {
            page.line(format!("  {:<24} {keys:>8} of the keys looked at, {bytes_each} bytes each", printable(kind)));
        }
        for StreamMemory { stream, entries, bytes, per_second, dirty } in &self.streams {
            let dirty = dirty.map(|dirty| format!(", {dirty} counters dirty")).unwrap_or_default();
            page.line(format!("{stream}: {entries} entries in {}, {per_second:.0} /s{dirty}", size(*bytes as f64)));
        }
        page.line(match (self.max_bytes, self.runway_seconds) {
            (None, _) => "runway         maxmemory is not set: until the machine has no memory left".to_owned(),
            (Some(_), None) => "runway         without an end: nothing was added while this ran".to_owned(),
            (Some(_), Some(seconds)) => format!(
                "runway         PostgreSQL may stay away for {}, at this rate",
                humantime::format_duration(Duration::from_secs(seconds))
            ),
        });
    }
}

/// What each eviction policy means for counters and streams.
fn policy_advice(policy: &str) -> &'static str {
    match policy {
        "noeviction" => {
            "nothing is evicted; clean counters leave when their TTL ends. With volatile-lru or volatile-lfu they make room when memory is full"
        }
        "volatile-lru" => {
            "clean counters and cached rows that were not used for long make room; streams and dirty counters stay. maxmemory-samples 10 finds the right ones more often"
        }
        "volatile-lfu" => {
            "clean counters and cached rows that are used seldom make room; streams and dirty counters stay. Best where a few are hot for long: lfu-decay-time (1: minutes until a use counts half) shorter where what is hot changes by the hour, lfu-log-factor (10) higher where the hottest have millions of uses; maxmemory-samples 10"
        }
        "volatile-ttl" => {
            "what would expire soonest makes room; streams and dirty counters stay. Clean counters that were settled long ago go first, also hot ones that are only read"
        }
        "volatile-random" => {
            "any clean counter or cached row makes room, hot ones too; streams and dirty counters stay. volatile-lfu keeps the hot ones"
        }
        "allkeys-lru" | "allkeys-lfu" | "allkeys-random" => {
            "ANY key may be evicted, the streams with increments that are not flushed among them: set noeviction or a volatile-* policy"
        }
        _ => "unknown to this version: make sure that keys without a TTL are never evicted",
    }
}

/// What can still be filled: what is free, and what can be evicted.
fn memory_left(memory: &Memory, kinds: &BTreeMap<String, Kind>) -> f64 {
    let free = memory.max.saturating_sub(memory.used) as f64;
    if !memory.policy.starts_with("volatile-") {
        return free;
    }
    let (bytes, measured) =
        kinds.values().fold((0, 0), |sum, kind| (sum.0 + kind.ttl_bytes, sum.1 + kind.ttl_measured));
    free + memory.with_ttl as f64 * bytes as f64 / f64::from(measured.max(1))
}

/// Seconds until entries and dirty counters fill what is left; none if nothing is added.
fn runway(left: f64, shards: &[Shard]) -> Option<f64> {
    let filled = |seconds: f64| -> f64 {
        let of = |shard: &Shard| {
            let entry_bytes = shard.stream_bytes as f64 / shard.entries.max(1) as f64;
            let touched = if shard.spread > 0.0 {
                shard.spread * (1.0 - (-shard.rate * seconds / shard.spread).exp())
            } else {
                0.0
            };
            shard.rate * seconds * entry_bytes + touched * (shard.value_bytes + INDEX_FIELD_BYTES)
        };
        shards.iter().map(of).sum()
    };
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

/// Over how many counters entries are spread, if `distinct` of `count` were: as many as would give that by equal chances.
fn spread(count: usize, distinct: usize) -> f64 {
    if distinct == 0 {
        return 0.0;
    }
    let (mut low, mut high) = (distinct as f64, 1e9);
    for _ in 0..80 {
        let middle = (low + high) / 2.0;
        let expected = middle * (1.0 - (-(count as f64) / middle).exp());
        if expected < distinct as f64 { low = middle } else { high = middle }
    }
    low
}

async fn memory(connection: &Connection) -> Result<Memory, Fault> {
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
    let advice = match connection.call(Command::new("MEMORY").arg("DOCTOR")).await {
        Ok(reply) => reply.as_text().unwrap_or_default().lines().next().unwrap_or_default().to_owned(),
        // Without the right to ask, or on a server that does not know it.
        Err(Fault::Valkey { message, .. }) => message,
        Err(fault) => return Err(fault),
    };
    Ok(Memory {
        used: number("used_memory"),
        max: number("maxmemory"),
        policy: field("maxmemory_policy").unwrap_or_default().to_owned(),
        evicted: number("evicted_keys"),
        with_ttl: of_keys("expires"),
        keys: of_keys("keys"),
        advice,
    })
}

async fn added_to(connection: &Connection, keys: &ShardKeys) -> Result<u64, Fault> {
    Ok(info::stream(connection, &keys.stream).await?.and_then(|stream| stream.added).unwrap_or(0))
}

async fn shard(connection: &Connection, pipeline: &Pipeline, keys: &ShardKeys, rate: f64) -> Result<Shard, Fault> {
    let Some(stream) = info::stream(connection, &keys.stream).await? else { return Ok(Shard::default()) };
    let newest =
        Command::new("XREVRANGE").arg(&keys.stream).arg(EntryId::MAX).arg(EntryId::MIN).arg("COUNT").arg(NEWEST);
    let entries = connection.call(newest).await?.into_array().ok_or_else(|| unexpected("XREVRANGE"))?;
    let (mut ids, mut count) = (HashSet::new(), 0);
    for fields in entries.filter_map(|entry| entry.into_array()?.nth(1)) {
        let strings: Vec<&[u8]> = fields.strings().collect();
        let pair = strings.as_chunks::<2>().0.iter().find(|[name, _]| *name == pipeline.key_field.as_bytes());
        if let Some([_, id]) = pair {
            ids.insert(id.to_vec());
            count += 1;
        }
    }
    let mut value_bytes = (0, 0);
    for id in ids.iter().take(MEASURED) {
        let bytes = usage(connection, keys.counter(&String::from_utf8_lossy(id)).as_bytes()).await?;
        value_bytes = (value_bytes.0 + bytes, value_bytes.1 + u64::from(bytes > 0));
    }
    let dirty = if pipeline.is_managed() { gate::standing(connection, keys).await?.dirty } else { 0 };
    Ok(Shard {
        entries: stream.length,
        stream_bytes: usage(connection, keys.stream.as_bytes()).await?,
        dirty,
        rate,
        spread: if pipeline.is_managed() { spread(count, ids.len()) - dirty as f64 } else { 0.0 }.max(0.0),
        value_bytes: value_bytes.0 as f64 / value_bytes.1.max(1) as f64,
    })
}

/// What the keys of one kind take.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    keys: u64,
    measured: u32,
    bytes: u64,
    ttl_measured: u32,
    ttl_bytes: u64,
}

async fn kinds(connection: &Connection, config: &Config, sample: usize) -> Result<BTreeMap<String, Kind>, Fault> {
    let prefixes: Vec<&str> = config.pipelines.iter().map(|pipeline| pipeline.counters.as_str()).collect();
    let (mut kinds, mut cursor, mut looked) = (BTreeMap::<String, Kind>::new(), "0".to_owned(), 0);
    while looked < sample {
        let step = scan(connection, &cursor, "*").await?;
        looked += step.keys.len();
        for key in &step.keys {
            let text = String::from_utf8_lossy(key);
            let of_counters = prefixes.iter().find(|prefix| text.starts_with(&format!("{prefix}:")));
            let name = match of_counters {
                Some(prefix) => format!("{prefix}:*"),
                None if text.starts_with("tidegate:hydrate:") => "leases of counters".into(),
                None if text.starts_with("tidegate:load:") => "leases of rows".into(),
                None => format!(
                    "{}:*",
                    text.split(':').take(if text.starts_with("cache:") { 2 } else { 1 }).collect::<Vec<_>>().join(":")
                ),
            };
            let kind = kinds.entry(name).or_default();
            kind.keys += 1;
            if (kind.measured as usize) < MEASURED {
                let bytes = usage(connection, key).await?;
                let left = match connection.call(Command::new("PTTL").bytes(key)).await {
                    Err(fault) if fault.is_redirection() => None,
                    left => left?.as_int(),
                };
                kind.measured += 1;
                kind.bytes += bytes;
                if left >= Some(0) {
                    kind.ttl_measured += 1;
                    kind.ttl_bytes += bytes;
                }
            }
        }
        match step.next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    Ok(kinds)
}

/// The bytes of one key; 0 if it is gone.
async fn usage(connection: &Connection, key: &[u8]) -> Result<u64, Fault> {
    match connection.call(Command::new("MEMORY").arg("USAGE").bytes(key).arg("SAMPLES").arg(20)).await {
        Ok(reply) => Ok(reply.as_int().unwrap_or(0).unsigned_abs()),
        // Its slot is another primary's, or on its way there.
        Err(fault) if fault.is_redirection() => Ok(0),
        Err(fault) => Err(fault),
    }
}

fn size(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    for unit in units {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} PiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runway_is_longer_where_the_same_counters_are_touched_again() {
        let shard = Shard { entries: 100, stream_bytes: 4_400, rate: 1_000.0, value_bytes: 74.0, ..Shard::default() };
        let hot = runway(1e8, &[Shard { spread: 10.0, ..shard }]).expect("an end");
        let cold = runway(1e8, &[Shard { spread: 1e6, ..shard }]).expect("an end");
        assert!((hot - 1e8 / 44_000.0).abs() < 1.0, "{hot}");
        assert!(cold < hot * 0.4, "{cold} {hot}");
        assert_eq!(runway(1e8, &[Shard { rate: 0.0, ..shard }]), None);
    }

    #[test]
    fn the_spread_of_a_sample_is_estimated() {
        assert!((spread(2_000, 2_000 - 2) - 1e6).abs() < 4e5, "{}", spread(2_000, 1_998));
        assert!((spread(2_000, 100) - 100.0).abs() < 1.0);
        assert_eq!(spread(0, 0), 0.0);
    }

    #[test]
    fn every_eviction_policy_has_its_advice() {
        for policy in [
            "noeviction",
            "volatile-lru",
            "volatile-lfu",
            "volatile-ttl",
            "volatile-random",
            "allkeys-lru",
            "allkeys-lfu",
            "allkeys-random",
        ] {
            assert!(!policy_advice(policy).starts_with("unknown"), "{policy}");
            assert_eq!(policy_advice(policy).starts_with("ANY"), policy.starts_with("allkeys-"));
        }
    }
}
