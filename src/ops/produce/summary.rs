//! Summary: what became of the lines, for people, with the exit code.
//!
//! Takes chunks with the outcome of each increment; gives the counts, the first few lines that were not added, which are in doubt and where the rest begins.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::source::{Chunk, Source};
use crate::client::{Added, NotAdded};
use crate::ops::Exit;
use crate::retry::{Fault, advised};

/// How many rejected lines the summary shows.
pub(super) const SHOWN_LINES: usize = 20;

/// How many characters of a rejected line are shown, escaped.
pub(super) const SHOWN_CHARACTERS: usize = 60;

/// A line that was not added, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) line: u64,
    pub(super) reason: String,
}

impl Rejected {
    pub(super) fn new(line: u64, reason: &impl fmt::Display, content: &[u8]) -> Rejected {
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
pub(super) struct Summary {
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
    pub(super) unreadable: Option<String>,
    pub(super) interrupted: bool,
    /// The last line that was dealt with.
    last: Option<(Arc<str>, u64)>,
    pub(super) elapsed: Duration,
}

impl Summary {
    /// Of nothing yet, into this stream.
    pub(super) fn of(stream: &str) -> Summary {
        Summary { stream: stream.to_owned(), ..Summary::default() }
    }

    /// Counts a chunk's outcomes; breaks if no other chunk should be sent.
    pub(super) fn count(&mut self, chunk: &Chunk, outcomes: Vec<Result<Added, NotAdded>>) -> ControlFlow<()> {
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
                        self.stopped_by.get_or_insert_with(|| fault.clone().about(&self.stream));
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

    pub(super) fn exit_code(&self) -> Exit {
        if self.interrupted {
            Exit::Interrupted
        } else if self.unknown.count > 0 {
            Exit::Retry
        } else if let Some(exit @ (Exit::NoPermission | Exit::Config)) = self.stopped_by.as_ref().map(Exit::from) {
            // To run it again is of no use until somebody has acted.
            exit
        } else if self.untaken.count > 0 {
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
            writeln!(f, "stopped: {}", advised(fault))?;
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
pub(super) struct Progress(Option<ProgressBar>);

impl Progress {
    pub(super) fn new(visible: bool, sources: &[Source]) -> Progress {
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

    pub(super) fn advance(&self, bytes: u64, summary: &Summary) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
            let (sent, rate) = (HumanCount(summary.sent), HumanCount(summary.lines_per_second()));
            bar.set_message(format!("{sent} lines, {rate}/s"));
        }
    }

    pub(super) fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::BadLine;
    use super::*;
    use proptest::prelude::*;

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
        fn no_bytes_make_showing_a_line_panic(bytes: Vec<u8>) {
            let _ = Rejected::new(1, &BadLine::NotText, &bytes);
        }
    }
}
