//! Line: bytes as they come, cut into lines, and what each line asks for. Pure.
//!
//! Takes bytes in pieces of any size; gives each line with its number and its beginning, and an id with its amount. Fails with why a line asks for
//! nothing.

use super::summary::SHOWN_CHARACTERS;
use crate::model::entry::Malformed;
use crate::model::row::parse_amount;

/// A line beyond this is skipped, and never held in memory as a whole.
pub(super) const MAX_LINE_BYTES: usize = 1 << 20;

/// Cuts a source's bytes into lines, however they come. Pure.
#[derive(Debug, Default)]
pub(super) struct Splitter {
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
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(u64, Result<&[u8], BadLine>, &[u8])) {
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
pub(super) fn parse_line(line: &[u8]) -> Result<Option<(&str, i64)>, BadLine> {
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
pub(super) enum BadLine {
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
        for piece in [4096, 64 * 1024, bytes.len()] {
            let lines = split(&bytes, piece);
            assert_eq!(lines, [(1, Ok(b"a".to_vec())), (2, Err(BadLine::TooLong)), (3, Ok(b"b".to_vec()))]);
        }
        let mut splitter = Splitter::default();
        for _ in 0..100 {
            splitter.feed(&[b'x'; 64 * 1024], |_, _, _| {});
            assert!(splitter.partial.capacity() <= 2 * (MAX_LINE_BYTES + 64 * 1024));
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
        }
    }
}
