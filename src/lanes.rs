//! Lanes: a lane is a shard's place in the ledger, a small number that stands for (source, pipeline, stream).
//!
//! Takes the [`Identity`] of each of a pipeline's shards; gives their lanes, registered or found, and keeps the trim line of a stream's lanes. Fails with what
//! PostgreSQL says; refuses ([`Unregistered`]) where the ledger belongs to another configuration.

use std::collections::{BTreeSet, HashMap};

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::model::entry::EntryId;
use crate::model::pipeline::{Pipeline, Shard};

/// The number that stands for one (source, pipeline, stream) in the ledger.
pub type LaneId = i32;

/// A number that no lane has.
const UNREGISTERED: LaneId = 0;

/// What a lane stands for. Each flush proves that its lane is still this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The Valkey deployment.
    pub source: String,
    /// The pipeline's name.
    pub pipeline: String,
    /// The stream's key.
    pub stream: String,
    /// The table, as `schema.table`.
    pub target: String,
    /// Columns, fields and merge operator, as [`crate::model::pipeline::Pipeline::mapping`] writes them.
    pub mapping: String,
}

impl Identity {
    /// Of a shard that is read from this deployment.
    pub fn of(source: &str, shard: &Shard) -> Identity {
        Identity {
            source: source.to_owned(),
            pipeline: shard.pipeline.name.clone(),
            stream: shard.stream.clone(),
            target: shard.pipeline.table.to_string(),
            mapping: shard.pipeline.mapping(),
        }
    }

    /// What a flush names once for all lanes of a pipeline: source, pipeline, target.
    pub fn of_pipeline(&self) -> Vec<&str> {
        vec![&self.source, &self.pipeline, &self.target]
    }

    /// What [`verify_lane`](../../migrations/0002_verify.sql) compares: source, pipeline, stream, target.
    pub fn names(&self) -> [&str; 4] {
        [&self.source, &self.pipeline, &self.stream, &self.target]
    }
}

/// Why a lane cannot be registered: the ledger tells of another configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unregistered {
    /// Another pipeline has flushed this stream into this table. Under a new name the ledger would be empty.
    #[error(
        "pipeline {pipeline} would read {stream} into {target}, as {before} did: under a new name the ledger is empty and \
         everything retained would be applied again. If it is a new name for the same pipeline, stop all daemons and run `tidegate \
         migrate --rename-pipeline {before}={pipeline}`"
    )]
    Renamed {
        /// The new name.
        pipeline: String,
        /// The stream.
        stream: String,
        /// The table.
        target: String,
        /// The name in the ledger.
        before: String,
    },
    /// The pipeline has flushed this stream into another table.
    #[error(
        "pipeline {pipeline} has flushed {stream} into {before} until now, and is configured for {now}. If the table was renamed, \
         run `tidegate migrate --retarget {pipeline}`, which keeps the ledger; if it is another table, give the pipeline another \
         name: then everything that the stream retains is applied to it"
    )]
    Retargeted {
        /// The pipeline.
        pipeline: String,
        /// The stream.
        stream: String,
        /// The table in the ledger.
        before: String,
        /// The table of the configuration.
        now: String,
    },
    /// Two pipelines have swapped their streams.
    #[error(
        "pipeline {pipeline} has flushed {before} into {target} until now, and would read {stream}, which pipeline {other} has \
         read: have two pipelines swapped their streams? Everything that {stream} retains would be added to {target}. Put the \
         streams back, or give the pipeline another name"
    )]
    Swapped {
        /// The pipeline.
        pipeline: String,
        /// The stream of the configuration.
        stream: String,
        /// The table.
        target: String,
        /// The pipeline's stream in the ledger.
        before: String,
        /// Whose stream it is in the ledger.
        other: String,
    },
    /// The stream's Valkey had another name.
    #[error(
        "{stream} of this Valkey is flushed by pipeline {pipeline} under the name {before}, or was, and valkey.source is {now}: under another name the ledger is \
         empty, and what is delivered again would be added twice. Put valkey.source back; or, to give this Valkey another name, stop all daemons and run: update \
         tidegate.lanes set source = '{now}' where source = '{before}'"
    )]
    OtherSource {
        /// The pipeline.
        pipeline: String,
        /// The stream.
        stream: String,
        /// The Valkey's name in the ledger, or that of a daemon at work.
        before: String,
        /// Its name in the configuration.
        now: String,
    },
    /// Another daemon is at work on this pipeline with other columns or fields.
    #[error(
        "pipeline {pipeline} is being flushed by other daemons with {before}; this configuration has {now}. Stop them all first, or \
         give all daemons the same configuration"
    )]
    Remapped {
        /// The pipeline.
        pipeline: String,
        /// The mapping in the ledger.
        before: String,
        /// The mapping of the configuration.
        now: String,
    },
}

/// Whether a registration is written, or only checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Written.
    Yes,
    /// Only checked: nothing is changed yet.
    No,
}

/// What the ledger knows of the lanes of a pipeline, and of others that read its streams.
struct Registered {
    /// The pipeline's own lanes, by their streams: lane, target, mapping.
    own: HashMap<String, (LaneId, String, Option<String>)>,
    /// The streams of its lanes with the same target, in the order of their registration.
    same_target: Vec<String>,
    /// Other pipelines' lanes on its streams: pipeline and target, by stream.
    others: HashMap<String, Vec<(String, String)>>,
}

impl Registered {
    /// Reads it, in one query. All of these are of one pipeline.
    async fn of(connection: &mut PgConnection, identities: &[Identity]) -> Result<Registered, sqlx::Error> {
        let mut registered = Registered { own: HashMap::new(), same_target: Vec::new(), others: HashMap::new() };
        let Some(Identity { source, pipeline, target, .. }) = identities.first() else { return Ok(registered) };
        let streams: Vec<&str> = identities.iter().map(|identity| identity.stream.as_str()).collect();
        let rows = sqlx::query(
            "select lane, pipeline, stream, target, mapping from tidegate.lanes
             where source = $1 and (pipeline = $2 or stream = any($3)) order by lane",
        )
        .bind(source)
        .bind(pipeline)
        .bind(streams)
        .fetch_all(connection)
        .await?;
        for row in &rows {
            let text = |column| row.try_get::<String, _>(column);
            let (its_pipeline, its_stream, its_target) = (text("pipeline")?, text("stream")?, text("target")?);
            if its_pipeline != *pipeline {
                registered.others.entry(its_stream).or_default().push((its_pipeline, its_target));
                continue;
            }
            if its_target == *target {
                registered.same_target.push(its_stream.clone());
            }
            registered.own.insert(its_stream, (row.try_get("lane")?, its_target, row.try_get("mapping")?));
        }
        Ok(registered)
    }

    /// Whether a lane fits what the ledger knows; its number, if it has one.
    fn judge(&self, identity: &Identity, others_alive: bool) -> Result<LaneId, Unregistered> {
        let Identity { pipeline, stream, target, mapping, .. } = identity.clone();
        let (own, others) = (self.own.get(&stream), self.others.get(&stream).map_or(&[][..], Vec::as_slice));
        if let Some((before, _)) = others.iter().find(|(_, its_target)| *its_target == target) {
            return Err(Unregistered::Renamed { pipeline, stream, target, before: before.clone() });
        }
        let former_stream = self.same_target.iter().rfind(|other| **other != stream);
        match (own, former_stream, others.last()) {
            (Some((_, before, _)), ..) if *before != target => {
                Err(Unregistered::Retargeted { pipeline, stream, before: before.clone(), now: target })
            }
            (Some((_, _, Some(before))), ..) if *before != mapping && others_alive => {
                Err(Unregistered::Remapped { pipeline, before: before.clone(), now: mapping })
            }
            (None, Some(before), Some((other, _))) => {
                let (before, other) = (before.clone(), other.clone());
                Err(Unregistered::Swapped { pipeline, stream, target, before, other })
            }
            (own, ..) => Ok(own.map_or(UNREGISTERED, |(lane, ..)| *lane)),
        }
    }
}

/// Which of a pipeline's lanes are registered with another mapping, by their places: whether other daemons are at work on these must be known before
/// they are registered with the new one.
pub async fn remapped(connection: &mut PgConnection, identities: &[Identity]) -> Result<Vec<usize>, sqlx::Error> {
    let registered = Registered::of(connection, identities).await?;
    let differs = |identity: &Identity| match registered.own.get(&identity.stream) {
        Some((_, _, Some(mapping))) => *mapping != identity.mapping,
        _ => false,
    };
    Ok((0..identities.len()).filter(|n| differs(&identities[*n])).collect())
}

/// Which lanes other sources have on streams of the same names, of a pipeline of the same name with the same table: those of streams of which this source has
/// no lane yet. Each with the place of its stream and its source. All of these are of one pipeline.
pub async fn of_other_sources(
    connection: &mut PgConnection,
    identities: &[Identity],
) -> Result<Vec<(usize, LaneId, String)>, sqlx::Error> {
    let Some(Identity { source, pipeline, target, .. }) = identities.first() else { return Ok(Vec::new()) };
    let streams: Vec<&str> = identities.iter().map(|identity| identity.stream.as_str()).collect();
    let rows: Vec<(i64, LaneId, String)> = sqlx::query_as(
        "select s.n, l.lane, l.source
         from unnest($4::text[]) with ordinality s (stream, n)
         join tidegate.lanes l on l.stream = s.stream and l.source <> $1 and l.pipeline = $2 and l.target = $3
         where not exists (select from tidegate.lanes o where o.source = $1 and o.pipeline = $2 and o.stream = s.stream)
         order by s.n, l.lane",
    )
    .bind(source)
    .bind(pipeline)
    .bind(target)
    .bind(streams)
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|(n, lane, other)| (n.unsigned_abs() as usize - 1, lane, other)).collect())
}

/// Registers the lanes of a pipeline, or finds them, all in two statements; gives their numbers, in their order. `others_alive`: of which of them other
/// daemons may be at work, by their places. If one does not fit, none is registered.
pub async fn register(
    connection: &mut PgConnection,
    identities: &[Identity],
    others_alive: &BTreeSet<usize>,
    record: Record,
) -> Result<Result<Vec<LaneId>, Unregistered>, sqlx::Error> {
    let registered = Registered::of(connection, identities).await?;
    let judged = identities.iter().enumerate();
    let judged: Result<Vec<LaneId>, Unregistered> =
        judged.map(|(n, identity)| registered.judge(identity, others_alive.contains(&n))).collect();
    let (known, Some(Identity { source, pipeline, target, mapping, .. })) = (judged, identities.first()) else {
        return Ok(Ok(Vec::new()));
    };
    if known.is_err() || record == Record::No {
        return Ok(known);
    }
    // One statement, so that of two daemons that start at once the later one wins, and stops the other's flushes; in one order, so that the two do not
    // wait for each other.
    let streams: Vec<&str> = identities.iter().map(|identity| identity.stream.as_str()).collect();
    let rows: Vec<(LaneId, String)> = sqlx::query_as(
        "insert into tidegate.lanes (source, pipeline, stream, target, mapping)
         select $1, $2, s.stream, $4, $5 from unnest($3::text[]) as s (stream) order by s.stream
         on conflict (source, pipeline, stream) do update set mapping = excluded.mapping
         returning lane, stream",
    )
    .bind(source)
    .bind(pipeline)
    .bind(&streams)
    .bind(target)
    .bind(mapping)
    .fetch_all(connection)
    .await?;
    let lanes: HashMap<&str, LaneId> = rows.iter().map(|(lane, stream)| (stream.as_str(), *lane)).collect();
    Ok(Ok(streams.iter().map(|stream| lanes.get(stream).copied().unwrap_or(UNREGISTERED)).collect()))
}

/// A pipeline's shards, and those that it had when there were more of them, or fewer, or one alone: what their streams still hold is its own.
pub async fn shards(
    connection: &mut PgConnection,
    source: &str,
    pipeline: &Pipeline,
) -> Result<Vec<Shard>, sqlx::Error> {
    let query = "select stream from tidegate.lanes where source = $1 and pipeline = $2 and target = $3 order by lane";
    let query = sqlx::query_scalar::<_, String>(query).bind(source).bind(&pipeline.name);
    let registered = query.bind(pipeline.table.to_string()).fetch_all(connection).await?;
    let former = registered.into_iter().filter(|stream| pipeline.had(stream)).map(|stream| pipeline.shard(stream));
    Ok(pipeline.shards().into_iter().chain(former).collect())
}

/// The lane of a shard, if it is registered.
pub async fn find(connection: &mut PgConnection, identity: &Identity) -> Result<Option<LaneId>, sqlx::Error> {
    sqlx::query_scalar("select lane from tidegate.lanes where source = $1 and pipeline = $2 and stream = $3")
        .bind(&identity.source)
        .bind(&identity.pipeline)
        .bind(&identity.stream)
        .fetch_optional(connection)
        .await
}

/// The pipelines and streams that the ledger knows of a deployment.
pub async fn names(connection: &mut PgConnection, source: &str) -> Result<Vec<(String, String)>, sqlx::Error> {
    let names = "select distinct pipeline, stream from tidegate.lanes where source = $1 order by 1, 2";
    sqlx::query_as(names).bind(source).fetch_all(connection).await
}

/// Gives a pipeline's lanes its new name; gives their streams.
pub async fn rename(
    connection: &mut PgConnection,
    source: &str,
    old: &str,
    new: &str,
) -> Result<Vec<String>, sqlx::Error> {
    let rename = "update tidegate.lanes set pipeline = $3 where source = $1 and pipeline = $2 returning stream";
    sqlx::query_scalar(rename).bind(source).bind(old).bind(new).fetch_all(connection).await
}

/// Gives a pipeline's lanes their new table; gives their streams.
pub async fn retarget(
    connection: &mut PgConnection,
    source: &str,
    pipeline: &str,
    target: &str,
) -> Result<Vec<String>, sqlx::Error> {
    let retarget = "update tidegate.lanes set target = $3 where source = $1 and pipeline = $2 returning stream";
    sqlx::query_scalar(retarget).bind(source).bind(pipeline).bind(target).fetch_all(connection).await
}

/// Gives everything below `line` up to the trimmer, in all lanes of the stream. To be called before each cut: what is
/// missing above the line was lost, and what is missing below it was trimmed.
pub async fn raise_trim_line(
    connection: &mut PgConnection,
    source: &str,
    stream: &str,
    line: EntryId,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update tidegate.lanes set trimmed_below = greatest(trimmed_below, $3::numeric)
         where source = $1 and stream = $2",
    )
    .bind(source)
    .bind(stream)
    .bind(line.number().to_string())
    .execute(connection)
    .await?;
    Ok(())
}

/// What was given up to the trimmer, in this lane: everything below this id.
pub async fn trimmed_below(connection: &mut PgConnection, lane: LaneId) -> Result<EntryId, sqlx::Error> {
    let line = "select trimmed_below::text from tidegate.lanes where lane = $1";
    let line: String = sqlx::query_scalar(line).bind(lane).fetch_one(connection).await?;
    line.parse().map(EntryId::from_number).map_err(|e| sqlx::Error::Decode(format!("{line} is no id: {e}").into()))
}
