//! The reply to a stream read: however it is cut up, the same is found in it, and nothing makes the scan panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::model::entry::{EntryId, digest, write_canonical};
use tidegate::valkey::resp::{Bounds, Piece, Scan};

/// Above this an entry may be shortened: which of them are depends on how they are cut up, what they are recognised by does not.
const BOUNDS: Bounds = Bounds { entry: 64, kept: 8 };

/// What a scan finds: entries' ids and digests, the end of the reply or a refusal, and how much of the bytes it took; or that they
/// are broken.
#[derive(Debug, PartialEq)]
struct Found {
    entries: Vec<(EntryId, u64)>,
    end: Option<Option<String>>,
    taken: usize,
    broken: bool,
}

/// Scans bytes that arrive in steps of so many.
fn scan(bytes: &[u8], step: usize) -> Found {
    let mut found = Found { entries: Vec::new(), end: None, taken: 0, broken: false };
    let (mut scan, mut arrived) = (Scan::new(BOUNDS), 0);
    while arrived < bytes.len() {
        arrived = (arrived + step).min(bytes.len());
        loop {
            match scan.next(&bytes[found.taken..arrived]) {
                // How much was taken before depends on how the bytes were cut up.
                Err(_) => return Found { broken: true, taken: 0, ..found },
                Ok(None) => break,
                Ok(Some((piece, taken))) => {
                    found.taken += taken;
                    match piece {
                        Piece::Entry(id, strings) => {
                            let mut canonical = Vec::new();
                            write_canonical(&mut canonical, id, strings);
                            found.entries.push((id, digest(&canonical)));
                        }
                        Piece::Shortened => {
                            let entry = scan.take_shortened().expect("it has just passed");
                            found.entries.push((entry.id, entry.digest));
                        }
                        Piece::Part | Piece::Stream(_) => {}
                        Piece::End => return Found { end: Some(None), ..found },
                        Piece::Refused(words) => return Found { end: Some(Some(words.to_owned())), ..found },
                    }
                }
            }
        }
    }
    // Of an entry that is cut off, more or less may have been taken.
    Found { taken: 0, ..found }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let whole = scan(bytes, bytes.len().max(1));
    assert_eq!(scan(bytes, usize::from(step).max(1)), whole);
    assert!(whole.taken <= bytes.len());
});
