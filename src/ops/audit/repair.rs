//! Repair: counters in Valkey are set right, by adding what they lack.
//!
//! Takes the differences that an audit is certain of; adds the difference to each counter (INCRBY, never SET), so that increments that
//! come meanwhile stay. Fails with what a server says: what was added until then is told, and a second repair finds what is left.
//!
//! Two repairs at once would both add what one should: a lock in PostgreSQL lets one begin after the other has ended.

use std::collections::BTreeSet;

use sqlx::postgres::PgConnection;

use super::judge::Class;
use super::keys::Keys;
use super::{Audit, Opts};
use crate::model::entry::digest;
use crate::model::pipeline::Pipeline;
use crate::ops::columns::plural;
use crate::ops::observe::Servers;
use crate::ops::{Context, Exit, Failure};
use crate::retry::Fault;
use crate::valkey::{Command, Reply, unexpected};

/// Counters set right by one script.
const TOGETHER: usize = 200;

/// Adds to counters; answers for each nothing, or the error.
const ADD: &str = "
local answers = {}
for i = 1, #KEYS do
    local done = redis.pcall('INCRBY', KEYS[i], ARGV[i])
    answers[i] = type(done) == 'table' and done.err or ''
end
return answers";

/// Takes the lock; it is given back when the connection ends.
pub(super) async fn lock(servers: &Servers, pipeline: &Pipeline) -> Result<PgConnection, Failure> {
    let session = servers.database.address().connect().await?;
    if session.is_pooled() {
        let words = "a connection pooler stands between, and the lock that keeps two repairs apart is held for longer than a transaction: name \
                     PostgreSQL itself in postgres.url for --repair";
        return Err(Failure::new(Exit::Config, words));
    }
    let mut connection = session.into_connection();
    let number = digest(format!("tidegate audit {} {}", servers.source, pipeline.name).as_bytes()) as i64;
    let taken: bool =
        sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(number).fetch_one(&mut connection).await.map_err(
            |error| Failure::from(Fault::PostgresLost(format!("the lock of repairs cannot be taken: {error}"))),
        )?;
    match taken {
        true => Ok(connection),
        false => Err(Failure::new(Exit::Retry, "another repair of this pipeline is under way: nothing was changed")),
    }
}

/// Sets right what differs for certain.
pub(super) async fn repair(
    opts: &Opts,
    context: &Context,
    servers: &mut Servers,
    pipeline: &Pipeline,
    keys: &Keys,
    audit: &mut Audit,
) -> Result<(), Failure> {
    let is_certain = |class: Class| matches!(class, Class::ValkeyAhead | Class::PgAhead);
    let meant: Vec<(String, i128)> = audit
        .differences
        .iter()
        .filter(|difference| is_certain(difference.class))
        .map(|difference| (difference.key.clone(), -difference.exact))
        .collect();
    if meant.is_empty() || opts.dry_run {
        return Ok(());
    }
    let counters = plural(meant.len() as u64, "counter", "counters");
    for (key, more) in meant.iter().take(10) {
        context.say(&format!("  {} {more:+}", pipeline.counter_of(key)));
    }
    context.confirm(&format!("Add this to {counters} in Valkey?"), opts.yes)?;
    for group in meant.chunk_by(|a, b| pipeline.shards <= 1 || shard(pipeline, &a.0) == shard(pipeline, &b.0)) {
        for group in group.chunks(TOGETHER) {
            let link = servers.link(&pipeline.stream_of(shard(pipeline, &group[0].0))).await?;
            let names = group.iter().map(|(key, _)| pipeline.counter_of(key));
            let eval = Command::new("EVAL").arg(ADD).arg(group.len()).args(names);
            let reply = link.commands().call(eval.args(group.iter().map(|(_, more)| more))).await?;
            let answers: Vec<Reply> = reply.into_array().ok_or_else(|| unexpected("EVAL"))?.collect();
            for ((key, _), answer) in group.iter().zip(&answers) {
                if let Some(error) = answer.as_text().filter(|error| !error.is_empty()) {
                    context.say(&format!("{}: {error}", pipeline.counter_of(key)));
                }
            }
        }
    }
    // What was done is looked at, and not assumed.
    let ids: BTreeSet<String> = meant.into_iter().map(|(key, _)| key).collect();
    let judged = super::judge(&|line| context.say(line), servers, pipeline, keys, ids, &mut audit.gone).await?;
    for difference in &mut audit.differences {
        difference.repaired = judged.get(&difference.key).is_some_and(|(class, _)| !class.differs());
        audit.repaired += u64::from(difference.repaired);
    }
    Ok(())
}

fn shard(pipeline: &Pipeline, key: &str) -> u16 {
    crate::model::shard::shard_of(key, pipeline.shards)
}
