//! `tidegate counter show ID`: what a counter is, and how that comes about.
//!
//! Takes an id; gives its value in Valkey, its row in PostgreSQL, and the deltas that are not flushed yet, as one sum. It ends with 3 where the sum does not
//! come out. Read while producers add: it looks again until nothing has changed meanwhile.

use serde::Serialize;

use super::columns::{Page, Tone, printable};
use super::complete::{Name, by};
use super::context::{Report, one_of_counters};
use super::{Context, Exit, Failure};
use crate::client::postgres;
use crate::client::truth::{Truth, TruthError, View};
use crate::config::Needs;
use crate::model::entry::EntryId;
use crate::model::pipeline::{Pipeline, ShardKeys};
use crate::model::shard::shard_of;
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Link, Reply, info, unexpected};

/// Entries read in one step.
const STEP: usize = 1_000;
/// How often it looks again where the counter changes meanwhile.
const TRIES: usize = 20;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum What {
    /// Show a counter's value, its row, and what is on its way between them
    Show {
        /// The key of the row
        id: String,
        /// The pipeline; may be left out where there is only one
        #[arg(long, value_name = "NAME", add = by(Name::CounterPipeline))]
        pipeline: Option<String>,
    },
}

/// Why it could not be told.
enum Failed {
    Valkey(Fault),
    Postgres(TruthError),
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Failed {
        Failed::Valkey(fault)
    }
}

impl From<TruthError> for Failed {
    fn from(error: TruthError) -> Failed {
        Failed::Postgres(error)
    }
}

impl From<Failed> for Failure {
    fn from(failed: Failed) -> Failure {
        match failed {
            Failed::Valkey(fault) => fault.into(),
            Failed::Postgres(error) => error.0.into(),
        }
    }
}

/// A counter, and how its value comes about. Numbers are text: they may have more than 53 bits.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Counter {
    /// The pipeline.
    pub pipeline: String,
    /// The key of the row.
    pub id: String,
    /// `absent`, `in_doubt` (absent, with deltas that are not known to be settled), `dirty`, `clean`, or `plain` where its producers keep it.
    pub state: &'static str,
    /// The last entry that is not known to be settled; null where there is none.
    pub dirty_up_to: Option<String>,
    /// Milliseconds until a clean value expires; null where it does not.
    pub expires_ms: Option<i64>,
    /// For how many more milliseconds somebody may be bringing it back; null where nobody is.
    pub lease_ms: Option<i64>,
    /// Its row in PostgreSQL; 0 where there is none.
    pub postgres: String,
    /// The sum of what is not flushed yet.
    pub unflushed: String,
    /// In how many entries.
    pub unflushed_entries: u64,
    /// The two together: what it is.
    pub together: String,
    /// Its value in Valkey; null where there is none.
    pub valkey: Option<String>,
    /// Whether Valkey, where it has a value, has the right one.
    pub agrees: bool,
}

/// What is known of a counter at one moment.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    value: Option<String>,
    left_ms: Option<i64>,
    last: Option<String>,
    lease_ms: Option<i64>,
    row: i64,
    unflushed: Vec<(EntryId, i64)>,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let What::Show { id, pipeline } = &opts.what;
    let pipeline = one_of_counters(&config, pipeline.as_deref())?;
    let valkey = config.valkey.address()?;
    let truth = postgres::Database::new(config.postgres.address()?, &config.valkey.source, pipeline, 1);
    let looked = async {
        let stream = pipeline.stream_of(shard_of(id, pipeline.shards));
        let link = Link::open(&valkey.of_stream(&stream), "tidegate:counter").await?;
        let connection = link.commands();
        let mut known = look(connection, &truth, pipeline, id).await?;
        for _ in 1..TRIES {
            if known.is_ok() {
                break;
            }
            known = look(connection, &truth, pipeline, id).await?;
        }
        Ok::<_, Failed>(known)
    };
    let looked = looked.await?;
    let is_stable = looked.is_ok();
    let (Ok(known) | Err(known)) = looked;
    let counter = Counter::of(pipeline, id, &known);
    context.print(&counter)?;
    if !is_stable {
        let words = "the counter changed whenever it was looked at: the sum above may not come out; run it again";
        return Err(Failure::new(Exit::Retry, words));
    }
    Ok(if counter.agrees { Exit::Ok } else { Exit::Drift })
}

async fn value_of(connection: &Connection, counter: &str) -> Result<Option<String>, Fault> {
    let told = connection.call(Command::new("GET").arg(counter)).await;
    Ok(told.map_err(|fault| fault.about(counter))?.as_text().map(str::to_owned))
}

/// Looks once: an error if the counter changed meanwhile.
async fn look(
    connection: &Connection,
    truth: &postgres::Database,
    pipeline: &Pipeline,
    id: &str,
) -> Result<Result<Known, Known>, Failed> {
    let keys = pipeline.keys_of(shard_of(id, pipeline.shards));
    let text = |reply: Reply| reply.as_text().map(str::to_owned);
    let value = value_of(connection, &keys.counter(id)).await?;
    // From where on entries may not be flushed: first asked, then the table is read, so that nothing falls in between.
    let standing = info::standing(connection, &keys.stream, &keys.group).await?;
    let from = [standing.oldest_pending, standing.first_undelivered].into_iter().flatten().min();
    let mut view = truth.view().await?;
    let read = view.read(&keys.stream, &[id], None).await?;
    let entries = match from {
        Some(from) => entries_of(connection, &keys, pipeline, id, from).await?,
        None => Vec::new(),
    };
    let ids: Vec<EntryId> = entries.iter().map(|(entry, _)| *entry).collect();
    let held = view.holds(&keys.stream, &ids).await?;
    view.end().await;
    let unflushed = entries.into_iter().zip(held).filter(|(_, held)| !held).map(|(entry, _)| entry).collect();
    let of_lease = connection.call(Command::new("PTTL").arg(keys.lease(id))).await?.as_int();
    let known = Known {
        left_ms: connection.call(Command::new("PTTL").arg(keys.counter(id))).await?.as_int().filter(|ms| *ms >= 0),
        last: text(connection.call(Command::new("HGET").arg(&keys.index).arg(id)).await?),
        lease_ms: of_lease.filter(|ms| *ms >= 0),
        row: read.values.first().copied().unwrap_or(0),
        unflushed,
        value,
    };
    let again = value_of(connection, &keys.counter(id)).await?;
    let now = info::standing(connection, &keys.stream, &keys.group).await?;
    let is_stable = again == known.value && (known.is_right() || now.first_undelivered == standing.first_undelivered);
    Ok(if is_stable { Ok(known) } else { Err(known) })
}

/// The entries of one counter from this id on.
async fn entries_of(
    connection: &Connection,
    keys: &ShardKeys,
    pipeline: &Pipeline,
    id: &str,
    from: EntryId,
) -> Result<Vec<(EntryId, i64)>, Fault> {
    let (mut found, mut from) = (Vec::new(), Some(from));
    while let Some(start) = from {
        let range = Command::new("XRANGE").arg(&keys.stream).arg(start).arg("+").arg("COUNT").arg(STEP);
        let page = connection.call(range).await?.into_array().ok_or_else(|| unexpected("XRANGE"))?;
        let (mut count, mut last) = (0, None);
        for entry in page {
            let mut parts = entry.into_array().ok_or_else(|| unexpected("XRANGE"))?;
            let entry = parts.next().and_then(|entry| entry.as_text()?.parse::<EntryId>().ok());
            let entry = entry.ok_or_else(|| unexpected("XRANGE"))?;
            (count, last) = (count + 1, Some(entry));
            let Some(fields) = parts.next() else { continue };
            let strings: Vec<&[u8]> = fields.strings().collect();
            let field = |name: &str| {
                strings.as_chunks::<2>().0.iter().find(|[field, _]| *field == name.as_bytes()).map(|[_, value]| *value)
            };
            let amount = field(&pipeline.value_field).and_then(|amount| std::str::from_utf8(amount).ok()?.parse().ok());
            if field(&pipeline.key_field) == Some(id.as_bytes())
                && let Some(amount) = amount
            {
                found.push((entry, amount));
            }
        }
        from = last.filter(|_| count == STEP).and_then(EntryId::next);
    }
    Ok(found)
}

impl Known {
    fn sum(&self) -> i128 {
        self.unflushed.iter().map(|(_, amount)| i128::from(*amount)).sum::<i128>() + i128::from(self.row)
    }

    fn is_right(&self) -> bool {
        self.value.as_ref().is_none_or(|value| *value == self.sum().to_string())
    }
}

impl Counter {
    fn of(pipeline: &Pipeline, id: &str, known: &Known) -> Counter {
        let state = match (&known.value, &known.last, known.left_ms) {
            (None, None, _) => "absent",
            (None, Some(_), _) => "in_doubt",
            (Some(_), Some(_), _) => "dirty",
            (Some(_), None, Some(_)) => "clean",
            (Some(_), None, None) => "plain",
        };
        let unflushed: i128 = known.unflushed.iter().map(|(_, amount)| i128::from(*amount)).sum();
        Counter {
            pipeline: pipeline.name.clone(),
            id: id.to_owned(),
            state,
            dirty_up_to: known.last.clone(),
            expires_ms: known.left_ms,
            lease_ms: known.lease_ms,
            postgres: known.row.to_string(),
            unflushed: unflushed.to_string(),
            unflushed_entries: known.unflushed.len() as u64,
            together: known.sum().to_string(),
            valkey: known.value.clone(),
            agrees: known.is_right(),
        }
    }
}

impl Report for Counter {
    fn show(&self, page: &mut Page) {
        let last = self.dirty_up_to.as_deref().unwrap_or_default();
        let state = match self.state {
            "absent" => "absent: the next read brings it from PostgreSQL".to_owned(),
            "in_doubt" => format!("absent, with deltas up to {last} that are not known to be settled"),
            "dirty" => format!("dirty up to {last}: it cannot be evicted"),
            "clean" => {
                format!("clean: it may be evicted, and expires in {} s", self.expires_ms.unwrap_or_default() / 1000)
            }
            _ => "kept by its producers".to_owned(),
        };
        let lease = self.lease_ms.map(|ms| format!("held for {ms} ms")).unwrap_or_else(|| "none".into());
        page.line(format!("counter \"{}\" of pipeline {}", printable(&self.id), self.pipeline));
        page.line(format!("state          {state}"));
        page.line(format!("lease          {lease}"));
        page.line(format!("in PostgreSQL  {:>20}", self.postgres));
        page.line(format!("not flushed    {:>20}  in {} entries", self.unflushed, self.unflushed_entries));
        page.line(format!("together       {:>20}", self.together));
        page.line(format!("in Valkey      {:>20}", self.valkey.as_deref().unwrap_or("absent")));
        if !self.agrees {
            page.toned(Tone::Bad, "the two differ");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_right_if_it_is_the_row_and_what_is_on_the_way() {
        let entry = EntryId { ms: 1, seq: 0 };
        let known = |value: Option<&str>| Known {
            value: value.map(str::to_owned),
            left_ms: None,
            last: None,
            lease_ms: None,
            row: i64::MAX,
            unflushed: vec![(entry, 1), (entry, -3)],
        };
        assert!(known(Some("9223372036854775805")).is_right() && known(None).is_right());
        assert!(!known(Some("9223372036854775807")).is_right());
    }
}
