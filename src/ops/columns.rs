//! Columns: data for people, aligned, on a terminal with colours where it takes them.
//!
//! Takes cells; gives text without trailing blanks. It cannot fail. Nothing of a stream reaches a terminal but through
//! [`printable`].

use std::fmt::Write;
use std::time::Duration;

/// Whether colours are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// With the terminal's own colours.
    Colours,
    /// Text alone.
    Plain,
}

/// What a line says of itself by its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// All is well.
    Good,
    /// Somebody should look.
    Warn,
    /// Somebody must act.
    Bad,
    /// A heading.
    Head,
}

/// A page being written.
#[derive(Debug)]
pub struct Page {
    text: String,
    paint: Paint,
}

impl Page {
    /// An empty one.
    pub fn new(paint: Paint) -> Page {
        Page { text: String::new(), paint }
    }

    /// What was written.
    pub fn into_text(self) -> String {
        self.text
    }

    /// A line.
    pub fn line(&mut self, line: impl AsRef<str>) {
        self.text.push_str(line.as_ref().trim_end());
        self.text.push('\n');
    }

    /// A line in a tone.
    pub fn toned(&mut self, tone: Tone, line: impl AsRef<str>) {
        let code = match tone {
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Head => "1",
        };
        match self.paint {
            Paint::Colours => self.line(format!("\x1b[{code}m{}\x1b[0m", line.as_ref().trim_end())),
            Paint::Plain => self.line(line),
        }
    }

    /// Lines of a heading and rows, in columns as wide as their widest cell. A column whose heading begins with `>` is aligned right.
    pub fn table(&mut self, heading: &[&str], rows: &[Vec<String>]) {
        let width = |column: usize, name: &str| {
            let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.max().unwrap_or(0).max(name.chars().count())
        };
        let columns: Vec<(bool, &str, usize)> = heading
            .iter()
            .enumerate()
            .map(|(n, name)| {
                let bare = name.strip_prefix('>').unwrap_or(name);
                (bare.len() < name.len(), bare, width(n, bare))
            })
            .collect();
        let format = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for ((right, _, width), cell) in columns.iter().zip(cells) {
                // A String takes everything.
                let _ = if *right { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:width$}  ") };
            }
            line
        };
        self.toned(Tone::Head, format(&mut columns.iter().map(|column| column.1)));
        for row in rows {
            self.line(format(&mut row.iter().map(String::as_str)));
        }
    }
}

/// Text of foreign origin as one line: control characters, and what changes the direction of writing, are escaped.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let turns =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if c.is_control() || turns || c == '\\' {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Bytes of foreign origin as one line; what is no text is escaped byte by byte.
pub fn printable_bytes(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for part in bytes.utf8_chunks() {
        shown.push_str(&printable(part.valid()));
        shown.extend(part.invalid().escape_ascii().map(char::from));
    }
    shown
}

/// No more than so many characters, with a mark where something was cut.
pub fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some(_) => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
        None => text.to_owned(),
    }
}

/// A whole number with its thousands apart.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// A signed number with its thousands apart.
pub fn signed(number: i128) -> String {
    let shown = u64::try_from(number.unsigned_abs()).map_or_else(|_| number.unsigned_abs().to_string(), count);
    if number < 0 { format!("-{shown}") } else { shown }
}

/// A number that may be unknown.
pub fn count_or(number: Option<u64>, unknown: &str) -> String {
    number.map_or_else(|| unknown.to_owned(), count)
}

/// So many things, in one word or the other.
pub fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// Bytes in the unit that fits.
pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let (mut size, mut unit) = (number as f64 / 1024.0, 0);
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        (size, unit) = (size / 1024.0, unit + 1);
    }
    format!("{size:.1} {}", UNITS[unit])
}

/// A duration in its two largest units, to the millisecond below a second.
pub fn lasting(duration: Duration) -> String {
    let whole = duration.as_secs();
    match whole {
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{:.1}s", duration.as_secs_f64().min(59.9)),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// The same for milliseconds.
pub fn lasting_ms(ms: u64) -> String {
    lasting(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cells_are_aligned_and_lines_have_no_blanks_at_their_end() {
        let mut page = Page::new(Paint::Plain);
        page.table(
            &["name", ">entries", "why"],
            &[vec!["a".into(), "12".into(), String::new()], vec!["longer".into(), "3".into(), "x".into()]],
        );
        assert_eq!(page.into_text(), "name    entries  why\na            12\nlonger        3  x\n");
        let mut page = Page::new(Paint::Colours);
        page.toned(Tone::Bad, "no");
        assert_eq!(page.into_text(), "\x1b[31mno\x1b[0m\n");
    }

    #[test]
    fn numbers_and_durations_are_written_for_people() {
        assert_eq!((count(0), count(999), count(1_234_567)), ("0".into(), "999".into(), "1,234,567".into()));
        assert_eq!((signed(-1234), bytes(1023), bytes(1536)), ("-1,234".into(), "1023 B".into(), "1.5 KiB".into()));
        let shown = [7, 1_500, 61_000, 3_660_000, 90_000_000].map(lasting_ms);
        assert_eq!(shown, ["7ms", "1.5s", "1m01s", "1h01m", "1d01h"]);
        assert_eq!((cut("abc", 3), cut("abcd", 3)), ("abc".into(), "ab…".into()));
    }

    #[test]
    fn what_could_change_a_terminal_is_escaped() {
        assert_eq!(printable("a\x1b[31m\r\n\tb\u{202e}"), "a\\u{1b}[31m\\r\\n\\tb\\u{202e}");
        assert_eq!(printable_bytes(b"ok\xff\x00"), "ok\\xff\\u{0}");
    }

    proptest! {
        #[test]
        fn no_bytes_reach_a_terminal_as_control_characters(bytes: Vec<u8>) {
            prop_assert!(!printable_bytes(&bytes).chars().any(char::is_control));
        }
    }
}
