//! Durations and bytes as people write them.
//!
//! Takes a text and gives a value, or a value and gives the text that reads back as the same. Pure; a text that is not
//! exactly one value is refused.

use std::time::Duration;

/// The longest text of a duration: within it no sum of units overflows.
const MAX_DURATION_TEXT: usize = 20;

/// Whether this is a number of any kind, for advice.
pub(super) fn is_number(text: &str) -> bool {
    !text.is_empty() && text.parse::<f64>().is_ok()
}

/// Digits and nothing else: no sign, no blank, no fraction.
pub(super) fn parse_whole(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// In whole milliseconds: a server that takes milliseconds must get exactly what was written.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let time = (text.len() <= MAX_DURATION_TEXT).then(|| humantime::parse_duration(text).ok())??;
    (time.subsec_nanos() % 1_000_000 == 0).then_some(time)
}

/// Whole bytes, or a whole number of a unit that is a power of 1024.
pub(super) fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim_start() {
        "" if unit.is_empty() => 1,
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    parse_whole(number)?.checked_mul(scale)
}

/// A duration as people write it, exact: `1h 30m`, `300ms`.
pub(super) fn show_duration(time: Duration) -> String {
    let mut rest = time.as_millis();
    let mut parts = Vec::new();
    for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
        let count = rest / size;
        rest %= size;
        if count > 0 {
            parts.push(format!("{count}{unit}"));
        }
    }
    if parts.is_empty() { "0s".into() } else { parts.join(" ") }
}

/// Bytes in the largest unit that is exact.
pub(super) fn show_bytes(bytes: u64) -> String {
    [("GiB", 30), ("MiB", 20), ("KiB", 10)]
        .into_iter()
        .find(|(_, shift)| bytes > 0 && bytes.is_multiple_of(1 << shift))
        .map_or_else(|| format!("{bytes}B"), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_shown_of_a_duration_reads_back_as_the_same(count in 0u64..u64::from(u32::MAX)) {
            prop_assert_eq!(humantime::parse_duration(&show_duration(Duration::from_millis(count))).ok(), Some(Duration::from_millis(count)));
        }

        #[test]
        fn what_is_shown_of_bytes_reads_back_as_the_same(bytes in 1u64..u64::MAX >> 10, shift in 0u32..10) {
            prop_assert_eq!(parse_bytes(&show_bytes(bytes << shift)), Some(bytes << shift));
        }
    }
}
