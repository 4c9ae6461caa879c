//! Read: what the page shows of pipelines, streams, workers and the configuration.
//!
//! Takes what `tidegate status` and `config show` compute; gives it in bounded pieces. Fails where the servers have not answered in time, ever.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use serde_json::{Value, json};

use super::answer::{Refused, document};
use super::ask::Words;
use super::history::EVERY;
use super::look::Taken;
use super::{Console, Settings, locked};
use crate::ops::config;
use crate::ops::dead::select::Piece;
use crate::ops::observe::valkey::Consumer;
use crate::ops::status::report::{Flow, PipelineStatus, Process, StreamStatus};

/// So many reasons, and so many pipelines, an overview has at the most.
const REASONS: usize = 50;
const PIPELINES: usize = 200;
/// So many consumers and processes one stream is shown with.
const OF_A_STREAM: usize = 20;

type Configured = Extension<Arc<Settings>>;

/// Rows of a table, and how many there are in all.
#[derive(Serialize)]
struct Rows<T> {
    total: usize,
    rows: Vec<T>,
}

impl<T> Rows<T> {
    fn of(all: impl Iterator<Item = T>, piece: Piece) -> Rows<T> {
        let (mut total, mut rows) = (0, Vec::new());
        let shown = piece.skip as usize..piece.skip as usize + piece.limit as usize;
        for row in all {
            if shown.contains(&total) {
                rows.push(row);
            }
            total += 1;
        }
        Rows { total, rows }
    }
}

#[derive(Serialize)]
struct PipelineLine<'a> {
    name: &'a str,
    table: &'a str,
    delivery: &'a str,
    /// As the daemon tells it that is worst off; none where no daemon is seen.
    state: Option<&'a str>,
    paused: Option<bool>,
    dead_letters: Option<u64>,
    #[serde(flatten)]
    flow: Flow,
    streams: usize,
    processes: usize,
}

impl PipelineLine<'_> {
    fn of(pipeline: &PipelineStatus) -> PipelineLine<'_> {
        let mut processes: Vec<&str> =
            pipeline.streams.iter().flat_map(|s| s.processes.iter().map(|p| p.process.as_str())).collect();
        processes.sort_unstable();
        processes.dedup();
        PipelineLine {
            name: &pipeline.name,
            table: &pipeline.table,
            delivery: pipeline.delivery,
            state: pipeline
                .streams
                .iter()
                .flat_map(|s| s.processes.iter().map(|p| p.state))
                .max_by_key(|state| worse(state)),
            paused: pipeline.paused,
            dead_letters: pipeline.dead_letters,
            flow: pipeline.flow,
            streams: pipeline.streams.len(),
            processes: processes.len(),
        }
    }
}

/// How bad a daemon's state is.
fn worse(state: &str) -> u8 {
    match state {
        "halted" => 3,
        "interrupted" => 2,
        "paused" => 1,
        _ => 0,
    }
}

/// Something of a stream, with the names of both.
#[derive(Serialize)]
struct Of<'a, T> {
    pipeline: &'a str,
    stream: &'a str,
    #[serde(flatten)]
    what: &'a T,
}

async fn taken(settings: &Settings) -> Result<Arc<Taken>, Refused> {
    settings.watcher.status().await.ok_or_else(|| {
        let words = "the servers have not answered in time; metrics, health and this page's charts do not need them";
        Refused::new(StatusCode::GATEWAY_TIMEOUT, words)
    })
}

/// `GET /api/status`: the verdict, its reasons, and each pipeline's sums.
pub(super) async fn status(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    Words::of(query.as_deref()).end()?;
    let taken = taken(&settings).await?;
    let status = &taken.status;
    let reasons = &status.reasons[..status.reasons.len().min(REASONS)];
    let pipelines: Vec<PipelineLine<'_>> = status.pipelines.iter().take(PIPELINES).map(PipelineLine::of).collect();
    Ok(document(&json!({
        "taken_ms_ago": taken.at.elapsed().as_millis() as u64,
        "verdict": status.verdict,
        "reasons": reasons,
        "reasons_total": status.reasons.len(),
        "valkey": status.valkey,
        "postgres": status.postgres,
        "ledger_bytes": status.ledger_bytes,
        "pipelines": pipelines,
        "pipelines_total": status.pipelines.len(),
    })))
}

/// `GET /api/streams`: the streams of one pipeline.
pub(super) async fn streams(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let (piece, name) = (words.piece()?, words.one("pipeline")?);
    words.end()?;
    let taken = taken(&settings).await?;
    let pipelines =
        taken.status.pipelines.iter().filter(|pipeline| name.as_ref().is_none_or(|name| pipeline.name == *name));
    let streams = pipelines.flat_map(|pipeline| &pipeline.streams);
    let rows = Rows::of(streams, piece);
    let cut = |stream: &StreamStatus| {
        let mut stream = stream.clone();
        stream.consumers.truncate(OF_A_STREAM);
        stream.processes.truncate(OF_A_STREAM);
        stream
    };
    Ok(document(&Rows { total: rows.total, rows: rows.rows.into_iter().map(cut).collect() }))
}

/// `GET /api/workers`: each daemon, stream by stream, as it describes itself.
pub(super) async fn workers(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let piece = words.piece()?;
    words.end()?;
    let taken = taken(&settings).await?;
    let all = of_streams(&taken, |stream| &stream.processes);
    Ok(document(&Rows::<Of<'_, Process>>::of(all.into_iter(), piece)))
}

/// `GET /api/consumers`: the members of the groups, those that hold most first.
pub(super) async fn consumers(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let piece = words.piece()?;
    words.end()?;
    let taken = taken(&settings).await?;
    let mut all = of_streams(&taken, |stream| &stream.consumers);
    all.sort_by_key(|consumer| std::cmp::Reverse(consumer.what.entries));
    Ok(document(&Rows::<Of<'_, Consumer>>::of(all.into_iter(), piece)))
}

fn of_streams<T>(taken: &Taken, of: impl Fn(&StreamStatus) -> &Vec<T>) -> Vec<Of<'_, T>> {
    let streams =
        taken.status.pipelines.iter().flat_map(|pipeline| pipeline.streams.iter().map(move |s| (pipeline, s)));
    let named = streams.flat_map(|(pipeline, stream)| {
        of(stream).iter().map(|what| Of { pipeline: &pipeline.name, stream: &stream.stream, what })
    });
    named.collect()
}

/// `GET /api/history`: what each pipeline's numbers were; `after` leaves out what is known.
pub(super) async fn history(State(console): State<Console>, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let after = words.parsed("after")?.unwrap_or(0);
    words.end()?;
    let history = locked(&console.0.history);
    let pipelines: Value = serde_json::to_value(history.after(after)).unwrap_or_default();
    Ok(document(&json!({ "every_ms": EVERY.as_millis() as u64, "pipelines": pipelines })))
}

/// `GET /api/config`: every key with its value and its origin, secrets hidden; `find` keeps those whose name has it, `changed=true` those that are
/// set somewhere.
pub(super) async fn config(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let piece = words.piece()?;
    let find = words.one("find")?.unwrap_or_default().to_lowercase();
    let only_changed = words.parsed::<bool>("changed")?.unwrap_or(false);
    words.end()?;
    let meant = config::Settings::of(&settings.loaded, |row| {
        row.key.to_lowercase().contains(&find) && (!only_changed || row.origin != "default")
    });
    Ok(document(&Rows::of(meant.settings.into_iter(), piece)))
}
