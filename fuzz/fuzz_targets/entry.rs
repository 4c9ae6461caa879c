//! An entry's fields: nothing makes decoding panic, and the canonical form gives back what was put in.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::model::entry::{Canonical, EntryId, write_canonical};
use tidegate::model::pipeline::Pipeline;
use tidegate::model::row;

fuzz_target!(|input: (u64, u64, Vec<&[u8]>, &[u8])| {
    let (ms, seq, strings, anything) = input;
    let mut bytes = Vec::new();
    write_canonical(&mut bytes, EntryId { ms, seq }, strings.iter().copied());
    assert!(Canonical(&bytes).strings().eq(strings.iter().copied()));
    for bytes in [&bytes, anything] {
        let _ = row::decode(Canonical(bytes), &Pipeline::counters());
    }
});
