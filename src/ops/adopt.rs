//! `tidegate adopt`: the counters of a pipeline are managed from now on, whatever Valkey has of them.
//!
//! Takes a pipeline with `mode = "managed"`; gives an account of each shard, and with `--yes` begins to manage it: the values that Valkey has are dropped,
//! and each is brought back from PostgreSQL when it is needed, once everything that was added until now is flushed. The flush goes on meanwhile, and so do
//! producers of either kind. It is also the operator's word that another PostgreSQL, or another number of shards, is meant.

use serde::Serialize;

use super::columns::Page;
use super::complete::{Name, by};
use super::context::{Report, managed};
use super::{Context, Exit, Failure};
use crate::client::postgres::lineage;
use crate::config::{Config, Needs};
use crate::functions;
use crate::functions::gate::{self, Opened, Word};
use crate::lanes;
use crate::model::pipeline::Pipeline;
use crate::postgres::Database;
use crate::retry::Fault;
use crate::valkey::{Link, Links, info};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// The pipeline; may be left out where there is only one
    #[arg(long, value_name = "NAME", add = by(Name::ManagedPipeline))]
    pub pipeline: Option<String>,
    /// This PostgreSQL is another one than before and has lost nothing (a planned switch-over). After a restore, or a failover with loss, run `tidegate replay` instead
    #[arg(long)]
    pub accept_postgres: bool,
    /// Do it; without this nothing is changed
    #[arg(long)]
    pub yes: bool,
}

/// What was found, and done.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Adopted {
    /// The pipeline.
    pub pipeline: String,
    /// Whether nothing was changed, because `--yes` was not given.
    pub dry_run: bool,
    /// Its shards, in their order; fewer than it has where a later one could not be adopted.
    pub shards: Vec<AdoptedShard>,
}

/// A shard that was adopted, or would be.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AdoptedShard {
    /// Its stream.
    pub stream: String,
    /// `managed`, `plain`, `divided` by another number of shards, or managed for another `postgres`.
    pub was: &'static str,
    /// The same in words.
    pub words: String,
    /// How many values of counters were dropped; they are brought back from PostgreSQL when they are needed.
    pub values_dropped: u64,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let pipeline = managed(&config, opts.pipeline.as_deref(), "write mode = \"managed\" in its section first")?;
    let (valkey, database) = (config.valkey.address()?, Database::new(config.postgres.address()?, 1));
    let mut adopted = Adopted { pipeline: pipeline.name.clone(), dry_run: !opts.yes, shards: Vec::new() };
    let outcome = async {
        let mut links = Links::to(&valkey, "tidegate:adopt");
        adopt(&opts, &config, pipeline, &mut links, &database, &mut adopted).await
    };
    let outcome = outcome.await;
    database.close().await;
    // What was done until something failed is told all the same.
    if outcome.is_ok() || !adopted.shards.is_empty() {
        context.print(&adopted)?;
    }
    outcome.map(|()| Exit::Ok)
}

impl Report for Adopted {
    fn show(&self, page: &mut Page) {
        for AdoptedShard { stream, words, values_dropped, .. } in &self.shards {
            let done = if self.dry_run { String::new() } else { format!("; {values_dropped} values were dropped") };
            page.line(format!("{stream}: {words}{done}"));
        }
        if self.dry_run {
            page.line(
                "nothing was changed; add --yes to do it. The values that Valkey has of these counters are then dropped, and brought back from \
                 PostgreSQL",
            );
        }
    }
}

async fn adopt(
    opts: &Opts,
    config: &Config,
    pipeline: &Pipeline,
    links: &mut Links,
    database: &Database,
    adopted: &mut Adopted,
) -> Result<(), Failure> {
    let lineage = database.run(async |c| lineage(c, pipeline.shards).await).await?;
    let source = &config.valkey.source;
    let shards = database.run(async |c| lanes::shards(c, source, pipeline).await).await?;
    // What the streams of every number of shards still hold is not in PostgreSQL yet.
    let mut unsettled = 0;
    for shard in &shards {
        let link = links.to_stream(&shard.stream).await?;
        let standing = info::standing(link.commands(), &shard.stream, &pipeline.group()).await?;
        unsettled += standing.pending + standing.undelivered.unwrap_or(u64::from(standing.first_undelivered.is_some()));
    }
    for number in 0..pipeline.shards.max(1) {
        let keys = pipeline.keys_of(number);
        let link = links.to_stream(&keys.stream).await?;
        let connection = link.commands();
        functions::load(connection).await?;
        let standing = gate::standing(connection, &keys).await?;
        let (word, was, words) = match standing.lineage.as_deref() {
            Some(managed) if managed == lineage => (None, "managed", "managed already".to_owned()),
            Some(before) if !is_same_division(before, &lineage) => {
                if unsettled > 0 {
                    let words = format!(
                        "the number of shards was changed, and {unsettled} entries of the pipeline are not settled: let `tidegate run` settle them, \
                         then run this again"
                    );
                    return Err(Failure::new(Exit::Retry, words));
                }
                (Some(Word::Accept), "divided", "managed by another number of shards: to be divided anew".to_owned())
            }
            Some(before) if opts.accept_postgres => (
                Some(Word::Accept),
                "postgres",
                format!("managed for the PostgreSQL {before}: to be managed for this one"),
            ),
            Some(before) => {
                let words = format!(
                    "the counters were flushed into another PostgreSQL ({before}; this is {lineage}). If this one was restored, or has lost \
                     transactions, run `tidegate replay`; if it is the same data for certain, add --accept-postgres"
                );
                return Err(Failure::new(Exit::Config, words));
            }
            None => (Some(Word::Adopt), "plain", "not managed until now".to_owned()),
        };
        let values_dropped = match (word, opts.yes) {
            (Some(word), true) => match gate::open(connection, &keys, &lineage, word).await? {
                Opened::Managed => drop_if_closed(&link, &keys).await?,
                Opened::Unadopted | Opened::Other(_) => {
                    let words = "the shard was changed by somebody else meanwhile: run this again";
                    return Err(Failure::new(Exit::Retry, words));
                }
            },
            (None, true) => drop_if_closed(&link, &keys).await?,
            (_, false) => 0,
        };
        adopted.shards.push(AdoptedShard { stream: keys.stream.clone(), was, words, values_dropped });
    }
    Ok(())
}

async fn drop_if_closed(link: &Link, keys: &crate::model::pipeline::ShardKeys) -> Result<u64, Fault> {
    match gate::standing(link.commands(), keys).await?.closed {
        Some(why) => gate::drop_all(link, keys, &why).await,
        None => Ok(0),
    }
}

/// Whether two lineages name the same number of shards.
fn is_same_division(before: &str, now: &str) -> bool {
    let shards = |lineage: &str| lineage.rsplit_once('/').map(|(_, shards)| shards.to_owned());
    shards(before) == shards(now)
}
