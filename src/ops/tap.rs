//! `tidegate tap`: entries as they go by, a few a second.
//!
//! Takes pipelines; prints entries that are added from now on, or from an id on, as lines. Reads without the group, so nothing is taken from
//! anybody. What comes faster than it may be shown is skipped and counted. Nothing of an entry reaches the terminal unescaped; with --redact no
//! value is shown at all.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::mpsc;

use super::columns::{cut, printable};
use super::complete::{Name, by};
use super::context::{Format, chosen, json};
use super::dead::show::{Bytes, added_at};
use super::observe::Servers;
use super::{Context, Exit, Failure};
use crate::config::Needs;
use crate::flow::rows::Plan;
use crate::model::entry::{Canonical, EntryId, write_canonical};
use crate::model::pipeline::Shard;
use crate::retry::Fault;
use crate::shutdown::Signals;
use crate::valkey::resp::Bounds;
use crate::valkey::{Command, Delivered, Link, info};

/// What is held of one entry, and kept of a larger one.
const BOUNDS: Bounds = Bounds { entry: 64 << 10, kept: 4 << 10 };
/// How long one read waits for an entry.
const BLOCK: Duration = Duration::from_millis(500);
/// How many entries one read asks for at the most.
const READ: u32 = 100;
/// How many characters of a value a line shows.
const SHOWN: usize = 200;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only of these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// So many entries a second at the most; the rest is skipped and counted
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rate: u32,
    /// Show of each value only how long it is
    #[arg(long)]
    pub redact: bool,
    /// Begin behind this id, 0-0 being the stream's start; default: with what is added from now on
    #[arg(long, value_name = "ID")]
    pub after: Option<EntryId>,
    /// Only entries that cannot be applied
    #[arg(long)]
    pub bad: bool,
    /// Stop after so many entries
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
}

/// An entry that went by.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Tapped {
    /// Its stream.
    pub stream: String,
    /// Its id.
    pub id: String,
    /// When it was added, in RFC 3339; null where its id is no time.
    pub added_at: Option<String>,
    /// Why it cannot be applied; null where it can, as far as its bytes alone tell.
    pub bad: Option<String>,
    /// Whether it is shown as far as it was kept: it is large.
    pub shortened: bool,
    /// Entries skipped before it, because they came too fast; 10,001 stands for so many and more.
    pub skipped: u64,
    /// Its fields, in their order.
    pub fields: Vec<TappedField>,
}

/// A field of an entry.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TappedField {
    /// Its name.
    pub name: Bytes,
    /// Its value; null where it was redacted.
    pub value: Option<Bytes>,
    /// How long its value is, in bytes.
    pub bytes: usize,
}

impl Tapped {
    fn line(&self) -> String {
        let mut line = format!("{} {}", printable(&self.stream), self.id);
        for field in &self.fields {
            let name = match &field.name {
                Bytes::Text(text) => printable(text),
                Bytes::Hex(hex) => format!("0x{hex}"),
            };
            let value = match &field.value {
                None => format!("<{} bytes>", field.bytes),
                Some(Bytes::Text(text)) => cut(&printable(text), SHOWN),
                Some(Bytes::Hex(hex)) => cut(&format!("0x{hex}"), SHOWN),
            };
            line.push_str(&format!("  {name}={value}"));
        }
        if self.shortened {
            line.push_str("  (shortened)");
        }
        if let Some(bad) = &self.bad {
            line.push_str(&format!("  CANNOT BE APPLIED: {bad}"));
        }
        if self.skipped > 0 {
            line.push_str(&format!("  ({} skipped before it)", self.skipped));
        }
        line
    }
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let mut servers = Servers::of(&config, "tidegate:tap")?;
    let mut shards = Vec::new();
    for pipeline in chosen(&config, &opts.pipelines)? {
        shards.extend(servers.shards(pipeline).await);
    }
    let (sender, mut tapped) = mpsc::channel(READ as usize);
    let rate = (opts.rate / shards.len().max(1) as u32).max(1);
    let mut taps = tokio::task::JoinSet::new();
    for shard in shards {
        let link = servers.link(&shard.stream).await?;
        let plan = Plan::of(&shard.pipeline).map_err(|no_zone| Failure::new(Exit::Config, no_zone.to_string()))?;
        let tap = Tap { shard, plan, redact: opts.redact, bad: opts.bad, rate, skipped: 0 };
        taps.spawn(tap.run(link, opts.after, sender.clone()));
    }
    drop(sender);
    let mut signals = Signals::listen()?;
    let mut shown = 0;
    while opts.limit.is_none_or(|limit| shown < limit) {
        let next = tokio::select! {
            biased;
            next = tapped.recv() => next,
            // One stream that cannot be read is not passed over because of the others.
            Some(Ok(Err(fault))) = taps.join_next() => return Err(fault.into()),
            _ = signals.next() => return Ok(Exit::Ok),
        };
        let Some(entry) = next else { break };
        shown += 1;
        let line = if context.format == Format::Json { json(&entry)? } else { entry.line() };
        context.write(&format!("{line}\n"))?;
    }
    if opts.limit.is_some_and(|limit| shown >= limit) {
        return Ok(Exit::Ok);
    }
    // All have ended: by a fault.
    while let Some(ended) = taps.join_next().await {
        if let Ok(Err(fault)) = ended {
            return Err(fault.into());
        }
    }
    Ok(Exit::Ok)
}

/// One stream's tap.
struct Tap {
    shard: Shard,
    plan: Plan,
    redact: bool,
    bad: bool,
    rate: u32,
    skipped: u64,
}

impl Tap {
    async fn run(
        mut self,
        link: std::sync::Arc<Link>,
        after: Option<EntryId>,
        out: mpsc::Sender<Tapped>,
    ) -> Result<(), Fault> {
        let (mut wire, _) = link.open_wire("tidegate:tap", BOUNDS).await?;
        let mut at = match after {
            Some(after) => after,
            None => self.end(&link).await?.map_or(EntryId::MIN, |(id, _)| id),
        };
        let (mut window, mut left) = (Instant::now(), self.rate);
        loop {
            let count = left.min(READ);
            let read = Command::new("XREAD").arg("COUNT").arg(count).arg("BLOCK").arg(BLOCK.as_millis());
            wire.send(&read.arg("STREAMS").arg(&self.shard.stream).arg(at));
            let mut got = Vec::new();
            let run = wire.run(BLOCK, |delivered| {
                got.push(self.tapped(&delivered));
                at = delivered.id();
                ControlFlow::Continue(())
            });
            run.await.map_err(|fault| fault.about(&self.shard.stream))?;
            for entry in got.into_iter().filter(|entry| !self.bad || entry.bad.is_some()) {
                left = left.saturating_sub(1);
                let skipped = std::mem::take(&mut self.skipped);
                if out.send(Tapped { skipped, ..entry }).await.is_err() {
                    return Ok(());
                }
            }
            if left == 0 {
                tokio::time::sleep(Duration::from_secs(1).saturating_sub(window.elapsed())).await;
                at = self.skip(&link, at).await?;
            }
            if window.elapsed() >= Duration::from_secs(1) {
                (window, left) = (Instant::now(), self.rate);
            }
        }
    }

    /// The stream's end: its last id, and how many entries were ever added.
    async fn end(&self, link: &Link) -> Result<Option<(EntryId, Option<u64>)>, Fault> {
        let told = info::stream(link.commands(), &self.shard.stream).await?;
        Ok(told.map(|told| (told.last_generated, told.added)))
    }

    /// Goes to a place from which what is shown next second is recent; counts what lies in between.
    async fn skip(&mut self, link: &Link, at: EntryId) -> Result<EntryId, Fault> {
        const SKIP: &str = "
            local found = redis.call('XREVRANGE', KEYS[1], '+', '(' .. ARGV[1], 'COUNT', ARGV[2])
            local last = found[#found]
            if #found < tonumber(ARGV[2]) then return {ARGV[1], 0} end
            local length = #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '(' .. last[1], 'COUNT', 10000)
            return {last[1], length}";
        let eval = Command::new("EVAL").arg(SKIP).arg(1).arg(&self.shard.stream).arg(at).arg(self.rate + 1);
        let reply = link.commands().call(eval).await?;
        let parts: Vec<_> = reply.into_array().map(Iterator::collect).unwrap_or_default();
        let to = parts.first().and_then(|id: &crate::valkey::Reply| id.as_text()?.parse().ok());
        let passed = parts.get(1).and_then(|number| number.as_int()).and_then(|number| u64::try_from(number).ok());
        let to: EntryId = to.unwrap_or(at);
        if to > at {
            // The one that is gone to is passed, too.
            self.skipped += passed.unwrap_or(0) + 1;
        }
        Ok(to)
    }

    fn tapped(&self, delivered: &Delivered<'_>) -> Tapped {
        let mut bytes = Vec::new();
        let (id, shortened) = match delivered {
            Delivered::Whole(id, strings) => {
                write_canonical(&mut bytes, *id, *strings);
                (*id, false)
            }
            Delivered::Shortened(entry) => {
                bytes.extend_from_slice(&entry.canonical);
                (entry.id, true)
            }
        };
        let entry = Canonical(&bytes);
        let bad = match shortened {
            true => None,
            false => self.plan.refusal_of(entry).map(|death| death.detail),
        };
        let field = |(name, value): (&[u8], &[u8])| TappedField {
            name: Bytes::of(name),
            value: (!self.redact).then(|| Bytes::of(value)),
            bytes: value.len(),
        };
        Tapped {
            stream: self.shard.stream.clone(),
            id: id.to_string(),
            added_at: added_at(id),
            bad,
            shortened,
            skipped: 0,
            fields: entry.fields().map(field).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_no_control_character_and_where_it_is_redacted_no_value() {
        let field = |name: &[u8], value: &[u8], redact: bool| TappedField {
            name: Bytes::of(name),
            value: (!redact).then(|| Bytes::of(value)),
            bytes: value.len(),
        };
        let entry = |redact| Tapped {
            stream: "s".into(),
            id: "1-0".into(),
            added_at: None,
            bad: Some("the amount is not a whole decimal number".into()),
            shortened: false,
            skipped: 3,
            fields: vec![field(b"id", b"secret\x1b[2J", redact), field(b"amount", b"\xff", redact)],
        };
        let line = entry(false).line();
        assert!(line.contains("id=secret\\u{1b}[2J  amount=0xff") && !line.chars().any(char::is_control), "{line}");
        let line = entry(true).line();
        assert!(line.contains("id=<10 bytes>  amount=<1 bytes>") && !line.contains("secret"), "{line}");
        assert!(line.ends_with("(3 skipped before it)"), "{line}");
    }
}
