//! `tidegate size`: how much memory, disk and time a load needs, before there is a server.
//!
//! Takes a rate, a number of counters and the outage to survive; writes what Valkey and PostgreSQL need for them. It connects to nothing,
//! and fails only when it cannot write. Every constant is a measurement that docs/scaling.md tells how to repeat.

use std::fmt::Write;
use std::time::Duration;

use super::{Context, Exit, Failure};

/// Bytes of a stream's entry with the fields of a producer that sets `op`: 30 in Valkey 9.1, 57 in 8.0. Without `op`, 26.
const ENTRY_BYTES: u64 = 57;
/// Bytes of a counter in Valkey: a key of 20 bytes and a number; 64 in Valkey 8.0, 58 in 9.1.
const COUNTER_BYTES: u64 = 64;
/// Bytes in the append-only file for one increment with its entry, in a MULTI or a script.
const APPENDED_BYTES: u64 = 207;
/// Bytes of a row of the default table (fillfactor 50) and of its primary key, with keys of 13 bytes.
const ROW_BYTES: u64 = 122 + 32;
/// Bytes of write-ahead log for a row that is updated: the most, where a checkpoint came before it and its whole page is logged.
const LOGGED_BYTES_AT_MOST: u64 = 522;
/// The same for a row whose page was logged before.
const LOGGED_BYTES_AT_LEAST: u64 = 104;
/// Tenths of bytes of the ledger for each settled entry that the stream still holds.
const LEDGER_TENTHS: u64 = 84;
/// What one stream and one table settle on two cores, which both servers and the workers share: entries a second, with few counters …
const SETTLED_PER_SECOND_FEW: u64 = 200_000;
/// … and with many.
const SETTLED_PER_SECOND_MANY: u64 = 120_000;
/// From so many counters on an increment seldom meets another one of its row in a batch.
const MANY_COUNTERS: u64 = 10_000;
/// What is left free of Valkey's memory: fragmentation, clients' buffers.
const HEADROOM_PERCENT: u64 = 25;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Increments a second, all producers together, at the busiest time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub rate: u64,
    /// How many different counters there are
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000))]
    pub counters: u64,
    /// The longest outage of PostgreSQL, or of all workers, that Valkey is to hold entries for
    #[arg(long, value_name = "DURATION", value_parser = at_most_a_year)]
    pub outage: Duration,
    /// How long settled entries stay in the stream: trim.retention of the configuration
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = at_most_a_year)]
    pub retention: Duration,
    /// Bytes of one entry in Valkey; measure yours with MEMORY USAGE and XLEN of the stream
    #[arg(long, value_name = "BYTES", default_value_t = ENTRY_BYTES, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub entry_bytes: u64,
}

fn at_most_a_year(text: &str) -> Result<Duration, String> {
    let refused = || format!("{text:?} is no duration up to 365d: write a number and a unit, such as 90m or 4h");
    let time = humantime::parse_duration(text).map_err(|_| refused())?;
    if time <= Duration::from_secs(365 * 86_400) { Ok(time) } else { Err(refused()) }
}

/// What a load needs. Bytes, unless said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizing {
    /// Entries that nobody settled at the end of the outage.
    backlog: u128,
    stream: u128,
    counters: u128,
    /// What `maxmemory` should be.
    valkey: u128,
    appended_a_second: u128,
    table: u128,
    ledger: u128,
    /// At the least, where all rows are hot, and at the most, where each increment is a row of its own.
    logged_a_second: (u128, u128),
    /// What is settled a second beside what comes in; none where it does not keep up.
    spare: Option<u64>,
    /// How many streams with tables or partitions of their own would keep up with twice the rate.
    shards: u64,
}

impl Sizing {
    fn of(opts: &Opts) -> Sizing {
        let wide = |value: u64| u128::from(value);
        let entries = |time: Duration| wide(opts.rate) * time.as_millis() / 1000;
        let (backlog, retained) = (entries(opts.outage), entries(opts.retention));
        let stream = (backlog + retained) * wide(opts.entry_bytes);
        let counters = wide(opts.counters) * wide(COUNTER_BYTES);
        let settled = if opts.counters < MANY_COUNTERS { SETTLED_PER_SECOND_FEW } else { SETTLED_PER_SECOND_MANY };
        Sizing {
            backlog,
            stream,
            counters,
            valkey: (stream + counters) * wide(100 + HEADROOM_PERCENT) / 100,
            appended_a_second: wide(opts.rate) * wide(APPENDED_BYTES),
            table: wide(opts.counters) * wide(ROW_BYTES),
            // What is settled after the outage is in the stream, too, until it is trimmed.
            ledger: (backlog + retained) * wide(LEDGER_TENTHS) / 10,
            logged_a_second: (
                wide(opts.rate.min(opts.counters)) * wide(LOGGED_BYTES_AT_LEAST),
                wide(opts.rate) * wide(LOGGED_BYTES_AT_MOST),
            ),
            spare: settled.checked_sub(opts.rate).filter(|spare| *spare > 0),
            shards: (2 * opts.rate).div_ceil(settled),
        }
    }
}

/// Runs the verb.
pub fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    context.write(&told(&opts).map_err(|error| Failure::new(Exit::Error, error.to_string()))?)?;
    Ok(Exit::Ok)
}

/// The calculation, for people.
fn told(opts: &Opts) -> Result<String, std::fmt::Error> {
    let (sizing, mut out) = (Sizing::of(opts), String::new());
    let mut line = |what: &str, how_much: String, why: &str| writeln!(out, "  {what:<34}{how_much:>14}  {why}");
    let (retention, outage) = (humantime::format_duration(opts.retention), humantime::format_duration(opts.outage));
    line("Valkey", String::new(), "")?;
    line("  stream", bytes(sizing.stream), &format!("entries of {retention} and an outage of {outage}"))?;
    line("  counters", bytes(sizing.counters), &format!("{COUNTER_BYTES} bytes each"))?;
    line("  maxmemory, at least", bytes(sizing.valkey), &format!("{HEADROOM_PERCENT} % more, with noeviction"))?;
    line("  append-only file, a second", bytes(sizing.appended_a_second), "before it is rewritten")?;
    line("PostgreSQL", String::new(), "")?;
    line("  table and its index", bytes(sizing.table), "fillfactor 50, so that updates stay in their page")?;
    line("  ledger", bytes(sizing.ledger), "after the outage; it shrinks with the stream")?;
    let (least, most) = sizing.logged_a_second;
    line("  write-ahead log, a second", bytes(least.min(most)), "about, if batches coalesce well")?;
    line("  write-ahead log, at most", bytes(most), "if each increment is a row of its own, after a checkpoint")?;
    line("After an outage", String::new(), "")?;
    line("  backlog", count(sizing.backlog), "entries")?;
    match sizing.spare {
        Some(spare) => {
            let drain = Duration::from_secs((sizing.backlog / u128::from(spare)).min(u128::from(u32::MAX)) as u64);
            let drain = humantime::format_duration(drain.max(Duration::from_secs(1))).to_string();
            line("  it drains in", drain, &format!("with {} entries/s to spare, on two cores", count(spare.into())))?;
        }
        None => line("  it drains", "never".into(), "one stream on two cores does not keep up: see below")?,
    }
    if sizing.shards > 1 {
        let why = "with tables or partitions of their own: one stream is too slow to catch up well";
        line("  streams", count(sizing.shards.into()), why)?;
    }
    writeln!(
        out,
        "\nMeasured figures, on two cores that all shared (docs/scaling.md); run `tidegate bench` on your servers."
    )?;
    Ok(out)
}

/// In the largest unit that leaves a number above one.
fn bytes(bytes: u128) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u128 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// With a comma between thousands.
fn count(count: u128) -> String {
    let digits = count.to_string();
    let grouped = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group).into_owned());
    grouped.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn opts(rate: u64, counters: u64, outage_s: u64) -> Opts {
        let (outage, retention) = (Duration::from_secs(outage_s), Duration::from_secs(3600));
        Opts { rate, counters, outage, retention, entry_bytes: ENTRY_BYTES }
    }

    #[test]
    fn an_outage_of_four_hours_at_ten_thousand_a_second() {
        let sizing = Sizing::of(&opts(10_000, 1_000_000, 4 * 3600));
        assert_eq!(sizing.backlog, 144_000_000);
        assert_eq!(sizing.stream, 180_000_000 * 57);
        assert_eq!(sizing.counters, 64_000_000);
        assert_eq!(sizing.valkey, (10_260_000_000 + 64_000_000) * 5 / 4);
        assert_eq!(sizing.ledger, 1_512_000_000);
        assert_eq!(sizing.table, 154_000_000);
        assert_eq!((sizing.spare, sizing.shards), (Some(110_000), 1));
        let text = told(&opts(10_000, 1_000_000, 4 * 3600)).expect("text");
        for needed in ["12.0 GiB", "144,000,000", "21m 49s", "entries of 1h and an outage of 4h"] {
            assert!(text.contains(needed), "{needed}: {text}");
        }
        assert!(!text.contains("streams "), "{text}");
    }

    #[test]
    fn a_rate_that_one_stream_cannot_keep_up_with_is_told() {
        let text = told(&opts(300_000, 100, 60)).expect("text");
        assert!(text.contains("never") && text.contains("with tables or partitions of their own"), "{text}");
        assert_eq!(Sizing::of(&opts(300_000, 100, 60)).shards, 3);
    }

    #[test]
    fn a_duration_needs_a_unit_and_a_limit() {
        for bad in ["4", "", "soon", "366d", "-1h"] {
            assert!(at_most_a_year(bad).expect_err(bad).contains("such as 90m or 4h"), "{bad}");
        }
        assert_eq!(at_most_a_year("0s"), Ok(Duration::ZERO));
    }

    proptest! {
        #[test]
        fn no_load_overflows(rate in 1u64..=1_000_000_000, counters in 1u64..=1_000_000_000_000, outage_s in 0u64..=31_536_000) {
            let told = told(&opts(rate, counters, outage_s)).expect("text");
            prop_assert!(told.lines().count() >= 15, "{}", told);
        }
    }
}
