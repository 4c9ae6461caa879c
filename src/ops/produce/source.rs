//! Source: files and standard input, read in chunks of lines.
//!
//! Takes paths; gives chunks, each of one source and in order, from a thread of its own. Fails with the name of what cannot be read.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::line::{BadLine, Splitter, parse_line};
use super::summary::{Rejected, SHOWN_LINES};

/// How much is read at once. What one read brings is sent at once, so that a slow pipe is not held up by a full chunk.
const READ_BYTES: usize = 64 * 1024;

/// Where lines come from.
#[derive(Debug, Clone)]
pub(super) struct Source {
    name: Arc<str>,
    /// None is standard input.
    path: Option<PathBuf>,
    /// What is known of its size.
    pub(super) bytes: Option<u64>,
}

impl Source {
    pub(super) fn stdin() -> Source {
        Source { name: "stdin".into(), path: None, bytes: None }
    }

    /// Looks before anything is sent, so that a misspelt second file does not end the work half way.
    pub(super) fn find(path: &Path) -> Result<Source, String> {
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
pub(super) struct Chunk {
    pub(super) source: Arc<str>,
    pub(super) increments: Vec<(String, i64)>,
    /// The number of each increment's line.
    pub(super) lines: Vec<u64>,
    /// The first few bad lines, and how many there are.
    pub(super) bad: Vec<Rejected>,
    pub(super) bad_count: u64,
    /// The last line it covers.
    pub(super) last_line: u64,
    /// How many bytes the progress bar moves by.
    pub(super) bytes: u64,
}

impl Chunk {
    pub(super) fn push(&mut self, line: u64, content: Result<&[u8], BadLine>, beginning: &[u8]) {
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
pub(super) fn read(sources: Vec<Source>, chunk_lines: usize, chunks: &mpsc::Sender<Result<Chunk, String>>) {
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
