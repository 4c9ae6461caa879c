//! Ask: names that only the servers know.
//!
//! Takes the configuration; gives what a server told within [`LIMIT`]. Whatever it refuses, and where it does not answer, there are fewer
//! names or none: each question is one that may be asked again with the next Tab.

use std::time::Duration;

use sqlx::postgres::PgConnection;

use super::names::Known;
use crate::config::Config;
use crate::lanes;
use crate::model::entry::EntryId;
use crate::model::pipeline::Pipeline;
use crate::ops::columns::plural;
use crate::postgres::Database;
use crate::retry::Fault;
use crate::valkey::{Command, Links, info};

/// How long a server is asked, connecting included. Longer a Tab feels broken.
const LIMIT: Duration = Duration::from_millis(300);
/// So many names are offered at the most: nobody reads more.
const MOST: usize = 200;
/// The name of the connection, as CLIENT LIST shows it.
const NAME: &str = "tidegate:complete";

/// What was found when the time was up, or all was asked.
fn within_limit(ask: impl AsyncFnOnce(&mut Vec<Known>) -> Option<()>) -> Vec<Known> {
    // The one provider of cryptography; it is not set yet.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut found = Vec::new();
    if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
        runtime.block_on(async {
            // What was told until then is good.
            let _ = tokio::time::timeout(LIMIT, ask(&mut found)).await;
        });
        // A name server that is silent is not waited for.
        runtime.shutdown_background();
    }
    found.truncate(MOST);
    found
}

/// The members of the groups of these pipelines.
pub(super) fn consumers(config: &Config, pipelines: &[&Pipeline], begun: &str) -> Vec<Known> {
    within_limit(async |found| {
        let mut links = Links::to(&config.valkey.address().ok()?, NAME);
        for shard in pipelines.iter().flat_map(|pipeline| pipeline.shards()) {
            let link = links.to_stream(&shard.stream).await.ok()?;
            let told = match info::consumers(link.commands(), &shard.stream, &shard.pipeline.group()).await {
                Ok(told) => told,
                // It is missing, or may not be looked at: another one may.
                Err(Fault::Valkey { .. }) => continue,
                Err(_) => return None,
            };
            let meant = told.into_iter().filter(|consumer| consumer.name.starts_with(begun));
            found.extend(meant.map(|consumer| {
                let holds = plural(consumer.pending, "entry", "entries");
                Known::new(consumer.name, format!("holds {holds} of {}", shard.stream))
            }));
            if found.len() >= MOST {
                break;
            }
        }
        Some(())
    })
}

/// The groups of all configured streams, but for the pipelines' own.
pub(super) fn groups(config: &Config, begun: &str) -> Vec<Known> {
    let own: Vec<String> = config.pipelines.iter().map(Pipeline::group).collect();
    within_limit(async |found| {
        let mut links = Links::to(&config.valkey.address().ok()?, NAME);
        for shard in config.pipelines.iter().flat_map(Pipeline::shards) {
            let link = links.to_stream(&shard.stream).await.ok()?;
            let told = match info::groups(link.commands(), &shard.stream).await {
                Ok(told) => told,
                Err(Fault::Valkey { .. }) => continue,
                Err(_) => return None,
            };
            let others = told.into_iter().filter(|group| group.name.starts_with(begun) && !own.contains(&group.name));
            found.extend(others.map(|group| Known::new(group.name, format!("of {}", shard.stream))));
            if found.len() >= MOST {
                break;
            }
        }
        Some(())
    })
}

/// The streams of every primary, whose they ever are.
pub(super) fn streams(config: &Config, begun: &str) -> Vec<Known> {
    // What is begun is no pattern.
    let escaped: String =
        begun.chars().flat_map(|c| "*?[]\\^".contains(c).then_some('\\').into_iter().chain([c])).collect();
    let pattern = format!("{escaped}*");
    within_limit(async |found| {
        let address = config.valkey.address().ok()?;
        let mut links = Links::to(&address, NAME);
        for home in address.homes().await.ok()? {
            let link = links.at(&home).await.ok()?;
            let mut cursor = "0".to_owned();
            loop {
                let scan = Command::new("SCAN").arg(&cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1_000);
                let mut parts = link.commands().call(scan.arg("TYPE").arg("stream")).await.ok()?.into_array()?;
                let (next, names) = parts.next().zip(parts.next())?;
                found.extend(names.into_array()?.filter_map(|name| Some(Known::new(name.as_text()?, ""))));
                cursor = next.as_text()?.to_owned();
                if cursor == "0" || found.len() >= MOST {
                    break;
                }
            }
        }
        Some(())
    })
}

/// The tables that could be a pipeline's: by their names alone where the role's search path finds them, and with their schemas.
pub(super) fn tables(config: &Config, begun: &str) -> Vec<Known> {
    let sql = "
        with tables as (
            select n.nspname::text as schema, c.relname::text as name, pg_table_is_visible(c.oid) as is_visible
            from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where c.relkind in ('r', 'p') and n.nspname not in ('information_schema', 'tidegate') and left(n.nspname, 3) <> 'pg_')
        select name from (
            select name from tables where is_visible union all select schema || '.' || name from tables) as t (name)
        where starts_with(name, $1) order by position('.' in name), name limit 200";
    asked_of_postgresql(config, async |c| {
        let names: Vec<String> = sqlx::query_scalar(sql).bind(begun).fetch_all(c).await?;
        Ok(names.into_iter().map(|name| Known::new(name, "")).collect())
    })
}

/// The latest dead letters that are open; those that were discarded, where they are to be opened again.
pub(super) fn letters(config: &Config, discarded: bool) -> Vec<Known> {
    let source = &config.valkey.source;
    let sql = "
        select d.id::text, l.pipeline, d.reason from tidegate.dead_letters d join tidegate.lanes l using (lane)
        where l.source = $1 and case when $2 then d.resolution like 'discarded%' else d.resolved_at is null end
        order by d.buried_at desc, d.id desc limit 200";
    asked_of_postgresql(config, async |c| {
        let rows: Vec<(String, String, String)> = sqlx::query_as(sql).bind(source).bind(discarded).fetch_all(c).await?;
        let letter = |(id, pipeline, reason): (String, String, String)| {
            let id = EntryId::from_number(id.parse().ok()?);
            Some(Known::new(id.to_string(), format!("{reason}, of {pipeline}")))
        };
        Ok(rows.into_iter().filter_map(letter).collect())
    })
}

/// The pipelines that the ledger knows.
pub(super) fn pipelines_of_ledger(config: &Config) -> Vec<Known> {
    let source = &config.valkey.source;
    asked_of_postgresql(config, async |c| {
        let names = lanes::names(c, source).await?;
        Ok(names.into_iter().map(|(pipeline, stream)| Known::new(pipeline, format!("of {stream}"))).collect())
    })
}

fn asked_of_postgresql(
    config: &Config,
    ask: impl AsyncFnOnce(&mut PgConnection) -> Result<Vec<Known>, sqlx::Error>,
) -> Vec<Known> {
    within_limit(async |found| {
        let database = Database::new(config.postgres.address().ok()?, 1);
        found.extend(database.run(ask).await.ok()?);
        Some(())
    })
}
