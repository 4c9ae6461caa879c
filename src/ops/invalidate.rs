//! `tidegate invalidate`: drops cached rows, or values of counters, by key or by pattern.
//!
//! Takes keys, a pattern, or a managed pipeline; gives how many there were. Readers that are loading a row do not put it in place any more, and counters
//! with deltas that are not settled stay unless it is said otherwise (nothing is lost either way: they are brought back). It keeps a pace, and an
//! interrupted run goes on with `--from`.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::columns::Page;
use super::context::{Report, managed};
use super::{Context, Exit, Failure};
use crate::client::invalidate::{scan, unlink};
use crate::config::Needs;
use crate::functions::gate;
use crate::functions::{self, Call, Function};
use crate::model::pipeline::ShardKeys;
use crate::retry::Fault;
use crate::valkey::Connection;

/// Where a run stopped is told this often.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How many counters one call drops.
const PER_CALL: usize = 500;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["keys", "pattern", "counters"])))]
pub struct Opts {
    /// Keys, such as `cache:users:{7}`
    pub keys: Vec<String>,
    /// Every key that matches, as KEYS and SCAN do it, such as `cache:users:*`
    #[arg(long, value_name = "PATTERN")]
    pub pattern: Option<String>,
    /// The counters of this managed pipeline
    #[arg(long, value_name = "PIPELINE")]
    pub counters: Option<String>,
    /// With --counters: those with deltas that are not settled, too
    #[arg(long, requires = "counters")]
    pub dirty: bool,
    /// How many keys are looked at in a second
    #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: u64,
    /// Where an earlier run stopped, as it told on stderr
    #[arg(long, value_name = "CURSOR", default_value = "0")]
    pub from: String,
    /// Only count
    #[arg(long)]
    pub dry_run: bool,
}

/// What is dropped, and how.
enum Target {
    /// Any key; cached rows with the leases of their readers.
    Keys,
    /// Counters, with the leases on them.
    Counters(ShardKeys, bool),
}

/// How many keys there were.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Invalidated {
    /// Whether they were only counted.
    pub dry_run: bool,
    /// How many were dropped, or match.
    pub keys: u64,
}

impl Report for Invalidated {
    fn show(&self, page: &mut Page) {
        page.line(match self.dry_run {
            true => format!("{} keys match; nothing was dropped", self.keys),
            false => format!("{} keys were dropped", self.keys),
        });
    }
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::VALKEY)?;
    if opts.from.parse::<u64>().is_err() {
        return Err(Failure::usage("--from is no cursor: write the number that the earlier run told"));
    }
    let address = config.valkey.address()?;
    let mut runs = Vec::new();
    if let Some(pattern) = &opts.pattern {
        // The leases first: what a reader has read before is not put in place behind the cursor.
        if let Some(rows) = pattern.strip_prefix("cache:") {
            runs.push((format!("{LOADS}{rows}"), Target::Keys));
        }
        runs.push((pattern.clone(), Target::Keys));
    }
    if let Some(name) = &opts.counters {
        let otherwise = "what Valkey loses of its counters is lost; write mode = \"managed\" first";
        let pipeline = managed(&config, Some(name), otherwise)?;
        let shards = (0..pipeline.shards.max(1)).map(|shard| pipeline.keys_of(shard));
        runs.extend(shards.map(|keys| (gate::counters(&keys), Target::Counters(keys, opts.dirty))));
    }
    let connection = Connection::open(&address, "tidegate:invalidate").await?;
    functions::load(&connection).await?;
    let named: Vec<Vec<u8>> = opts.keys.iter().map(|key| key.clone().into_bytes()).collect();
    let mut keys = if opts.dry_run { named.len() as u64 } else { drop_keys(&connection, &named).await? };
    let mut from = opts.from.as_str();
    for (pattern, target) in &runs {
        keys += sweep(context, &connection, pattern, target, &opts, from).await?;
        from = "0";
    }
    context.print(&Invalidated { dry_run: opts.dry_run, keys })?;
    Ok(Exit::Ok)
}

/// What the names of the leases of readers begin with; the rest is as in the name of the row.
const LOADS: &str = "tidegate:load:";

/// Looks at all keys, a step at a time, and drops those that match.
async fn sweep(
    context: &Context,
    connection: &Connection,
    pattern: &str,
    target: &Target,
    opts: &Opts,
    from: &str,
) -> Result<u64, Fault> {
    let (mut cursor, mut count, mut told) = (from.to_owned(), 0, Instant::now());
    loop {
        let began = Instant::now();
        let step = scan(connection, &cursor, pattern).await?;
        count += match (opts.dry_run, target) {
            (true, _) if pattern.starts_with(LOADS) => 0,
            (true, _) => step.keys.len() as u64,
            (false, Target::Keys) => drop_keys(connection, &step.keys).await?,
            (false, Target::Counters(keys, is_forced)) => {
                drop_counters(connection, keys, *is_forced, &step.keys).await?
            }
        };
        let Some(next) = step.next else { return Ok(count) };
        cursor = next;
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            context.say(&format!("{count} so far; to go on from here: --from {cursor}"));
        }
        let due = Duration::from_secs_f64(crate::client::invalidate::LOOKED_AT as f64 / opts.rate as f64);
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
    }
}

/// Drops keys of any kind. Of a cached row the lease of its reader goes, too.
async fn drop_keys(connection: &Connection, keys: &[Vec<u8>]) -> Result<u64, Fault> {
    let (mut count, mut others) = (0, Vec::new());
    for key in keys {
        let text = std::str::from_utf8(key).ok();
        let row = text.and_then(|text| text.strip_prefix("cache:").or_else(|| text.strip_prefix(LOADS)));
        match row {
            Some(row) => {
                let call = Call::new(Function::Invalidate, [format!("cache:{row}"), format!("{LOADS}{row}")]);
                count += call.send(connection).await?.int(0).unwrap_or(0).unsigned_abs();
            }
            None => others.push(key.clone()),
        }
    }
    Ok(count + unlink(connection, &others).await?)
}

async fn drop_counters(
    connection: &Connection,
    keys: &ShardKeys,
    is_forced: bool,
    counters: &[Vec<u8>],
) -> Result<u64, Fault> {
    let ids: Vec<&str> = counters.iter().filter_map(|key| keys.id_of(std::str::from_utf8(key).ok()?)).collect();
    let mut count = 0;
    for ids in ids.chunks(PER_CALL) {
        let mut all = vec![keys.index.clone(), keys.state.clone()];
        all.extend(ids.iter().flat_map(|id| [keys.counter(id), keys.lease(id)]));
        let call = Call::new(Function::Drop, all).arg(u8::from(is_forced)).args(ids);
        count += call.send(connection).await?.int(0).unwrap_or(0).unsigned_abs();
    }
    Ok(count)
}
