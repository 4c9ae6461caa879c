//! Observe: what the two servers tell of the configured pipelines, for all commands that show or judge it.
//!
//! Takes the configuration; gives a [`Look`]: each side as far as it could be reached, or why not. It cannot fail as a whole: in an outage
//! of one server the other one is the answer.

pub mod postgres;
pub mod valkey;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::postgres::Books;
use self::valkey::Stream;
use crate::config::Config;
use crate::lanes;
use crate::model::pipeline::{Pipeline, Shard};
use crate::ops::Failure;
use crate::postgres::Database;
use crate::retry::Fault;
use crate::valkey::{Endpoint, Home, Link, Links};

/// The two servers, as a command reaches them.
#[derive(Debug)]
pub struct Servers {
    /// Where Valkey is.
    pub valkey: Endpoint,
    /// PostgreSQL, over two connections.
    pub database: Database,
    /// The Valkey deployment's name.
    pub source: String,
    links: Links,
}

impl Servers {
    /// As the configuration names them; `name` is what CLIENT LIST shows.
    pub fn of(config: &Config, name: &'static str) -> Result<Servers, Failure> {
        let (valkey, database) = (config.valkey.address()?, Database::new(config.postgres.address()?, 2));
        let links = Links::to(&valkey, name);
        Ok(Servers { valkey, database, source: config.valkey.source.clone(), links })
    }

    /// A link to the server that has this stream, or any other key, now; the same one as long as it lasts.
    pub async fn link(&mut self, stream: &str) -> Result<Arc<Link>, Fault> {
        self.links.to_stream(stream).await
    }

    /// A link to one primary.
    pub async fn link_at(&mut self, home: &Home) -> Result<Arc<Link>, Fault> {
        self.links.at(home).await
    }

    /// A pipeline's shards, with those that it had before where PostgreSQL tells.
    pub async fn shards(&self, pipeline: &Pipeline) -> Vec<Shard> {
        let told = self.database.run(async |c| lanes::shards(c, &self.source, pipeline).await).await;
        told.unwrap_or_else(|_| pipeline.shards())
    }
}

/// What could be seen at one moment.
#[derive(Debug)]
pub struct Look {
    /// When it was.
    pub at: Instant,
    /// The streams of each pipeline, in the order of the configuration.
    pub pipelines: Vec<(Pipeline, Vec<Seen>)>,
    /// PostgreSQL's side, or why it could not be seen.
    pub books: Result<Books, Fault>,
}

/// A stream of a pipeline, or why it could not be seen.
#[derive(Debug)]
pub struct Seen {
    /// Which stream.
    pub shard: Shard,
    /// What Valkey tells of it.
    pub stream: Result<Stream, Fault>,
}

impl Look {
    /// Looks at both sides at once.
    pub async fn take(servers: &mut Servers, pipelines: &[&Pipeline], dead_after: Duration) -> Look {
        let books = postgres::look(&servers.database, &servers.source).await;
        let mut seen = Vec::new();
        // A server that cannot be reached is not waited for again for each stream.
        let mut away: Option<Fault> = None;
        for pipeline in pipelines {
            let shards = match &books {
                Ok(books) => books.shards_of(pipeline),
                Err(_) => pipeline.shards(),
            };
            let mut of_pipeline = Vec::new();
            for shard in shards {
                let stream = match &away {
                    Some(fault) => Err(fault.clone()),
                    None => valkey::look(servers, &shard, dead_after).await,
                };
                if let Err(fault @ (Fault::ValkeyLost(_) | Fault::ValkeyProtocol(_))) = &stream {
                    away = Some(fault.clone());
                }
                of_pipeline.push(Seen { shard, stream });
            }
            seen.push(((*pipeline).clone(), of_pipeline));
        }
        Look { at: Instant::now(), pipelines: seen, books }
    }

    /// Every stream that was seen, by its pipeline's and its own name.
    pub fn streams(&self) -> BTreeMap<(&str, &str), &Stream> {
        let all = self.pipelines.iter().flat_map(|(pipeline, seen)| seen.iter().map(move |seen| (pipeline, seen)));
        all.filter_map(|(pipeline, seen)| {
            Some(((pipeline.name.as_str(), seen.shard.stream.as_str()), seen.stream.as_ref().ok()?))
        })
        .collect()
    }

    /// Why Valkey could not be seen, if it could not.
    pub fn valkey_fault(&self) -> Option<&Fault> {
        self.pipelines.iter().flat_map(|(_, seen)| seen).find_map(|seen| seen.stream.as_ref().err())
    }
}
