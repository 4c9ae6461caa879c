//! What producers did, and what they were told: the one side of the books.

use std::collections::BTreeMap;

use tidegate_lab::harness::{Client, Resp, STREAM};

/// Counters that a round adds to.
pub const COUNTERS: u32 = 200;
/// Writers of a round.
pub const WRITERS: u32 = 4;
/// One in so many entries cannot be applied, and must be found among the dead letters.
const BAD: u32 = 499;

/// What a producer knows of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Valkey said that it is there.
    Acked,
    /// The answer did not come.
    Unknown,
    /// Valkey said that it is not.
    Refused,
}

/// One entry, as it was meant: all of it follows from its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meant {
    pub round: u32,
    pub writer: u32,
    pub n: u32,
}

impl Meant {
    pub fn counter(&self) -> u32 {
        self.scramble() % COUNTERS
    }

    /// No two entries of a round have the same, so that whatever is missing or too much tells which one it was.
    pub fn delta(&self) -> i64 {
        1 + i64::from(self.writer) + i64::from(WRITERS) * i64::from(self.n)
    }

    pub fn is_bad(&self) -> bool {
        (self.scramble() / COUNTERS).is_multiple_of(BAD)
    }

    pub fn key(&self) -> String {
        key(self.round, self.counter())
    }

    pub fn op(&self) -> String {
        format!("{}-{}-{}", self.round, self.writer, self.n)
    }

    pub fn of_op(op: &str) -> Option<Meant> {
        let mut parts = op.split('-').map(|part| part.parse().ok());
        Some(Meant { round: parts.next()??, writer: parts.next()??, n: parts.next()?? })
    }

    fn scramble(&self) -> u32 {
        let bytes = [self.round, self.writer, self.n].map(u32::to_le_bytes).concat();
        tidegate::model::entry::digest(&bytes) as u32
    }

    /// INCRBY and XADD in one MULTI; a bad one has nothing that INCRBY could take.
    fn commands(&self) -> Vec<Vec<String>> {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect();
        let (key, delta, op) = (self.key(), self.delta(), self.op());
        let mut commands = vec![words("MULTI")];
        if self.is_bad() {
            commands.push(words(&format!("XADD {STREAM} * id {key} amount bad{delta} op {op} even false doc {{}}")));
        } else {
            commands.push(words(&format!("INCRBY counter:{key} {delta}")));
            let (even, doc) = (delta % 2 == 0, format!("{{\"w{}\":{}}}", self.writer, self.n));
            commands.push(words(&format!("XADD {STREAM} * id {key} amount {delta} op {op} even {even} doc {doc}")));
        }
        commands.push(words("EXEC"));
        commands
    }
}

/// The key of a counter of a round.
pub fn key(round: u32, counter: u32) -> String {
    format!("r{round}:{counter}")
}

/// What one writer did in a round.
#[derive(Debug)]
pub struct Writer {
    round: u32,
    writer: u32,
    outcomes: Vec<Outcome>,
}

impl Writer {
    pub fn new(round: u32, writer: u32) -> Writer {
        Writer { round, writer, outcomes: Vec::new() }
    }

    /// Adds so many entries over this connection, never one twice. Without an answer they are unknown, and the error is
    /// returned.
    pub async fn write(&mut self, client: &mut Client, count: u32) -> std::io::Result<()> {
        let first = self.outcomes.len() as u32;
        let meant = (first..first + count).map(|n| Meant { round: self.round, writer: self.writer, n });
        let commands: Vec<Vec<Vec<String>>> = meant.map(|m| m.commands()).collect();
        let replies = client.try_pipeline(&commands.concat()).await;
        let Ok(replies) = replies else {
            self.outcomes.extend((0..count).map(|_| Outcome::Unknown));
            return replies.map(drop);
        };
        let mut at = 0;
        for commands in &commands {
            at += commands.len();
            let done =
                matches!(&replies[at - 1], Resp::Array(parts) if !parts.iter().any(|p| matches!(p, Resp::Error(_))));
            self.outcomes.push(if done { Outcome::Acked } else { Outcome::Refused });
        }
        Ok(())
    }
}

/// All writers of a round.
#[derive(Debug, Default)]
pub struct Journal {
    outcomes: BTreeMap<u32, Vec<Outcome>>,
}

impl Journal {
    pub fn of(writers: impl IntoIterator<Item = Writer>) -> Journal {
        Journal { outcomes: writers.into_iter().map(|w| (w.writer, w.outcomes)).collect() }
    }

    /// Each entry that was attempted, and what became of it.
    pub fn entries(&self, round: u32) -> impl Iterator<Item = (Meant, Outcome)> {
        self.outcomes.iter().flat_map(move |(writer, outcomes)| {
            outcomes.iter().zip(0..).map(move |(outcome, n)| (Meant { round, writer: *writer, n }, *outcome))
        })
    }

    pub fn attempted(&self, writer: u32) -> usize {
        self.outcomes.get(&writer).map_or(0, Vec::len)
    }
}
