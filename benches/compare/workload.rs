//! Workloads: the same seeded deltas for everybody.
//!
//! Takes a name and a number of entries; gives them one by one, loads them into a stream, and knows their sum. Fails with
//! what the socket says.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Entries sent before their replies are awaited.
const PIPELINE: usize = 1_000;
/// Lengths of ids, in bytes.
const ID_BYTES: std::ops::RangeInclusive<usize> = 6..=40;

/// How keys are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// What it is called on the command line and in file names.
    pub name: &'static str,
    /// What it is called in a title.
    pub title: &'static str,
    keys: u64,
    zipf: bool,
}

/// All there are.
pub const ALL: [Workload; 3] = [
    Workload { name: "hot", title: "1,000 keys, Zipf (s = 1)", keys: 1_000, zipf: true },
    Workload { name: "100k", title: "100,000 keys, uniform", keys: 100_000, zipf: false },
    Workload { name: "10m", title: "10,000,000 keys, uniform", keys: 10_000_000, zipf: false },
];

impl Workload {
    /// The entries: a row's key and an amount from 1 to 9.
    pub fn entries(self, count: usize) -> impl Iterator<Item = (String, i64)> {
        let mut random = StdRng::seed_from_u64(0x7164_6761_7465);
        let ladder: Vec<f64> = if self.zipf {
            (1..=self.keys).scan(0.0, |sum, rank| Some((*sum += 1.0 / rank as f64, *sum).1)).collect()
        } else {
            Vec::new()
        };
        (0..count).map(move |_| {
            let key = match ladder.last() {
                Some(top) => {
                    let drawn = random.random_range(0.0..*top);
                    ladder.partition_point(|step| *step < drawn) as u64
                }
                None => random.random_range(0..self.keys),
            };
            (id(key), random.random_range(1..=9))
        })
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

/// A key's id: always the same one, of 6 to 40 bytes.
fn id(key: u64) -> String {
    let spread = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let length = ID_BYTES.start() + (spread % (ID_BYTES.end() - ID_BYTES.start() + 1) as u64) as usize;
    let mut id = format!("{key:06}");
    id.extend("/articles/2026/11/how-the-tide-came-in".chars().take(length.saturating_sub(id.len())));
    id
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
