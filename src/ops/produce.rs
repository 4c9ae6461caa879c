//! `tidegate produce`: lines in, increments out.
//!
//! Takes lines `id` or `id amount` from files or standard input, as they come and in their order; gives one increment
//! for each ([`crate::client`]), and a summary. A line that makes no sense, or that its counter refuses, is reported and
//! passed over. It stops where going on would be wrong: when nobody can say whether a line was counted, when Valkey takes
//! none, or when told to; then it says which lines are in doubt and where the rest begins.
//!
//! `source` reads, `line` cuts and judges, `summary` counts and tells.

mod line;
mod source;
mod summary;

use std::io::{self, IsTerminal};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use self::source::{Source, read};
use self::summary::{Progress, Summary};
use super::complete::{Name, by};
use super::context::one_of_counters;
use super::{Context, Exit, Failure};
use crate::client::Producer;
use crate::config::Needs;
use crate::model::pipeline::Pipeline;
use crate::retry::advised;
use crate::telemetry::trace::parse_traceparent;
use crate::valkey::Endpoint;

/// How many lines are sent before their answers are counted: some 16 ms of work, and what is at stake when it is cut off.
const CHUNK_LINES: usize = 4096;

/// With a limited rate, how many chunks a second: often enough to look even.
const CHUNKS_PER_SECOND: usize = 20;

/// Adds to counters, a line each: `id`, or `id amount` (a whole number, 1 if left out).
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Opts {
    /// Files to read, in this order; `-`, or none at all, is standard input
    #[arg(value_name = "FILES")]
    pub files: Vec<PathBuf>,

    /// The pipeline whose stream takes the entries
    #[arg(long, value_name = "NAME", default_value = "counters", add = by(Name::CounterPipeline))]
    pub pipeline: String,

    /// No progress bar, and no summary if every line was added
    #[arg(long, short)]
    pub quiet: bool,

    /// The W3C trace context that each entry carries, such as "$TRACEPARENT": the trace of the flush that stores it links to this one
    #[arg(long, value_name = "TRACEPARENT", value_parser = traceparent)]
    pub traceparent: Option<String>,

    /// At most this many lines a second
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
}

/// A trace context as it is written into entries.
fn traceparent(text: &str) -> Result<String, &'static str> {
    let is_sound = parse_traceparent(text.as_bytes()).is_some();
    is_sound
        .then(|| text.to_owned())
        .ok_or("write 00-<32 hexadecimal digits>-<16>-<2>, in lower case, neither id all zeros")
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::VALKEY)?;
    let pipeline = one_of_counters(&config, Some(&opts.pipeline))?.clone();
    Ok(produce(opts, config.valkey.address()?, pipeline).await)
}

/// Adds what the files have to this pipeline's counters; gives the exit code.
///
/// 0: every line was added. 65: some lines are bad or were refused. 66: a file cannot be read. 69 or 75: Valkey was out
/// of reach, or some lines may or may not have been added. 77: Valkey refuses the user. 78: the stream's key holds another type. 130: Ctrl-C.
pub async fn produce(opts: Opts, address: Endpoint, pipeline: Pipeline) -> Exit {
    let sources = match opts.files.iter().map(|path| Source::find(path)).collect::<Result<Vec<_>, _>>() {
        Ok(sources) if sources.is_empty() => vec![Source::stdin()],
        Ok(sources) => sources,
        Err(why) => {
            eprintln!("tidegate produce: {why}");
            return Exit::NoInput;
        }
    };
    let producer = match Producer::connect(&address, &pipeline).await {
        Ok(producer) => producer,
        Err(fault) => {
            eprintln!("tidegate produce: {}; nothing was sent", advised(&fault));
            return Exit::from(&fault);
        }
    };
    let producer = opts.traceparent.as_deref().map_or(producer.clone(), |context| producer.traced(context));
    let progress = Progress::new(!opts.quiet && io::stderr().is_terminal(), &sources);
    // For people: with several shards, the stream of each.
    let streams = match pipeline.shards {
        0 | 1 => pipeline.stream.clone(),
        shards => format!("{}:{{0…{}}}", pipeline.stream, shards - 1),
    };
    let summary = feed(&producer, &streams, sources, opts.rate, &progress).await;
    progress.clear();
    let code = summary.exit_code();
    if !opts.quiet || code != Exit::Ok {
        eprint!("{summary}");
    }
    code
}

/// Sends what a thread of its own reads, one chunk at a time: so the lines in doubt, if any, are the last ones sent.
async fn feed(
    producer: &Producer,
    stream: &str,
    sources: Vec<Source>,
    rate: Option<NonZeroU32>,
    progress: &Progress,
) -> Summary {
    let started = Instant::now();
    let mut summary = Summary::of(stream);
    let mut due = started;
    let per_second = rate.map(|rate| rate.get() as usize);
    let chunk_lines = per_second.map_or(CHUNK_LINES, |rate| (rate / CHUNKS_PER_SECOND).clamp(1, CHUNK_LINES));
    let (sender, mut chunks) = mpsc::channel(1);
    // A thread, not a task: a read of a terminal cannot be cancelled, and must not keep the process from ending.
    thread::spawn(move || read(sources, chunk_lines, &sender));

    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let next = async {
            let chunk = chunks.recv().await;
            tokio::time::sleep_until(due).await;
            chunk
        };
        let chunk = tokio::select! {
            biased;
            _ = &mut stop => {
                summary.interrupted = true;
                break;
            }
            chunk = next => chunk,
        };
        match chunk {
            None => break,
            Some(Err(why)) => {
                summary.unreadable = Some(why);
                break;
            }
            Some(Ok(chunk)) => {
                if let Some(rate) = per_second {
                    // From now, not from when it was due: a pause in the input is not made up for by a burst.
                    due = Instant::now() + Duration::from_secs_f64(chunk.increments.len() as f64 / rate as f64);
                }
                let outcomes = producer.add_many(&chunk.increments).await;
                let goes_on = summary.count(&chunk, outcomes);
                summary.elapsed = started.elapsed();
                progress.advance(chunk.bytes, &summary);
                if goes_on.is_break() {
                    break;
                }
            }
        }
    }
    summary.elapsed = started.elapsed();
    summary
}
