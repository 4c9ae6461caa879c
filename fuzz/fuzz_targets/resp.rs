//! The reply to a stream read: however it is cut up, the same is found in it, and nothing makes the scan panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::model::entry::EntryId;
use tidegate::valkey::resp::{Piece, Scan};

/// What a scan finds: entries, the end of the reply or a refusal, and how much of the bytes it took; or that they are broken.
#[derive(Debug, PartialEq)]
struct Found {
    entries: Vec<(EntryId, Vec<Vec<u8>>)>,
    end: Option<Option<String>>,
    taken: usize,
    broken: bool,
}

/// Scans bytes that arrive in steps of so many.
fn scan(bytes: &[u8], step: usize) -> Found {
    let mut found = Found { entries: Vec::new(), end: None, taken: 0, broken: false };
    let (mut scan, mut arrived) = (Scan::default(), 0);
    while arrived < bytes.len() {
        arrived = (arrived + step).min(bytes.len());
        loop {
            match scan.next(&bytes[found.taken..arrived]) {
                Err(_) => return Found { broken: true, ..found },
                Ok(None) => break,
                Ok(Some((piece, taken))) => {
                    found.taken += taken;
                    match piece {
                        Piece::Entry(id, strings) => found.entries.push((id, strings.map(<[u8]>::to_vec).collect())),
                        Piece::End => return Found { end: Some(None), ..found },
                        Piece::Refused(words) => return Found { end: Some(Some(words.to_owned())), ..found },
                    }
                }
            }
        }
    }
    found
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let whole = scan(bytes, bytes.len().max(1));
    assert_eq!(scan(bytes, usize::from(step).max(1)), whole);
    assert!(whole.taken <= bytes.len());
});
