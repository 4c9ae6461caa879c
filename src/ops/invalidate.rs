//! `tidegate invalidate`: drops cached rows, or values of counters, by key or by pattern.
//!
//! Takes keys, a pattern, or a managed pipeline; gives how many there were. Readers that are loading a row do not put it in place any more, and counters
//! with deltas that are not settled stay unless it is said otherwise (nothing is lost either way: they are brought back). It keeps a pace, and an
//! interrupted run goes on with `--from`.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::columns::Page;
use super::complete::{Name, by};
use super::context::{Report, managed};
use super::{Context, Exit, Failure};
use crate::client::invalidate::{scan, unlink};
use crate::config::Needs;
use crate::functions::gate;
use crate::functions::{Call, Function};
use crate::model::pipeline::ShardKeys;
use crate::retry::Fault;
use crate::valkey::{Connection, Home, Link, Links};

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
    #[arg(long, value_name = "PIPELINE", add = by(Name::ManagedPipeline))]
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
    let Some(start) = Start::parse(&opts.from) else {
        return Err(Failure::usage("--from is no cursor: write what the earlier run told"));
    };
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
    let mut links = Links::to(&address, "tidegate:invalidate");
    let named: Vec<Vec<u8>> = opts.keys.iter().map(|key| key.clone().into_bytes()).collect();
    let mut keys = if opts.dry_run { named.len() as u64 } else { drop_keys(&mut links, None, &named).await? };
    let (before, mut is_first) = (address.layout().await?, true);
    for (pattern, target) in &runs {
        let homes = match target {
            // In a cluster any primary may have some that match.
            Target::Keys => address.homes().await?,
            Target::Counters(keys, _) => vec![links.to_stream(&keys.stream).await?.commands().home()],
        };
        for home in &homes {
            let from = if is_first { start.at(home) } else { "0" };
            keys += sweep(context, &mut links, home, pattern, target, &opts, from).await?;
        }
        is_first = false;
    }
    context.print(&Invalidated { dry_run: opts.dry_run, keys })?;
    if !runs.is_empty() && !opts.dry_run && address.layout().await? != before {
        let words = "slots moved while keys were looked at, so that some may have been missed: run it again";
        return Err(Failure::new(Exit::Retry, words));
    }
    Ok(Exit::Ok)
}

/// What the names of the leases of readers begin with; the rest is as in the name of the row.
const LOADS: &str = "tidegate:load:";

/// Where an earlier run stopped: a cursor, which in a cluster is one server's.
struct Start {
    cursor: String,
    home: Option<String>,
}

impl Start {
    fn parse(text: &str) -> Option<Start> {
        let (cursor, home) =
            text.split_once('@').map_or((text, None), |(cursor, home)| (cursor, Some(home.to_owned())));
        cursor.parse::<u64>().ok()?;
        Some(Start { cursor: cursor.to_owned(), home })
    }

    /// Where to begin on this server: what other servers have is looked at again.
    fn at(&self, home: &Home) -> &str {
        if self.home.as_deref().unwrap_or_default() == home.to_string() { &self.cursor } else { "0" }
    }

    /// As it is told.
    fn told(cursor: &str, home: &Home) -> String {
        if home.is_of_cluster() { format!("{cursor}@{home}") } else { cursor.to_owned() }
    }
}

/// Looks at all keys of a server, a step at a time, and drops those that match.
async fn sweep(
    context: &Context,
    links: &mut Links,
    home: &Home,
    pattern: &str,
    target: &Target,
    opts: &Opts,
    from: &str,
) -> Result<u64, Fault> {
    let (mut cursor, mut count, mut told) = (from.to_owned(), 0, Instant::now());
    loop {
        let began = Instant::now();
        let step = scan(links.at(home).await?.commands(), &cursor, pattern).await?;
        count += match (opts.dry_run, target) {
            (true, _) if pattern.starts_with(LOADS) => 0,
            (true, _) => step.keys.len() as u64,
            (false, Target::Keys) => drop_keys(links, Some(home), &step.keys).await?,
            (false, Target::Counters(keys, is_forced)) => {
                drop_counters(links.at(home).await?.commands(), keys, *is_forced, &step.keys).await?
            }
        };
        let Some(next) = step.next else { return Ok(count) };
        cursor = next;
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let from = Start::told(&cursor, home);
            context.say(&format!("{count} so far; to go on from here: --from {from}"));
        }
        let due = Duration::from_secs_f64(crate::client::invalidate::LOOKED_AT as f64 / opts.rate as f64);
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
    }
}

/// Drops keys of any kind. Of a cached row the lease of its reader goes, too. `home`: where they were found; in a cluster they are followed from there.
async fn drop_keys(links: &mut Links, home: Option<&Home>, keys: &[Vec<u8>]) -> Result<u64, Fault> {
    let (mut count, mut others) = (0, Vec::new());
    for key in keys {
        let text = std::str::from_utf8(key).ok();
        let row = text.and_then(|text| text.strip_prefix("cache:").or_else(|| text.strip_prefix(LOADS)));
        match row {
            Some(row) => {
                let key = format!("cache:{row}");
                let call = Call::new(Function::Invalidate, [key.clone(), format!("{LOADS}{row}")]);
                let send = async |link: &Link| call.clone().send_surely(link.commands()).await;
                count += links.look(&key, send).await?.int(0).unwrap_or(0).unsigned_abs();
            }
            None => others.push(key.clone()),
        }
    }
    match home {
        Some(home) if !home.is_of_cluster() => {
            count += unlink(links.at(home).await?.commands(), &others).await?;
        }
        _ => {
            for key in others {
                let one = std::slice::from_ref(&key);
                count += match (std::str::from_utf8(&key), home) {
                    (Ok(text), _) => links.look(text, async |link: &Link| unlink(link.commands(), one).await).await?,
                    (Err(_), Some(home)) => unlink(links.at(home).await?.commands(), one).await?,
                    // Keys on the command line are text.
                    (Err(_), None) => 0,
                };
            }
        }
    }
    Ok(count)
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
        count += call.send_surely(connection).await?.int(0).unwrap_or(0).unsigned_abs();
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_one_servers_and_nothing_else_is_taken_for_one() {
        let alone = Home::default();
        assert_eq!(Start::parse("7").map(|start| start.at(&alone).to_owned()).as_deref(), Some("7"));
        assert_eq!(Start::parse("7@10.0.0.1:6379").map(|start| start.at(&alone).to_owned()).as_deref(), Some("0"));
        assert_eq!(Start::told("7", &alone), "7");
        for no_cursor in ["", "x", "-1", "@a:1", "x@a:1"] {
            assert!(Start::parse(no_cursor).is_none(), "{no_cursor:?}");
        }
    }
}
