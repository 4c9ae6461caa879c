//! Any file, environment and flags give a configuration or a list of problems, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::config::{Needs, Sources, load};

type Pairs = Vec<(String, String)>;

fuzz_target!(|given: (Vec<u8>, Pairs, Pairs)| {
    let (text, variables, flags) = given;
    // One file a process: fuzzers run in parallel.
    let file = std::env::temp_dir().join(format!("tidegate-fuzz-{}.toml", std::process::id()));
    std::fs::write(&file, text).expect("a temporary file can be written");
    let env = variables.into_iter().map(|(name, value)| (format!("TIDEGATE__{name}"), value)).collect();
    let _ = load(&Sources { file: Some(file), env, flags }, Needs::BOTH);
});
