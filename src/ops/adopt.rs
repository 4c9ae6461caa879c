//! `tidegate adopt`: the counters of a pipeline are managed from now on, whatever Valkey has of them.
//!
//! Takes a pipeline with `mode = "managed"`; gives an account of each shard, and with `--yes` begins to manage it: the values that Valkey has are dropped,
//! and each is brought back from PostgreSQL when it is needed, once everything that was added until now is flushed. The flush goes on meanwhile, and so do
//! producers of either kind. It is also the operator's word that another PostgreSQL, or another number of shards, is meant.

use std::io::Write;

use super::context::one_of_counters;
use super::{Context, Exit, Failure, refused};
use crate::client::postgres::lineage;
use crate::config::{Config, Needs};
use crate::functions;
use crate::functions::gate::{self, Opened, Word};
use crate::lanes;
use crate::model::pipeline::Pipeline;
use crate::postgres::Database;
use crate::retry::{Fault, advised};
use crate::valkey::{Link, Links, info};

const VERB: &str = "adopt";

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// The pipeline; may be left out where there is only one
    #[arg(long, value_name = "NAME")]
    pub pipeline: Option<String>,
    /// This PostgreSQL is another one than before and has lost nothing (a planned switch-over). After a restore, or a failover with loss, run `tidegate replay` instead
    #[arg(long)]
    pub accept_postgres: bool,
    /// Do it; without this nothing is changed
    #[arg(long)]
    pub yes: bool,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    Ok(answer(&opts, &config, &mut std::io::stdout()).await?)
}

async fn answer(opts: &Opts, config: &Config, out: &mut dyn Write) -> std::io::Result<Exit> {
    let pipeline = match one_of_counters(config, opts.pipeline.as_deref()) {
        Ok(pipeline) => pipeline,
        Err(failure) => return refused(VERB, failure.exit(), &failure.to_string()),
    };
    if !pipeline.is_managed() {
        let words = format!("pipeline {} is plain: write mode = \"managed\" in its section first", pipeline.name);
        return refused(VERB, Exit::Config, &words);
    }
    let (valkey, postgres) = match (config.valkey.address(), config.postgres.address()) {
        (Ok(valkey), Ok(postgres)) => (valkey, postgres),
        (Err(problems), _) | (_, Err(problems)) => return refused(VERB, Exit::Config, &problems.to_string()),
    };
    let database = Database::new(postgres, 1);
    let outcome = async {
        let mut links = Links::to(&valkey, "tidegate:adopt");
        adopt(opts, config, pipeline, &mut links, &database, out).await
    };
    let outcome = outcome.await;
    database.close().await;
    match outcome {
        Ok(written) => written,
        Err(fault) => refused(VERB, Exit::from(&fault), &advised(&fault)),
    }
}

async fn adopt(
    opts: &Opts,
    config: &Config,
    pipeline: &Pipeline,
    links: &mut Links,
    database: &Database,
    out: &mut dyn Write,
) -> Result<std::io::Result<Exit>, Fault> {
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
        let (word, what) = match standing.lineage.as_deref() {
            Some(managed) if managed == lineage => (None, "managed already".to_owned()),
            Some(before) if !is_same_division(before, &lineage) => {
                if unsettled > 0 {
                    let words = format!(
                        "the number of shards was changed, and {unsettled} entries of the pipeline are not settled: let `tidegate run` settle them, \
                         then run this again"
                    );
                    return Ok(refused(VERB, Exit::Retry, &words));
                }
                (Some(Word::Accept), "managed by another number of shards: to be divided anew".to_owned())
            }
            Some(before) if opts.accept_postgres => {
                (Some(Word::Accept), format!("managed for the PostgreSQL {before}: to be managed for this one"))
            }
            Some(before) => {
                let words = format!(
                    "the counters were flushed into another PostgreSQL ({before}; this is {lineage}). If this one was restored, or has lost \
                     transactions, run `tidegate replay`; if it is the same data for certain, add --accept-postgres"
                );
                return Ok(refused(VERB, Exit::Config, &words));
            }
            None => (Some(Word::Adopt), "not managed until now".to_owned()),
        };
        let dropped = match (word, opts.yes) {
            (Some(word), true) => match gate::open(connection, &keys, &lineage, word).await? {
                Opened::Managed => drop_if_closed(&link, &keys).await?,
                Opened::Unadopted | Opened::Other(_) => {
                    return Ok(refused(
                        VERB,
                        Exit::Retry,
                        "the shard was changed by somebody else meanwhile: run this again",
                    ));
                }
            },
            (None, true) => drop_if_closed(&link, &keys).await?,
            (_, false) => 0,
        };
        let done = if opts.yes { format!("; {dropped} values were dropped") } else { String::new() };
        if let Err(error) = writeln!(out, "{}: {what}{done}", keys.stream) {
            return Ok(Err(error));
        }
    }
    if opts.yes {
        return Ok(Ok(Exit::Ok));
    }
    let last = "nothing was changed; add --yes to do it. The values that Valkey has of these counters are then dropped, and brought back from PostgreSQL";
    Ok(writeln!(out, "{last}").map(|()| Exit::Ok))
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
