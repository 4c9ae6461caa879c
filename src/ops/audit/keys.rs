//! Keys: which keys an audit looks at, and how they are named on each side.
//!
//! Takes a pipeline with the type of its table's key, and what was asked for; gives groups of keys: named ones, a sample of both sides, or all there are.
//! Fails with what a server says.

use std::collections::BTreeSet;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};

use super::{Opts, TOGETHER};
use crate::client::invalidate::literal;
use crate::model::pipeline::Pipeline;
use crate::model::slot::hash_tag;
use crate::ops::Failure;
use crate::ops::observe::Servers;
use crate::target::Fit;
use crate::valkey::{Command, Home, Reply, unexpected};

/// How keys, rows and counters are named.
#[derive(Debug)]
pub(super) struct Keys {
    pub(super) pipeline: Pipeline,
    /// The type that a key is compared as.
    pub(super) sql_type: String,
    is_typed: bool,
}

impl Keys {
    pub(super) fn new(pipeline: &Pipeline, fit: &Fit) -> Keys {
        Keys { pipeline: pipeline.clone(), sql_type: fit.keys[0].clone(), is_typed: fit.is_grouped }
    }

    /// The table, quoted.
    pub(super) fn table(&self) -> String {
        self.pipeline.table.quoted()
    }

    /// The keys that are to be judged, in groups.
    pub(super) fn groups(&self, opts: &Opts, _servers: &Servers) -> Groups<'_> {
        let stage = match (opts.full, opts.keys.is_empty()) {
            (true, _) => Stage::Rows(None),
            (false, false) => Stage::Named(opts.keys.iter().cloned().collect()),
            (false, true) => Stage::Sample(opts.sample),
        };
        Groups { keys: self, stage }
    }

    /// Keys in the form in which the table shows them; a text that is no key of this type has none.
    pub(super) async fn canonical(
        &self,
        connection: &mut PgConnection,
        keys: &[String],
    ) -> Result<Vec<Option<String>>, sqlx::Error> {
        if !self.is_typed {
            return Ok(keys.iter().cloned().map(Some).collect());
        }
        let sql = format!(
            "select (k.key::{})::text from unnest($1::text[]) with ordinality as k (key, n) order by k.n",
            self.sql_type
        );
        let (mut found, mut work) = (vec![None; keys.len()], vec![(0, keys.len())]);
        while let Some((start, end)) = work.pop().filter(|(start, end)| start < end) {
            let mut savepoint = connection.begin().await?;
            let cast: Result<Vec<Option<String>>, _> =
                sqlx::query_scalar(AssertSqlSafe(sql.clone())).bind(&keys[start..end]).fetch_all(&mut *savepoint).await;
            match cast {
                Ok(texts) => {
                    savepoint.commit().await?;
                    found[start..end].clone_from_slice(&texts);
                }
                Err(sqlx::Error::Database(_)) => {
                    savepoint.rollback().await?;
                    let middle = start + (end - start) / 2;
                    if end - start > 1 {
                        work.extend([(start, middle), (middle, end)]);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The key that a counter in Valkey belongs to.
    fn of_counter(&self, counter: &str) -> Option<String> {
        let below = counter.strip_prefix(&self.pipeline.counters)?.strip_prefix(':')?;
        let id = match hash_tag(&self.pipeline.stream_of(0)) {
            Some(_) => below.strip_prefix('{')?.split_once("}:")?.1,
            None => below,
        };
        (self.pipeline.counter_of(id) == counter).then(|| id.to_owned())
    }
}

/// Groups of keys to be judged together.
pub(super) struct Groups<'a> {
    keys: &'a Keys,
    stage: Stage,
}

enum Stage {
    Named(BTreeSet<String>),
    Sample(u32),
    /// Every row, from behind this key on.
    Rows(Option<String>),
    /// Every counter of Valkey that has no row: on these primaries, on the last of them from this cursor on.
    Counters(Vec<Home>, String),
    Over,
}

impl Groups<'_> {
    pub(super) async fn next(&mut self, servers: &mut Servers) -> Result<Option<BTreeSet<String>>, Failure> {
        loop {
            let stage = std::mem::replace(&mut self.stage, Stage::Over);
            match stage {
                Stage::Over => return Ok(None),
                Stage::Named(keys) => return Ok(Some(keys)),
                Stage::Sample(size) => return self.sample(servers, size).await.map(Some),
                Stage::Rows(behind) => {
                    let rows = self.rows(servers, behind.as_deref()).await?;
                    self.stage = match rows.last() {
                        Some(last) if rows.len() == TOGETHER => Stage::Rows(Some(last.clone())),
                        _ => Stage::Counters(servers.valkey.homes().await?, "0".into()),
                    };
                    if !rows.is_empty() {
                        return Ok(Some(rows.into_iter().collect()));
                    }
                }
                Stage::Counters(mut homes, cursor) => {
                    let Some(home) = homes.last() else { return Ok(None) };
                    let (next, found) = self.counters(servers, home, &cursor, TOGETHER).await?;
                    if next == "0" {
                        homes.pop();
                    }
                    self.stage = Stage::Counters(homes, next);
                    let without_row = self.without_row(servers, found).await?;
                    if !without_row.is_empty() {
                        return Ok(Some(without_row));
                    }
                }
            }
        }
    }

    async fn rows(&self, servers: &Servers, behind: Option<&str>) -> Result<Vec<String>, Failure> {
        let (key, table, kind) = (self.keys.pipeline.key.quoted(), self.keys.table(), &self.keys.sql_type);
        let from = if behind.is_some() { format!("where {key} > $2::{kind}") } else { "where $2::text is null".into() };
        let sql = format!("select {key}::text from {table} {from} order by {key} limit $1");
        let rows: Vec<Option<String>> = servers
            .database
            .run(async |c| sqlx::query_scalar(AssertSqlSafe(sql)).bind(TOGETHER as i64).bind(behind).fetch_all(c).await)
            .await?;
        Ok(rows.into_iter().flatten().collect())
    }

    /// Rows at random, and counters from a place at random: what only one side has is met as well.
    async fn sample(&self, servers: &mut Servers, size: u32) -> Result<BTreeSet<String>, Failure> {
        let (key, table) = (self.keys.pipeline.key.quoted(), self.keys.table());
        let estimate = "select greatest(reltuples, 0)::bigint from pg_class where oid = $1::regclass";
        let name = table.clone();
        let rows: i64 =
            servers.database.run(async |c| sqlx::query_scalar(estimate).bind(name).fetch_one(c).await).await?;
        // A large table is not read for a few of its rows.
        let source = match rows > 200_000 {
            true => format!(
                "{table} tablesample system ({:.6})",
                (f64::from(size) * 300.0 / rows as f64).clamp(0.000_1, 100.0)
            ),
            false => table,
        };
        let sql = format!("select {key}::text from {source} order by random() limit $1");
        let found: Vec<Option<String>> = servers
            .database
            .run(async |c| sqlx::query_scalar(AssertSqlSafe(sql)).bind(i64::from(size)).fetch_all(c).await)
            .await?;
        let mut keys: BTreeSet<String> = found.into_iter().flatten().collect();
        let homes = servers.valkey.homes().await?;
        let wanted = (size as usize / 4 + 1).div_ceil(homes.len().max(1));
        for home in &homes {
            let cursor = rand::random::<u16>().to_string();
            let (_, counters) = self.counters(servers, home, &cursor, wanted).await?;
            // Behind the last one comes the first: of few counters all are met, wherever it began.
            if counters.len() < wanted {
                keys.extend(self.counters(servers, home, "0", wanted - counters.len()).await?.1);
            }
            keys.extend(counters);
        }
        Ok(keys)
    }

    /// Counters on one primary from a cursor on, at least so many if there are: keys, and where to go on.
    async fn counters(
        &self,
        servers: &mut Servers,
        home: &Home,
        cursor: &str,
        most: usize,
    ) -> Result<(String, Vec<String>), Failure> {
        let link = servers.link_at(home).await?;
        let (mut cursor, mut found) = (cursor.to_owned(), Vec::new());
        let pattern = format!("{}:*", literal(&self.keys.pipeline.counters));
        loop {
            let scan = Command::new("SCAN").arg(&cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1_000);
            let parts: Vec<Reply> =
                link.commands().call(scan).await?.into_array().ok_or_else(|| unexpected("SCAN"))?.collect();
            let (next, names) = (parts.first().and_then(Reply::as_text), parts.get(1));
            let (Some(next), Some(names)) = (next, names) else { return Err(unexpected("SCAN").into()) };
            cursor = next.to_owned();
            found.extend(names.strings().filter_map(|name| self.keys.of_counter(std::str::from_utf8(name).ok()?)));
            if cursor == "0" || found.len() >= most {
                return Ok((cursor, found));
            }
        }
    }

    async fn without_row(&self, servers: &Servers, keys: Vec<String>) -> Result<BTreeSet<String>, Failure> {
        let (key, table, kind) = (self.keys.pipeline.key.quoted(), self.keys.table(), self.keys.sql_type.clone());
        let sql = format!(
            "select k.key from unnest($1::text[]) as k (key) where not exists (select from {table} t where t.{key} = k.key::{kind})"
        );
        let without = servers.database.transact(async |session| {
            let mut transaction = session.begin().await?;
            let canonical: Vec<String> =
                self.keys.canonical(&mut transaction, &keys).await?.into_iter().flatten().collect();
            let without: Vec<String> =
                sqlx::query_scalar(AssertSqlSafe(sql)).bind(canonical).fetch_all(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(without)
        });
        Ok(without.await?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_named_as_producers_name_them() {
        let fit = Fit {
            keys: vec!["text".into()],
            values: vec!["bigint".into()],
            is_grouped: false,
            writing: crate::target::Writing::Upsert,
        };
        let plain = Keys::new(&Pipeline::counters(), &fit);
        assert_eq!((plain.of_counter("counter:a:b"), plain.of_counter("other:a")), (Some("a:b".into()), None));
        let sharded = Keys::new(&Pipeline { shards: 4, ..Pipeline::counters() }, &fit);
        assert_eq!(sharded.of_counter("counter:{3}:a"), Some("a".into()));
        assert_eq!(sharded.of_counter("counter:{0}:a"), None, "another shard's");
        let tagged = Pipeline { stream: "flush:{likes}".into(), counters: "likes".into(), ..Pipeline::counters() };
        let tagged = Keys::new(&tagged, &fit);
        assert_eq!(tagged.of_counter("likes:{likes}:a}:b"), Some("a}:b".into()));
        assert_eq!(tagged.of_counter("counter:{likes}:a"), None, "another pipeline's");
    }
}
