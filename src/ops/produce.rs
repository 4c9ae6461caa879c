//! `tidegate produce`: lines become increments.
//!
//! Each line is `id` or `id amount`. Lines are read as they come, never whole; what cannot be read is reported by number, and
//! the rest goes through.

use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use super::Exit;
use crate::produce::{CHUNK, ProduceError, Producer};
use crate::shutdown::Signals;

/// A longer line is bad.
const MAX_LINE_BYTES: usize = 1 << 20;
/// Read at once.
const READ_BYTES: usize = 64 << 10;
/// How many calls are under way at once.
const IN_FLIGHT: usize = 16;
/// How many bad lines are told one by one.
const TOLD: usize = 20;
/// How much of a bad line is shown.
const SHOWN: usize = 60;

/// What can be said on the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Files with lines `id` or `id amount`; without any, standard input
    pub files: Vec<PathBuf>,
    /// The pipeline whose stream is fed
    #[arg(long, default_value = "counters", value_name = "NAME")]
    pub pipeline: String,
    /// At most so many increments a second
    #[arg(long, value_name = "N")]
    pub rate: Option<std::num::NonZeroU32>,
    /// No progress bar
    #[arg(long, short)]
    pub quiet: bool,
}

/// Where a line stands.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    file: String,
    line: u64,
}

/// Lines read together.
#[derive(Debug, Default)]
struct Chunk {
    increments: Vec<(Place, String, i64)>,
    bad: Vec<(Place, String)>,
}

/// What became of the lines.
#[derive(Debug, Default)]
struct Summary {
    added: u64,
    sum: i128,
    bad: u64,
    refused: u64,
    unknown: u64,
    told: Vec<String>,
    first_unknown: Option<Place>,
}

impl Summary {
    fn tell(&mut self, place: &Place, why: &str) {
        if self.told.len() < TOLD {
            self.told.push(format!("{}:{}: {why}", place.file, place.line));
        }
    }

    fn take(&mut self, chunk: &Chunk, outcomes: &[Result<crate::produce::Added, ProduceError>]) {
        for (place, why) in &chunk.bad {
            self.bad += 1;
            self.tell(place, why);
        }
        for ((place, _, amount), outcome) in chunk.increments.iter().zip(outcomes) {
            match outcome {
                Ok(_) => {
                    self.added += 1;
                    self.sum += i128::from(*amount);
                }
                Err(ProduceError::Refused(why)) => {
                    self.refused += 1;
                    self.tell(place, why);
                }
                Err(ProduceError::Unknown(_)) => {
                    self.unknown += 1;
                    self.first_unknown.get_or_insert_with(|| place.clone());
                }
            }
        }
    }

    fn exit(&self, interrupted: bool) -> Exit {
        match self {
            _ if self.unknown > 0 => Exit::Retry,
            _ if interrupted => Exit::Interrupted,
            _ if self.bad + self.refused > 0 => Exit::BadInput,
            _ => Exit::Ok,
        }
    }
}

/// Runs the verb.
pub async fn run(args: &Args, producer: &Producer) -> std::io::Result<Exit> {
    let mut signals = Signals::listen()?;
    let (sender, mut chunks) = mpsc::channel(IN_FLIGHT);
    let files = args.files.clone();
    // Files and pipes have no readiness to wait for: a thread reads them.
    let reading = std::thread::spawn(move || read_all(&files, &sender));
    let bar = progress_bar(args.quiet);
    let (started, mut summary, mut under_way) = (Instant::now(), Summary::default(), FuturesUnordered::new());
    let (mut sent, mut interrupted, mut ended) = (0u64, false, false);
    while !(ended && under_way.is_empty()) {
        tokio::select! {
            signal = signals.next(), if !interrupted => {
                bar.suspend(|| tell(&format!("{signal}: reading no more")));
                (interrupted, ended) = (true, true);
            }
            Some((chunk, outcomes)) = under_way.next() => {
                let (chunk, outcomes): (Chunk, Vec<_>) = (chunk, outcomes);
                bar.inc(chunk.increments.len() as u64);
                summary.take(&chunk, &outcomes);
                // Nothing more goes into a broken connection.
                ended |= summary.unknown > 0;
            }
            chunk = chunks.recv(), if !ended && under_way.len() < IN_FLIGHT => {
                let Some(chunk): Option<Chunk> = chunk else {
                    ended = true;
                    continue;
                };
                sent += chunk.increments.len() as u64;
                let wait = args.rate.map_or(Duration::ZERO, |rate| {
                    Duration::from_secs_f64(sent as f64 / f64::from(rate.get())).saturating_sub(started.elapsed())
                });
                under_way.push(async move {
                    tokio::time::sleep(wait).await;
                    let increments: Vec<(&str, i64)> = chunk.increments.iter().map(|(_, id, n)| (&**id, *n)).collect();
                    let outcomes = producer.add_many(&increments).await;
                    (chunk, outcomes)
                });
            }
        }
    }
    bar.finish_and_clear();
    drop(chunks);
    // A thread that waits for a terminal's next line is left behind.
    let failed = if interrupted || summary.unknown > 0 { None } else { reading.join().ok().and_then(Result::err) };
    report(&summary, started.elapsed());
    if let Some((file, error)) = failed {
        tell(&format!("{file}: {error}"));
        return Ok(Exit::Error);
    }
    Ok(summary.exit(interrupted))
}

fn report(summary: &Summary, elapsed: Duration) {
    summary.told.iter().for_each(|line| tell(line));
    let untold = (summary.bad + summary.refused).saturating_sub(summary.told.len() as u64);
    if untold > 0 {
        tell(&format!("… and {untold} more"));
    }
    let seconds = elapsed.as_secs_f64();
    tell(&format!(
        "added {} increments, {} in sum, in {seconds:.2} s ({:.0}/s); {} bad lines, {} refused, {} unknown",
        summary.added,
        summary.sum,
        summary.added as f64 / seconds.max(0.001),
        summary.bad,
        summary.refused,
        summary.unknown
    ));
    if let Some(place) = &summary.first_unknown {
        tell(&format!(
            "the connection was lost: increments from {}:{} on may or may not have happened, and none behind them was \
             tried; to send them again may count them twice",
            place.file, place.line
        ));
    }
}

fn tell(line: &str) {
    // If stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn progress_bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {human_pos} increments, {per_sec}, {elapsed}") {
        bar.set_style(style);
    }
    bar
}

/// Reads all files, or standard input; ends early when nobody takes the lines.
fn read_all(files: &[PathBuf], to: &mpsc::Sender<Chunk>) -> Result<(), (String, std::io::Error)> {
    if files.is_empty() {
        let mut stdin = BufReader::with_capacity(READ_BYTES, std::io::stdin().lock());
        return read_lines("stdin", &mut stdin, to).map_err(|e| ("stdin".into(), e));
    }
    for file in files {
        let name = file.display().to_string();
        let opened = std::fs::File::open(file).map_err(|e| (name.clone(), e))?;
        read_lines(&name, &mut BufReader::with_capacity(READ_BYTES, opened), to).map_err(|e| (name, e))?;
    }
    Ok(())
}

fn read_lines(file: &str, from: &mut BufReader<impl Read>, to: &mpsc::Sender<Chunk>) -> std::io::Result<()> {
    let (mut chunk, mut bytes, mut line) = (Chunk::default(), Vec::new(), 0);
    loop {
        bytes.clear();
        // One byte more than is allowed tells a long line from one that just fits.
        let length = Read::take(&mut *from, MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut bytes)?;
        line += 1;
        if length > 0 {
            let place = Place { file: file.to_owned(), line };
            if length > MAX_LINE_BYTES && bytes.last() != Some(&b'\n') {
                from.skip_until(b'\n')?;
                chunk.bad.push((place, format!("longer than {MAX_LINE_BYTES} bytes")));
            } else {
                match parse(&bytes) {
                    Ok(Some((id, amount))) => chunk.increments.push((place, id.to_owned(), amount)),
                    Ok(None) => {}
                    Err(why) => chunk.bad.push((place, format!("{why}: {}", shown(&bytes)))),
                }
            }
        }
        // A slow pipe is not waited for: what there is goes off when the buffer is empty, or the chunk is full.
        let full = chunk.increments.len() + chunk.bad.len() >= CHUNK;
        let waiting = from.buffer().is_empty();
        if (length == 0 || full || waiting) && to.blocking_send(std::mem::take(&mut chunk)).is_err() || length == 0 {
            return Ok(());
        }
    }
}

/// `id`, or `id amount`; nothing for a blank line.
fn parse(line: &[u8]) -> Result<Option<(&str, i64)>, &'static str> {
    let text = std::str::from_utf8(line).map_err(|_| "not UTF-8")?;
    if text.contains('\0') {
        return Err("an id cannot hold a NUL");
    }
    let mut words = text.split_whitespace();
    let (id, amount, more) = (words.next(), words.next(), words.next());
    match (id, amount, more) {
        (None, ..) => Ok(None),
        (Some(id), None, _) => Ok(Some((id, 1))),
        (Some(id), Some(amount), None) => {
            amount.parse().map(|amount| Some((id, amount))).map_err(|_| "the amount is not a whole number of 64 bits")
        }
        (Some(_), Some(_), Some(_)) => Err("more than an id and an amount"),
    }
}

/// The beginning of a line, harmless on a terminal.
fn shown(line: &[u8]) -> String {
    let line = line.trim_ascii();
    let mut text: String = line.escape_ascii().map(char::from).take(SHOWN).collect();
    if line.escape_ascii().count() > SHOWN {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_an_id_and_perhaps_an_amount() {
        assert_eq!(parse(b"a\n"), Ok(Some(("a", 1))));
        assert_eq!(parse(b" a\t-3 \r\n"), Ok(Some(("a", -3))));
        assert_eq!(parse(b"7"), Ok(Some(("7", 1))));
        assert_eq!(parse(b" \r\n"), Ok(None));
    }

    #[test]
    fn what_is_not_is_bad_and_shown_harmlessly() {
        for bad in [&b"a b"[..], b"a 1.5", b"a 1 2", b"\xff", b"a\0", b"a 9223372036854775808"] {
            assert!(parse(bad).is_err(), "{}", shown(bad));
        }
        assert_eq!(shown(b"\x1b[2J\n"), "\\x1b[2J");
        assert_eq!(shown(&[b'x'; 100]).chars().count(), SHOWN + 1);
    }

    #[test]
    fn lines_are_counted_and_long_ones_skipped_without_being_held() {
        let mut input = b"a\n".to_vec();
        input.extend(std::iter::repeat_n(b'x', MAX_LINE_BYTES * 2));
        input.extend_from_slice(b"\nb 2");
        let (sender, mut receiver) = mpsc::channel(4);
        read_lines("f", &mut BufReader::with_capacity(READ_BYTES * 100, &input[..]), &sender).expect("readable");
        let chunk = receiver.try_recv().expect("one chunk");
        let place = |line| Place { file: "f".into(), line };
        assert_eq!(chunk.increments, [(place(1), "a".to_owned(), 1), (place(3), "b".to_owned(), 2)]);
        assert_eq!(chunk.bad.iter().map(|(place, _)| place.line).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn the_exit_code_tells_the_worst() {
        let summary = |bad, unknown| Summary { bad, unknown, ..Summary::default() };
        assert_eq!(summary(0, 0).exit(false), Exit::Ok);
        assert_eq!(summary(1, 0).exit(false), Exit::BadInput);
        assert_eq!(summary(1, 0).exit(true), Exit::Interrupted);
        assert_eq!(summary(1, 1).exit(true), Exit::Retry);
    }
}
