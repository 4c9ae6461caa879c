//! Workloads: the same seeded deltas for everybody.
//!
//! Takes a name and a number of entries; gives them one by one, loads them into a stream, and knows their sum. Fails with
//! what the socket says.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use tidegate::ops::bench::load::Load;

/// Entries sent before their replies are awaited.
const PIPELINE: usize = 1_000;

/// How keys are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// What it is called on the command line and in file names.
    pub name: &'static str,
    /// What it is called in a title.
    pub title: &'static str,
    keys: u64,
    skew: Option<f64>,
    /// Whether Valkey writes an append-only file, which reaches the disk every second.
    pub aof: bool,
}

/// All there are.
pub const ALL: [Workload; 5] = [
    HOT,
    MANY,
    Workload { name: "10m", title: "10,000,000 keys, uniform, append-only file", keys: 10_000_000, ..MANY },
    Workload { name: "hot-no-aof", title: "1,000 keys, Zipf (s = 1), no append-only file", aof: false, ..HOT },
    Workload { name: "100k-no-aof", title: "100,000 keys, uniform, no append-only file", aof: false, ..MANY },
];
const HOT: Workload = Workload {
    name: "hot",
    title: "1,000 keys, Zipf (s = 1), append-only file",
    keys: 1_000,
    skew: Some(1.0),
    aof: true,
};
const MANY: Workload =
    Workload { name: "100k", title: "100,000 keys, uniform, append-only file", keys: 100_000, skew: None, aof: true };

impl Workload {
    /// The entries: a row's key and an amount from 1 to 9.
    pub fn entries(self, count: usize) -> impl Iterator<Item = (String, i64)> {
        let Workload { keys, skew, .. } = self;
        let load = Load { keys, skew, amounts: 1..=9, id_bytes: 6..=40, seed: 1 };
        load.deltas().take(count)
    }

    /// Adds the entries to a stream.
    pub fn load(self, port: u16, stream: &str, count: usize) -> std::io::Result<()> {
        let mut socket = TcpStream::connect(("127.0.0.1", port))?;
        let mut entries = self.entries(count);
        let mut replies = vec![0; 64 << 10];
        loop {
            let (mut commands, mut sent) = (Vec::new(), 0);
            for (id, amount) in entries.by_ref().take(PIPELINE) {
                let amount = amount.to_string();
                encode(&mut commands, &["XADD", stream, "*", "id", &id, "amount", &amount]);
                sent += 1;
            }
            if sent == 0 {
                return Ok(());
            }
            socket.write_all(&commands)?;
            // Each reply is one string: `$15`, and an id.
            while sent > 0 {
                let length = socket.read(&mut replies)?;
                sent -= replies[..length].iter().filter(|byte| **byte == b'$').count();
            }
        }
    }

    /// What the table must hold of the first entries: the sum of all amounts, and the number of rows.
    pub fn expected(self, count: usize) -> (i64, i64) {
        let mut rows: HashMap<String, i64> = HashMap::new();
        self.entries(count).for_each(|(id, amount)| *rows.entry(id).or_insert(0) += amount);
        (rows.values().sum(), rows.len() as i64)
    }
}

/// Sends one command and waits for the first of its reply.
pub fn command(port: u16, parts: &[&str]) -> std::io::Result<()> {
    let mut socket = TcpStream::connect(("127.0.0.1", port))?;
    let mut text = Vec::new();
    encode(&mut text, parts);
    socket.write_all(&text)?;
    socket.read(&mut [0; 100]).map(drop)
}

/// Writes a command as a server takes it.
pub fn encode(out: &mut Vec<u8>, parts: &[&str]) {
    out.extend(format!("*{}\r\n", parts.len()).bytes());
    for part in parts {
        out.extend(format!("${}\r\n{part}\r\n", part.len()).bytes());
    }
}
