//! `tidegate produce`: lines in, increments out.
//!
//! Takes lines `id` or `id amount` from files or standard input, as they come and in their order; gives one increment
//! for each ([`crate::client`]), and a summary. A line that makes no sense, or that its counter refuses, is reported and
//! passed over. It stops where going on would be wrong: when nobody can say whether a line was counted, when Valkey takes
//! none, or when told to; then it says which lines are in doubt and where the rest begins.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::context::one_of_counters;
use super::{Context, Exit, Failure};
use crate::client::{Added, NotAdded, Producer};
use crate::config::Needs;
use crate::model::entry::Malformed;
use crate::model::pipeline::Pipeline;
use crate::model::row::parse_amount;
use crate::retry::{Fault, advised};
use crate::telemetry::trace::parse_traceparent;
use crate::valkey::Endpoint;

/// A line beyond this is skipped, and never held in memory as a whole.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// How many lines are sent before their answers are counted: some 16 ms of work, and what is at stake when it is cut off.
const CHUNK_LINES: usize = 4096;

/// With a limited rate, how many chunks a second: often enough to look even.
const CHUNKS_PER_SECOND: usize = 20;

/// How much is read at once. What one read brings is sent at once, so that a slow pipe is not held up by a full chunk.
const READ_BYTES: usize = 64 * 1024;

/// How many rejected lines the summary shows.
const SHOWN_LINES: usize = 20;

/// How many characters of a rejected line are shown, escaped.
const SHOWN_CHARACTERS: usize = 60;

/// Adds to counters, a line each: `id`, or `id amount` (a whole number, 1 if left out).
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Opts {
    /// Files to read, in this order; `-`, or none at all, is standard input
    #[arg(value_name = "FILES")]
    pub files: Vec<PathBuf>,

    /// The pipeline whose stream takes the entries
    #[arg(long, value_name = "NAME", default_value = "counters")]
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
/// 0: every line was added. 65: some lines are bad or were refused. 66: a file cannot be read. 75: Valkey was out of
/// reach, or some lines may or may not have been added. 78: Valkey refuses the credentials. 130: Ctrl-C.
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
    let mut summary = Summary { stream: stream.to_owned(), ..Summary::default() };
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

/// Where lines come from.
#[derive(Debug, Clone)]
struct Source {
    name: Arc<str>,
    /// None is standard input.
    path: Option<PathBuf>,
    /// What is known of its size.
    bytes: Option<u64>,
}

impl Source {
    fn stdin() -> Source {
        Source { name: "stdin".into(), path: None, bytes: None }
    }

    /// Looks before anything is sent, so that a misspelt second file does not end the work half way.
    fn find(path: &Path) -> Result<Source, String> {
        if path == Path::new("-") {
            return Ok(Source::stdin());
        }
        let name = path.display().to_string();
        let metadata = fs::metadata(path).map_err(|e| format!("cannot read {name}: {e}"))?;
        if metadata.is_dir() {
            return Err(format!("cannot read {name}: it is a directory"));
        }
        let bytes = metadata.is_file().then_some(metadata.len());
        Ok(Source { name: name.into(), path: Some(path.to_owned()), bytes })
    }

    fn open(&self) -> io::Result<Box<dyn Read>> {
        Ok(match &self.path {
            Some(path) => Box::new(File::open(path)?),
            None => Box::new(io::stdin()),
        })
    }
}

/// Some lines of one source, in order, ready to be sent.
#[derive(Debug, Default)]
struct Chunk {
    source: Arc<str>,
    increments: Vec<(String, i64)>,
    /// The number of each increment's line.
    lines: Vec<u64>,
    /// The first few bad lines, and how many there are.
    bad: Vec<Rejected>,
    bad_count: u64,
    /// The last line it covers.
    last_line: u64,
    /// How many bytes the progress bar moves by.
    bytes: u64,
}

/// A line that was not added, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rejected {
    line: u64,
    reason: String,
}

impl Rejected {
    fn new(line: u64, reason: &impl fmt::Display, content: &[u8]) -> Rejected {
        let mut shown = String::new();
        for part in content.utf8_chunks() {
            shown.extend(part.valid().chars().flat_map(char::escape_debug));
            shown.extend(part.invalid().escape_ascii().map(char::from));
        }
        if let Some((end, _)) = shown.char_indices().nth(SHOWN_CHARACTERS) {
            shown.truncate(end);
            shown.push('…');
        }
        Rejected { line, reason: format!("{reason}: \"{shown}\"") }
    }
}

impl Chunk {
    fn push(&mut self, line: u64, content: Result<&[u8], BadLine>, beginning: &[u8]) {
        self.last_line = line;
        match content.and_then(parse_line) {
            Ok(None) => {}
            Ok(Some((id, amount))) => {
                self.increments.push((id.to_owned(), amount));
                self.lines.push(line);
            }
            Err(why) => {
                self.bad_count += 1;
                if self.bad.len() < SHOWN_LINES {
                    self.bad.push(Rejected::new(line, &why, beginning));
                }
            }
        }
    }
}

/// Reads the sources to their end, or until nobody takes the chunks any more.
fn read(sources: Vec<Source>, chunk_lines: usize, chunks: &mpsc::Sender<Result<Chunk, String>>) {
    for source in sources {
        let sent = source.open().and_then(|input| read_one(&source.name, input, chunk_lines, chunks));
        match sent {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => return,
            Err(e) => {
                // If nobody takes it, nobody wants to know.
                let _ = chunks.blocking_send(Err(format!("cannot read {}: {e}", source.name)));
                return;
            }
        }
    }
}

fn read_one(
    name: &Arc<str>,
    mut input: impl Read,
    chunk_lines: usize,
    chunks: &mpsc::Sender<Result<Chunk, String>>,
) -> io::Result<ControlFlow<()>> {
    let mut splitter = Splitter::default();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let length = match input.read(&mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            length => length?,
        };
        let mut ready = vec![Chunk { source: Arc::clone(name), ..Chunk::default() }];
        splitter.feed(&buffer[..length], |line, content, beginning| {
            if ready.last().is_none_or(|chunk| chunk.increments.len() >= chunk_lines) {
                ready.push(Chunk { source: Arc::clone(name), ..Chunk::default() });
            }
            if let Some(chunk) = ready.last_mut() {
                chunk.push(line, content, beginning);
            }
        });
        if let Some(chunk) = ready.last_mut() {
            chunk.bytes = length as u64;
        }
        for chunk in ready {
            if chunk.last_line > 0 && chunks.blocking_send(Ok(chunk)).is_err() {
                return Ok(ControlFlow::Break(()));
            }
        }
        if length == 0 {
            return Ok(ControlFlow::Continue(()));
        }
    }
}

/// Cuts a source's bytes into lines, however they come. Pure.
#[derive(Debug, Default)]
struct Splitter {
    /// The line whose end has not come yet; of one that is too long, its beginning.
    partial: Vec<u8>,
    too_long: bool,
    /// The number of the last complete line.
    line: u64,
}

impl Splitter {
    /// What a file may begin with, and no line does.
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

    /// Takes the next bytes (none: the end); gives each line that they complete, its number, and its beginning.
    fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(u64, Result<&[u8], BadLine>, &[u8])) {
        if bytes.is_empty() && (self.too_long || !self.partial.is_empty()) {
            self.complete(&[], &mut each);
        }
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.complete(&bytes[..end], &mut each);
            bytes = &bytes[end + 1..];
        }
        self.keep(bytes);
    }

    fn keep(&mut self, part: &[u8]) {
        if self.too_long {
            return;
        }
        self.partial.extend_from_slice(part);
        if self.partial.len() > MAX_LINE_BYTES {
            self.too_long = true;
            self.partial.truncate(4 * SHOWN_CHARACTERS);
            self.partial.shrink_to_fit();
        }
    }

    fn complete(&mut self, end: &[u8], each: &mut impl FnMut(u64, Result<&[u8], BadLine>, &[u8])) {
        self.line += 1;
        let whole = if self.partial.is_empty() && end.len() <= MAX_LINE_BYTES {
            end
        } else {
            self.keep(end);
            &self.partial
        };
        let whole = if self.line == 1 { whole.strip_prefix(Self::BYTE_ORDER_MARK).unwrap_or(whole) } else { whole };
        let beginning = &whole[..whole.len().min(4 * SHOWN_CHARACTERS)];
        each(self.line, if self.too_long { Err(BadLine::TooLong) } else { Ok(whole) }, beginning);
        self.partial.clear();
        self.too_long = false;
    }
}

/// Reads `id` or `id amount`; a blank line is none.
fn parse_line(line: &[u8]) -> Result<Option<(&str, i64)>, BadLine> {
    let text = std::str::from_utf8(line).map_err(|_| BadLine::NotText)?;
    let mut words = text.split_ascii_whitespace();
    let Some(id) = words.next() else { return Ok(None) };
    let amount = words.next();
    if words.next().is_some() {
        return Err(BadLine::TooManyWords);
    }
    if id.contains('\0') {
        return Err(BadLine::Nul);
    }
    let amount = amount.map_or(Ok(1), |word| parse_amount(word.as_bytes())).map_err(BadLine::Amount)?;
    Ok(Some((id, amount)))
}

/// Why a line asks for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum BadLine {
    #[error("it is longer than {} bytes", MAX_LINE_BYTES)]
    TooLong,
    #[error("it is not UTF-8")]
    NotText,
    #[error("it has more than an id and an amount")]
    TooManyWords,
    #[error("the id contains NUL")]
    Nul,
    #[error("{0}")]
    Amount(Malformed),
}

/// Lines by their numbers, in order: as many spans as there are gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Spans {
    count: u64,
    spans: Vec<(u64, u64)>,
    /// Whether the last line counted belongs to the last span.
    open: bool,
}

impl Spans {
    fn push(&mut self, line: u64) {
        self.count += 1;
        match self.spans.last_mut() {
            Some((_, last)) if self.open => *last = line,
            _ => self.spans.push((line, line)),
        }
        self.open = true;
    }
}

impl fmt::Display for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.spans.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            if first == last { write!(f, "{comma}{first}")? } else { write!(f, "{comma}{first}-{last}")? }
        }
        Ok(())
    }
}

/// What became of the lines.
#[derive(Debug, Clone, Default)]
struct Summary {
    stream: String,
    sent: u64,
    added: u64,
    /// Of the amounts added.
    sum: i128,
    bad: u64,
    refused: u64,
    /// The first few bad or refused lines, with their source.
    shown: Vec<(Arc<str>, Rejected)>,
    /// The lines in doubt, all of the last chunk.
    unknown: Spans,
    /// The lines that Valkey would not take, all of the last chunk.
    untaken: Spans,
    /// Why it ended before the end.
    stopped_by: Option<Fault>,
    unreadable: Option<String>,
    interrupted: bool,
    /// The last line that was dealt with.
    last: Option<(Arc<str>, u64)>,
    elapsed: Duration,
}

impl Summary {
    /// Counts a chunk's outcomes; breaks if no other chunk should be sent.
    fn count(&mut self, chunk: &Chunk, outcomes: Vec<Result<Added, NotAdded>>) -> ControlFlow<()> {
        self.sent += outcomes.len() as u64;
        self.bad += chunk.bad_count;
        self.last = Some((Arc::clone(&chunk.source), chunk.last_line));
        let mut rejected = chunk.bad.clone();
        for ((outcome, (id, amount)), line) in outcomes.into_iter().zip(&chunk.increments).zip(&chunk.lines) {
            let why = match outcome {
                Ok(_) => {
                    self.added += 1;
                    self.sum += i128::from(*amount);
                    (self.unknown.open, self.untaken.open) = (false, false);
                    continue;
                }
                Err(why) => why,
            };
            self.unknown.open &= matches!(why, NotAdded::Unknown(_));
            self.untaken.open &= matches!(why, NotAdded::Unavailable(_));
            match &why {
                NotAdded::Unknown(fault) => {
                    self.unknown.push(*line);
                    self.stopped_by.get_or_insert_with(|| fault.clone());
                }
                NotAdded::Unavailable(fault) => {
                    self.untaken.push(*line);
                    self.stopped_by.get_or_insert_with(|| fault.clone());
                }
                NotAdded::BadId | NotAdded::CounterRefused(_) | NotAdded::StreamRefused(_) => {
                    // A stream that refuses one entry refuses the next as well.
                    if let NotAdded::StreamRefused(fault) = &why {
                        self.stopped_by.get_or_insert_with(|| fault.clone());
                    }
                    self.refused += 1;
                    if rejected.len() < 2 * SHOWN_LINES {
                        rejected.push(Rejected::new(*line, &why, id.as_bytes()));
                    }
                }
            }
        }
        rejected.sort_by_key(|rejected| rejected.line);
        rejected.truncate(SHOWN_LINES - self.shown.len().min(SHOWN_LINES));
        self.shown.extend(rejected.into_iter().map(|rejected| (Arc::clone(&chunk.source), rejected)));
        if self.stopped_by.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn exit_code(&self) -> Exit {
        if self.interrupted {
            Exit::Interrupted
        } else if self.unknown.count + self.untaken.count > 0 {
            Exit::Retry
        } else if self.unreadable.is_some() {
            Exit::NoInput
        } else if self.bad + self.refused > 0 {
            Exit::BadInput
        } else {
            Exit::Ok
        }
    }

    fn lines_per_second(&self) -> u64 {
        (self.sent as f64 / self.elapsed.as_secs_f64().max(0.001)) as u64
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elapsed = self.elapsed.as_secs_f64();
        writeln!(
            f,
            "added    {} (sum {}) in {elapsed:.1} s, {} lines/s",
            self.added,
            self.sum,
            self.lines_per_second()
        )?;
        writeln!(f, "refused  {}", self.refused)?;
        writeln!(f, "unknown  {}", self.unknown.count)?;
        writeln!(f, "bad      {}", self.bad)?;
        for (source, Rejected { line, reason }) in &self.shown {
            writeln!(f, "  {source}:{line}: {reason}")?;
        }
        let hidden = self.bad + self.refused - (self.shown.len() as u64).min(self.bad + self.refused);
        if hidden > 0 {
            writeln!(f, "  and {hidden} more")?;
        }
        if let Some(fault) = &self.stopped_by {
            writeln!(f, "stopped: {fault}")?;
        }
        if let Some(why) = &self.unreadable {
            writeln!(f, "stopped: {why}")?;
        }
        if self.interrupted {
            writeln!(f, "stopped: Ctrl-C")?;
        }
        let Some((source, last)) = &self.last else { return Ok(()) };
        if self.unknown.count > 0 {
            writeln!(
                f,
                "  may or may not have been added: {source}, {} lines: {}\n  \
                 if no one else adds, the end of the stream tells, for they were sent in order: XREVRANGE {} + - COUNT {}",
                self.unknown.count, self.unknown, self.stream, self.unknown.count
            )?;
        }
        if self.untaken.count > 0 {
            writeln!(f, "  certainly not added: {source}, {} lines: {}", self.untaken.count, self.untaken)?;
        }
        if self.stopped_by.is_some() || self.unreadable.is_some() || self.interrupted {
            writeln!(f, "  nothing after {source}:{last} was sent")?;
        }
        Ok(())
    }
}

/// The bar on a terminal; elsewhere nothing.
#[derive(Debug)]
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new(visible: bool, sources: &[Source]) -> Progress {
        if !visible {
            return Progress(None);
        }
        // With the sizes known, a bar; otherwise how much came so far.
        let bytes: Option<u64> = sources.iter().map(|source| source.bytes).sum();
        let (bar, template) = match bytes {
            Some(bytes) => (ProgressBar::new(bytes), "{wide_bar} {percent}% {msg}"),
            None => (ProgressBar::new_spinner(), "{spinner} {elapsed} {msg}"),
        };
        // A template that cannot be read leaves the default one: still a bar.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Progress(Some(bar))
    }

    fn advance(&self, bytes: u64, summary: &Summary) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
            let (sent, rate) = (HumanCount(summary.sent), HumanCount(summary.lines_per_second()));
            bar.set_message(format!("{sent} lines, {rate}/s"));
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The lines of `bytes` fed in `pieces`, as numbers and contents.
    fn split(bytes: &[u8], piece: usize) -> Vec<(u64, Result<Vec<u8>, BadLine>)> {
        let (mut splitter, mut lines) = (Splitter::default(), Vec::new());
        for part in bytes.chunks(piece).chain([&[][..]]) {
            splitter.feed(part, |line, content, _| lines.push((line, content.map(<[u8]>::to_vec))));
        }
        lines
    }

    #[test]
    fn a_line_is_an_id_or_an_id_and_an_amount() {
        assert_eq!(parse_line(b"a"), Ok(Some(("a", 1))));
        assert_eq!(parse_line(b"a 5"), Ok(Some(("a", 5))));
        assert_eq!(parse_line("\té\t -5 \r".as_bytes()), Ok(Some(("é", -5))));
        assert_eq!(parse_line(b"5"), Ok(Some(("5", 1))));
        assert_eq!(parse_line(b"a -9223372036854775808"), Ok(Some(("a", i64::MIN))));
    }

    #[test]
    fn a_blank_line_is_none() {
        for blank in ["", " ", "\r", "\t \r"] {
            assert_eq!(parse_line(blank.as_bytes()), Ok(None), "{blank:?}");
        }
    }

    #[test]
    fn a_line_that_makes_no_sense_says_why() {
        assert_eq!(parse_line(b"a b"), Err(BadLine::Amount(Malformed::AmountNotANumber)));
        assert_eq!(parse_line(b"a +1"), Err(BadLine::Amount(Malformed::AmountNotANumber)));
        assert_eq!(parse_line(b"a 9223372036854775808"), Err(BadLine::Amount(Malformed::AmountTooLarge)));
        assert_eq!(parse_line(b"a 1 2"), Err(BadLine::TooManyWords));
        assert_eq!(parse_line(b"\xff 1"), Err(BadLine::NotText));
        assert_eq!(parse_line(b"a\0b 1"), Err(BadLine::Nul));
    }

    #[test]
    fn the_last_line_needs_no_end_and_a_byte_order_mark_is_no_part_of_the_first() {
        let lines = split(b"\xef\xbb\xbfa\r\n\nb 2", 2);
        assert_eq!(lines, [(1, Ok(b"a\r".to_vec())), (2, Ok(vec![])), (3, Ok(b"b 2".to_vec()))]);
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_without_being_held() {
        let mut bytes = b"a\n".to_vec();
        bytes.resize(bytes.len() + MAX_LINE_BYTES + 1, b'x');
        bytes.extend_from_slice(b"\nb\n");
        for piece in [4096, READ_BYTES, bytes.len()] {
            let lines = split(&bytes, piece);
            assert_eq!(lines, [(1, Ok(b"a".to_vec())), (2, Err(BadLine::TooLong)), (3, Ok(b"b".to_vec()))]);
        }
        let mut splitter = Splitter::default();
        for _ in 0..100 {
            splitter.feed(&[b'x'; READ_BYTES], |_, _, _| {});
            assert!(splitter.partial.capacity() <= 2 * (MAX_LINE_BYTES + READ_BYTES));
        }
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_not_too_long() {
        let mut bytes = vec![b'x'; MAX_LINE_BYTES];
        bytes.push(b'\n');
        for piece in [4096, bytes.len()] {
            assert!(split(&bytes, piece)[0].1.is_ok());
        }
    }

    #[test]
    fn what_is_shown_of_a_line_is_short_and_harmless() {
        let rejected = Rejected::new(3, &BadLine::TooManyWords, "\x1b[2J".repeat(100).as_bytes());
        assert!(!rejected.reason.contains('\x1b'));
        assert!(Rejected::new(3, &BadLine::NotText, b"a\xff").reason.ends_with(r#""a\xff""#));
        assert!(rejected.reason.chars().count() <= BadLine::TooManyWords.to_string().len() + SHOWN_CHARACTERS + 6);
    }

    fn chunk(lines: std::ops::RangeInclusive<u64>) -> Chunk {
        Chunk {
            source: "a.txt".into(),
            increments: lines.clone().map(|line| (format!("id-{line}"), 2)).collect(),
            last_line: *lines.end(),
            lines: lines.collect(),
            ..Chunk::default()
        }
    }

    fn added() -> Result<Added, NotAdded> {
        Ok(Added { value: 1, entry: crate::model::entry::EntryId::MIN })
    }

    #[test]
    fn when_all_is_added_the_summary_says_how_much() {
        let mut summary = Summary::default();
        assert!(summary.count(&chunk(1..=3), vec![added(), added(), added()]).is_continue());
        assert_eq!((summary.added, summary.sum, summary.exit_code()), (3, 6, Exit::Ok));
    }

    #[test]
    fn a_refused_line_is_named_and_the_others_go_on() {
        let mut summary = Summary::default();
        let refusal = Fault::Valkey { code: "ERR".into(), message: "ERR would overflow".into() };
        let outcomes = vec![added(), Err(NotAdded::CounterRefused(refusal)), added()];
        assert!(summary.count(&chunk(1..=3), outcomes).is_continue());
        assert_eq!((summary.added, summary.refused, summary.exit_code()), (2, 1, Exit::BadInput));
        assert!(summary.to_string().contains("a.txt:2: the counter refuses it: Valkey: ERR would overflow: \"id-2\""));
    }

    #[test]
    fn lines_in_doubt_end_the_work_and_are_named_exactly() {
        let mut summary = Summary { stream: "flush:counters".into(), ..Summary::default() };
        let lost = Fault::ValkeyLost("cut".into());
        let unknown = || Err(NotAdded::Unknown(lost.clone()));
        let untaken = || Err(NotAdded::Unavailable(lost.clone()));
        let outcomes = vec![added(), unknown(), unknown(), added(), unknown(), untaken(), untaken()];
        assert!(summary.count(&chunk(10..=16), outcomes).is_break());
        assert_eq!(summary.exit_code(), Exit::Retry);
        let text = summary.to_string();
        assert!(text.contains("may or may not have been added: a.txt, 3 lines: 11-12, 14\n"), "{text}");
        assert!(text.contains("certainly not added: a.txt, 2 lines: 15-16\n"), "{text}");
        assert!(text.contains("nothing after a.txt:16 was sent\n"), "{text}");
    }

    #[test]
    fn only_the_first_few_rejected_lines_are_shown_and_the_others_counted() {
        let mut summary = Summary::default();
        for first in [1, 31] {
            let mut chunk = Chunk { source: "a.txt".into(), ..Chunk::default() };
            for line in first..first + 30 {
                chunk.push(line, Ok(b"a b c"), b"a b c");
            }
            assert!(summary.count(&chunk, Vec::new()).is_continue());
        }
        let text = summary.to_string();
        assert_eq!((summary.bad, text.matches("a.txt:").count()), (60, SHOWN_LINES), "{text}");
        assert!(text.contains("and 40 more"), "{text}");
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_bytes_come(bytes in "[ab \\n\\r]{0,200}", piece in 1usize..40) {
            let lines: Vec<Vec<u8>> = split(bytes.as_bytes(), piece).into_iter().filter_map(|(_, line)| line.ok()).collect();
            let mut expected: Vec<Vec<u8>> = bytes.split('\n').map(|line| line.as_bytes().to_vec()).collect();
            if expected.last().is_some_and(Vec::is_empty) {
                expected.pop();
            }
            prop_assert_eq!(lines, expected);
        }

        #[test]
        fn no_bytes_make_reading_a_line_panic(bytes: Vec<u8>) {
            let _ = parse_line(&bytes);
            let _ = Rejected::new(1, &BadLine::NotText, &bytes);
        }
    }
}
