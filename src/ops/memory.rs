//! `tidegate memory`: what fills Valkey, what of it can be evicted, and how long PostgreSQL may stay away.
//!
//! Takes the configured pipelines; gives bytes by kind of key from a sample, the counters that cannot be evicted, what the eviction policy means for them,
//! and the runway ([`room`]) at the rate of this moment, by the entries that were added while the verb ran.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::columns::{Page, printable};
use super::context::Report;
use super::{Context, Exit, Failure};
use crate::care::room::{self, Extent, Filled, Kind, Memory};
use crate::config::{Config, Needs};
use crate::functions;
use crate::model::pipeline::{Pipeline, ShardKeys};
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Endpoint, Home, Links};

/// How many of the newest entries tell how many counters are touched.
const NEWEST: usize = 10_000;
/// How many keys of each kind are measured.
const MEASURED: usize = 200;

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
    /// Bytes in use that cannot be evicted, as a sample tells.
    pub pinned_bytes: u64,
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
    /// Those of them whose value is not there, as a sample tells; null where the pipeline is plain.
    pub blind: Option<u64>,
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
    /// What MEMORY DOCTOR says.
    doctor: String,
    /// Keys evicted a second.
    evictions: f64,
    /// Its streams, each with whether its counters are managed.
    shards: Vec<(String, bool, Filled)>,
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
    let (mut evicted, mut marks) = (BTreeMap::new(), Vec::new());
    for home in address.homes().await? {
        let link = links.at(&home).await?;
        functions::load(link.commands()).await?;
        evicted.insert(home, room::memory(link.commands()).await?.evicted);
    }
    for (pipeline, keys) in &shards {
        let mark = room::mark(links.to_stream(&keys.stream).await?.commands(), pipeline, keys).await?;
        marks.push((mark, Instant::now()));
    }
    tokio::time::sleep(Duration::from_secs(opts.observe)).await;
    let keys = opts.sample.div_ceil(evicted.len().max(1));
    let extent = Extent { newest: NEWEST, keys, measured: MEASURED };
    let mut primaries = BTreeMap::<Home, Primary>::new();
    for ((pipeline, keys), (before, then)) in shards.iter().zip(marks) {
        let link = links.to_stream(&keys.stream).await?;
        let connection = link.commands();
        let growth = room::mark(connection, pipeline, keys).await?.since(before, then.elapsed().as_secs_f64());
        let seen = room::filled(connection, pipeline, keys, growth, extent).await?;
        let primary = primaries.entry(connection.home()).or_default();
        primary.shards.push((keys.stream.clone(), pipeline.is_managed(), seen));
    }
    for (home, evicted) in evicted {
        let link = links.at(&home).await?;
        let primary = primaries.entry(home).or_default();
        primary.memory = room::memory(link.commands()).await?;
        primary.doctor = doctor(link.commands()).await?;
        primary.evictions = primary.memory.evicted.saturating_sub(evicted) as f64 / opts.observe as f64;
        primary.kinds = room::kinds(link.commands(), &config.pipelines, extent).await?;
    }
    Ok(primaries)
}

impl PrimaryMemory {
    fn of(home: &Home, primary: &Primary) -> PrimaryMemory {
        let Primary { memory, doctor, evictions, shards: seen, kinds } = primary;
        let shards: Vec<Filled> = seen.iter().map(|(.., shard)| shard.clone()).collect();
        let runway = room::runway(room::left(memory, kinds), &shards).filter(|_| memory.max > 0);
        let kind = |(kind, of): (&String, &Kind)| KindOfKeys {
            kind: kind.clone(),
            keys: of.keys,
            bytes_each: (of.bytes as f64 / f64::from(of.measured.max(1))).round() as u64,
        };
        let stream = |(stream, is_managed, shard): &(String, bool, Filled)| StreamMemory {
            stream: stream.clone(),
            entries: shard.entries,
            bytes: shard.stream_bytes,
            per_second: shard.rate,
            dirty: is_managed.then_some(shard.dirty),
            blind: is_managed.then_some(shard.blind),
        };
        PrimaryMemory {
            primary: home.is_of_cluster().then(|| home.to_string()),
            used_bytes: memory.used,
            max_bytes: (memory.max > 0).then_some(memory.max),
            pinned_bytes: memory.used.saturating_sub(room::evictable(memory, kinds) as u64),
            keys: memory.keys,
            keys_with_ttl: memory.with_ttl,
            evictions_per_second: *evictions,
            policy: memory.policy.clone(),
            policy_advice: policy_advice(&memory.policy),
            doctor: doctor.clone(),
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
            "memory         {} of {limit}, {} of it cannot be evicted; {} keys, {} with a TTL",
            size(self.used_bytes as f64),
            size(self.pinned_bytes as f64),
            self.keys,
            self.keys_with_ttl
        ));
        page.line(format!("evictions      {:.0} /s", self.evictions_per_second));
        page.line(format!("policy         {}: {}", self.policy, self.policy_advice));
        page.line(format!("MEMORY DOCTOR  {}", printable(&self.doctor)));
        for KindOfKeys { kind, keys, bytes_each } in &self.kinds {
            page.line(format!("  {:<24} {keys:>8} of the keys looked at, {bytes_each} bytes each", printable(kind)));
        }
        for StreamMemory { stream, entries, bytes, per_second, dirty, blind } in &self.streams {
            let dirty =
                dirty.zip(*blind).map(|(dirty, blind)| format!(", {dirty} counters dirty, {blind} of them absent"));
            let dirty = dirty.unwrap_or_default();
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

/// What MEMORY DOCTOR says, or why it may not be asked.
async fn doctor(connection: &Connection) -> Result<String, Fault> {
    match connection.call(Command::new("MEMORY").arg("DOCTOR")).await {
        Ok(reply) => Ok(reply.as_text().unwrap_or_default().lines().next().unwrap_or_default().to_owned()),
        // Without the right to ask, or on a server that does not know it.
        Err(Fault::Valkey { message, .. }) => Ok(message),
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
