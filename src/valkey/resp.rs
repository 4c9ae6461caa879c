//! The reply to a stream read, scanned while its bytes arrive. Pure.
//!
//! Takes the bytes received so far, again and again; gives the entries that are whole, where they lie: no copy, no
//! allocation, and nothing is scanned twice but the entry that was cut off. An entry above a bound is digested while it passes,
//! and only its beginning kept. It fails on anything that is not such a reply in RESP3, and then nothing behind it can be
//! trusted.

use crate::model::entry::EntryId;
use crate::model::shortened::{Passing, Shortened};

/// A string of Valkey holds no more than this.
const LONGEST_STRING: u64 = 512 << 20;
/// Strings in one entry: more than any server accepts in one command.
const MOST_STRINGS: u64 = 1 << 31;

/// What is held of one entry at the most.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// An entry that takes more than this, in its canonical form, may be shortened; one that takes twice as much is.
    pub entry: usize,
    /// How many bytes of such a one are kept.
    pub kept: usize,
}

impl Bounds {
    /// Every entry is held whole.
    pub const NONE: Bounds = Bounds { entry: usize::MAX, kept: 0 };

    /// How long an entry in a reply may be before it is taken piece by piece. A reply's form is at most half as long again as the
    /// canonical one (empty strings: 6 bytes and 4), and [`HEAD`] longer.
    fn in_reply(&self) -> usize {
        self.entry.saturating_mul(2).saturating_add(HEAD)
    }
}

/// What an entry begins with takes less: its id and how many strings it has.
const HEAD: usize = 128;

/// A piece of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// An entry: its id, and its fields.
    Entry(EntryId, Strings<'a>),
    /// An entry that was too large to be held: [`Scan::take_shortened`] gives what is left of it.
    Shortened,
    /// What follows is of this stream.
    Stream(&'a [u8]),
    /// Nothing yet: some bytes were taken and are not needed any more.
    Part,
    /// There are no more entries.
    End,
    /// The server refused the command, in these words.
    Refused(&'a str),
}

/// The bytes are no reply to a stream read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the reply to a stream read is malformed: {0}")]
pub struct Broken(&'static str);

/// How far one reply, `{stream: [[id, [name, value, …]], …], …}`, the list alone, or null, has been scanned.
#[derive(Debug)]
pub struct Scan {
    bounds: Bounds,
    /// How many entries of this stream are still to come; none before the reply has begun.
    left: Option<u64>,
    /// How many streams are still to come.
    streams: u64,
    /// The entry that is taken piece by piece.
    long: Option<Box<Long>>,
    /// The one that has just passed.
    shortened: Option<Shortened>,
}

impl Default for Scan {
    fn default() -> Scan {
        Scan::new(Bounds::NONE)
    }
}

impl Scan {
    /// Of one reply, then of the next.
    pub fn new(bounds: Bounds) -> Scan {
        Scan { bounds, left: None, streams: 0, long: None, shortened: None }
    }

    /// The next piece and how many bytes it took from the front; none if it is not all there yet.
    pub fn next<'a>(&mut self, bytes: &'a [u8]) -> Result<Option<(Piece<'a>, usize)>, Broken> {
        let mut cursor = Cursor { bytes, at: 0 };
        let Some(piece) = self.piece(&mut cursor)? else { return Ok(None) };
        match piece {
            Piece::Entry(..) | Piece::Shortened => self.left = self.left.map(|left| left - 1),
            Piece::End | Piece::Refused(_) => self.left = None,
            Piece::Part | Piece::Stream(_) => {}
        }
        Ok(Some((piece, cursor.at)))
    }

    fn piece<'a>(&mut self, cursor: &mut Cursor<'a>) -> Result<Option<Piece<'a>>, Broken> {
        match self.left {
            None => match reply_begins(cursor)? {
                Some(Begins::Entries(count)) => {
                    self.left = Some(count);
                    Ok(Some(Piece::Part))
                }
                Some(Begins::Streams(count)) => {
                    (self.left, self.streams) = (Some(0), count);
                    Ok(Some(Piece::Part))
                }
                Some(Begins::Ends(piece)) => Ok(Some(piece)),
                None => Ok(None),
            },
            Some(0) if self.streams == 0 => Ok(Some(Piece::End)),
            Some(0) => {
                let Some(name) = cursor.string()? else { return Ok(None) };
                let Some(count) = cursor.count(b'*')? else { return Ok(None) };
                (self.left, self.streams) = (Some(count), self.streams - 1);
                Ok(Some(Piece::Stream(name)))
            }
            Some(_) if self.long.is_some() => self.pass(cursor),
            Some(_) => {
                let entry = entry(cursor)?;
                if entry.is_none() && cursor.bytes.len() > self.bounds.in_reply() {
                    cursor.at = 0;
                    let (id, strings) = entry_begins(cursor)?.ok_or(Broken("an entry with too long a head"))?;
                    let passing = Passing::new(id, strings, self.bounds.kept);
                    self.long = Some(Box::new(Long { passing, strings, bytes: None }));
                    return self.pass(cursor);
                }
                Ok(entry)
            }
        }
    }

    /// Takes what is there of an entry that is too large to be held.
    fn pass<'a>(&mut self, cursor: &mut Cursor<'a>) -> Result<Option<Piece<'a>>, Broken> {
        let Some(long) = &mut self.long else { return Ok(None) };
        if !long.pass(cursor)? {
            return Ok((cursor.at > 0).then_some(Piece::Part));
        }
        self.shortened = self.long.take().map(|long| long.passing.finish());
        Ok(Some(Piece::Shortened))
    }

    /// The entry that [`Piece::Shortened`] stood for.
    pub fn take_shortened(&mut self) -> Option<Shortened> {
        self.shortened.take()
    }
}

/// An entry that is taken piece by piece.
#[derive(Debug)]
struct Long {
    passing: Passing,
    /// How many strings are still to come, the one under way included.
    strings: u64,
    /// How many bytes of the string under way are still to come.
    bytes: Option<u64>,
}

impl Long {
    /// Takes what is there; says whether that was all of it.
    fn pass(&mut self, cursor: &mut Cursor<'_>) -> Result<bool, Broken> {
        while self.strings > 0 {
            let Some(left) = self.bytes else {
                let Some(length) = cursor.string_begins()? else { return Ok(false) };
                self.passing.string(length);
                self.bytes = Some(length);
                continue;
            };
            let rest = &cursor.bytes[cursor.at..];
            let there = rest.len().min(left as usize);
            self.passing.bytes(&rest[..there]);
            cursor.at += there;
            self.bytes = Some(left - there as u64);
            match rest.get(there..there + 2) {
                None => return Ok(false),
                Some(b"\r\n") => cursor.at += 2,
                Some(_) => return Err(Broken("a string of another length")),
            }
            (self.bytes, self.strings) = (None, self.strings - 1);
        }
        Ok(true)
    }
}

/// What a reply begins with.
enum Begins<'a> {
    Entries(u64),
    Streams(u64),
    Ends(Piece<'a>),
}

fn reply_begins<'a>(cursor: &mut Cursor<'a>) -> Result<Option<Begins<'a>>, Broken> {
    match cursor.bytes.first() {
        None => Ok(None),
        Some(b'_') => Ok(cursor.line()?.map(|_| Begins::Ends(Piece::End))),
        Some(b'-') => {
            let Some(line) = cursor.line()? else { return Ok(None) };
            let words = std::str::from_utf8(&line[1..]).map_err(|_| Broken("an error that is no text"))?;
            Ok(Some(Begins::Ends(Piece::Refused(words))))
        }
        Some(b'%') => Ok(cursor.count(b'%')?.map(Begins::Streams)),
        Some(b'*') => Ok(cursor.count(b'*')?.map(Begins::Entries)),
        Some(_) => Err(Broken("neither a map, a list, a null nor an error")),
    }
}

/// An entry, where all of it is there.
fn entry<'a>(cursor: &mut Cursor<'a>) -> Result<Option<Piece<'a>>, Broken> {
    let Some((id, count)) = entry_begins(cursor)? else { return Ok(None) };
    let start = cursor.at;
    for _ in 0..count {
        if cursor.string()?.is_none() {
            return Ok(None);
        }
    }
    Ok(Some(Piece::Entry(id, Strings(&cursor.bytes[start..cursor.at]))))
}

/// An entry's id, and how many strings it has.
#[inline(always)]
fn entry_begins(cursor: &mut Cursor<'_>) -> Result<Option<(EntryId, u64)>, Broken> {
    let Some(parts) = cursor.count(b'*')? else { return Ok(None) };
    if parts != 2 {
        return Err(Broken("an entry that is no pair"));
    }
    let Some(id) = cursor.string()? else { return Ok(None) };
    let id = EntryId::from_bytes(id).ok_or(Broken("an entry without an id"))?;
    let Some(count) = cursor.count(b'*')? else { return Ok(None) };
    if count > MOST_STRINGS {
        return Err(Broken("an entry with more strings than there can be"));
    }
    Ok(Some((id, count)))
}

/// The strings of an entry, name, value, name, value …, as they lie in the reply: scanned before, and whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strings<'a>(&'a [u8]);

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        // Scanned before: a length is digits, and what it promises is there.
        let (mut length, mut at) = (0, 1);
        while let digit @ b'0'..=b'9' = *self.0.get(at)? {
            length = length * 10 + usize::from(digit - b'0');
            at += 1;
        }
        let (start, end) = (at + 2, at + 2 + length);
        let string = self.0.get(start..end)?;
        self.0 = self.0.get(end + 2..)?;
        Some(string)
    }
}

/// Bytes, and how many of them were taken.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Everything up to the next line break.
    fn line(&mut self) -> Result<Option<&'a [u8]>, Broken> {
        let rest = &self.bytes[self.at..];
        let Some(end) = rest.iter().position(|b| *b == b'\r') else { return Ok(None) };
        match rest.get(end + 1) {
            None => Ok(None),
            Some(b'\n') => {
                self.at += end + 2;
                Ok(Some(&rest[..end]))
            }
            Some(_) => Err(Broken("half a line break")),
        }
    }

    /// A line of `kind` and a number.
    fn count(&mut self, kind: u8) -> Result<Option<u64>, Broken> {
        let rest = &self.bytes[self.at..];
        match rest.first() {
            None => return Ok(None),
            Some(first) if *first == kind => {}
            Some(_) => return Err(Broken("another kind of value than there should be")),
        }
        let mut number = 0u64;
        for (at, byte) in rest.iter().enumerate().skip(1) {
            match byte {
                b'0'..=b'9' => {
                    let more = number.checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                    number = more.ok_or(Broken("a number that is too large"))?;
                }
                b'\r' if at > 1 => {
                    return match rest.get(at + 1) {
                        None => Ok(None),
                        Some(b'\n') => {
                            self.at += at + 2;
                            Ok(Some(number))
                        }
                        Some(_) => Err(Broken("half a line break")),
                    };
                }
                _ => return Err(Broken("a number with something else in it")),
            }
        }
        Ok(None)
    }

    /// The length of a string.
    #[inline(always)]
    fn string_begins(&mut self) -> Result<Option<u64>, Broken> {
        match self.count(b'$')? {
            Some(length) if length > LONGEST_STRING => Err(Broken("a string longer than there can be")),
            length => Ok(length),
        }
    }

    /// A string with its length in front.
    #[inline(always)]
    fn string(&mut self) -> Result<Option<&'a [u8]>, Broken> {
        let Some(length) = self.string_begins()? else { return Ok(None) };
        let end = self.at + length as usize;
        let Some(after) = self.bytes.get(end..end + 2) else { return Ok(None) };
        if after != b"\r\n" {
            return Err(Broken("a string of another length"));
        }
        let string = &self.bytes[self.at..end];
        self.at = end + 2;
        Ok(Some(string))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::entry::{digest, write_canonical};
    use proptest::prelude::*;

    type Entry = (u64, u64, Vec<Vec<u8>>);

    /// What a server sends.
    fn reply(entries: &[Entry]) -> Vec<u8> {
        let mut out = b"%1\r\n$1\r\ns\r\n".to_vec();
        out.extend(format!("*{}\r\n", entries.len()).bytes());
        for (ms, seq, strings) in entries {
            let id = format!("{ms}-{seq}");
            out.extend(format!("*2\r\n${}\r\n{id}\r\n*{}\r\n", id.len(), strings.len()).bytes());
            for string in strings {
                out.extend(format!("${}\r\n", string.len()).bytes());
                out.extend(string);
                out.extend(b"\r\n");
            }
        }
        out
    }

    /// What a scan finds in bytes that arrive in pieces of these sizes.
    fn scan(bytes: &[u8], mut sizes: impl Iterator<Item = usize>) -> Result<(Vec<Entry>, Vec<u8>), Broken> {
        let (mut scan, mut found, mut inbox, mut at) = (Scan::default(), Vec::new(), Vec::new(), 0);
        loop {
            while let Some((piece, taken)) = scan.next(&inbox)? {
                match piece {
                    Piece::Entry(id, strings) => found.push((id.ms, id.seq, strings.map(<[u8]>::to_vec).collect())),
                    Piece::Part | Piece::Stream(_) => {}
                    _ => return Ok((found, [&inbox[taken..], &bytes[at..]].concat())),
                }
                inbox.drain(..taken);
            }
            assert!(at < bytes.len(), "all of it was given, and it is not enough");
            let size = sizes.next().unwrap_or(1).clamp(1, bytes.len() - at);
            inbox.extend_from_slice(&bytes[at..at + size]);
            at += size;
        }
    }

    /// What is to be buried, and what is not: digests and lengths, by a scan with these bounds; and the most it had to hold.
    fn digests(bytes: &[u8], mut sizes: impl Iterator<Item = usize>, bounds: Bounds) -> (Vec<(u64, u64)>, usize) {
        let (mut scan, mut found, mut inbox, mut at, mut most) = (Scan::new(bounds), Vec::new(), Vec::new(), 0, 0);
        loop {
            most = most.max(inbox.len());
            while let Some((piece, taken)) = scan.next(&inbox).expect("a reply") {
                match piece {
                    Piece::Entry(id, strings) => {
                        let mut canonical = Vec::new();
                        write_canonical(&mut canonical, id, strings);
                        found.push((digest(&canonical), canonical.len() as u64));
                    }
                    Piece::Shortened => {
                        let entry = scan.take_shortened().expect("it has just passed");
                        assert!(
                            entry.full_bytes > bounds.entry as u64,
                            "nothing is shortened that is within the bound"
                        );
                        found.push((entry.digest, entry.full_bytes));
                    }
                    Piece::Part | Piece::Stream(_) => {}
                    _ => return (found, most),
                }
                inbox.drain(..taken);
            }
            let size = sizes.next().unwrap_or(1).clamp(1, bytes.len() - at);
            inbox.extend_from_slice(&bytes[at..at + size]);
            at += size;
        }
    }

    #[test]
    fn a_list_alone_is_a_reply_too() {
        let mut scan = Scan::default();
        assert_eq!(scan.next(b"*0\r\n"), Ok(Some((Piece::Part, 4))));
        assert_eq!(scan.next(b""), Ok(Some((Piece::End, 0))));
    }

    #[test]
    fn a_null_is_an_empty_run_and_an_error_is_told() {
        assert_eq!(Scan::default().next(b"_\r\n+"), Ok(Some((Piece::End, 3))));
        let refused = Piece::Refused("NOGROUP No such key");
        assert_eq!(Scan::default().next(b"-NOGROUP No such key\r\n"), Ok(Some((refused, 22))));
        assert_eq!(Scan::default().next(b"-NOGROUP No"), Ok(None));
    }

    #[test]
    fn what_is_no_such_reply_is_broken_at_once() {
        for bytes in [
            &b"+OK\r\n"[..],
            b">2\r\n",
            b"%2\r\n$1\r\na\r\n*0\r\n*0\r\n",
            b"%1\r\n*1\r\n",
            b"%1\r\n$1\r\nab\r\n",
            b"%1\r\n$1\r\ns\r\n*1\r\n*3\r\n",
            b"%1\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n1-x\r\n",
            b"%1\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n1-1\r\n_\r\n",
            b"%99999999999999999999\r\n",
            b"%1\r\n$999999999999\r\n",
            b"%-1\r\n",
            b"%\r\n",
            b"%1\rx",
        ] {
            let (mut scan, mut rest) = (Scan::default(), bytes);
            let broken = loop {
                match scan.next(rest) {
                    Ok(Some((Piece::Part | Piece::Stream(_), taken))) => rest = &rest[taken..],
                    found => break found.is_err(),
                }
            };
            assert!(broken, "{}", bytes.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn however_a_reply_is_cut_up_every_entry_is_found_once_and_nothing_behind_it_is_touched(
            entries: Vec<(u64, u64, Vec<Vec<u8>>)>,
            behind: Vec<u8>,
            sizes in prop::collection::vec(1usize..40, 1..60),
        ) {
            let bytes = [reply(&entries), behind.clone()].concat();
            let (found, rest) = scan(&bytes, sizes.into_iter().cycle()).expect("a reply");
            prop_assert_eq!(found, entries);
            prop_assert_eq!(rest, behind);
        }

        #[test]
        fn an_entry_above_the_bound_is_digested_as_it_passes_and_is_never_held(
            entries in prop::collection::vec((any::<u64>(), any::<u64>(), prop::collection::vec(
                prop::collection::vec(any::<u8>(), 0..400), 0..12)), 0..6),
            entry in 1usize..600,
            sizes in prop::collection::vec(1usize..40, 1..60),
        ) {
            let bytes = reply(&entries);
            let whole = digests(&bytes, std::iter::repeat(usize::MAX), Bounds::NONE).0;
            let bounds = Bounds { entry, kept: 64 };
            let (found, most) = digests(&bytes, sizes.into_iter().cycle(), bounds);
            prop_assert_eq!(found, whole);
            prop_assert!(most <= bounds.in_reply() + 40, "{} bytes were held", most);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, begins in 0usize..5) {
            let begin = [&b""[..], b"%1\r\n$1\r\ns\r\n*3\r\n", b"%1\r\n$", b"-", b"%1\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n1-1\r\n*"];
            let bytes = [begin[begins], &bytes].concat();
            let (mut scan, mut rest) = (Scan::new(Bounds { entry: 64, kept: 8 }), &bytes[..]);
            while let Ok(Some((piece, taken))) = scan.next(rest) {
                if let Piece::Entry(_, strings) = piece {
                    prop_assert!(strings.count() <= rest.len());
                }
                if taken == 0 { break }
                rest = &rest[taken..];
            }
        }
    }
}
