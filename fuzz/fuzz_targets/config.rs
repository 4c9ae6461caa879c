//! A configuration: whatever the environment and the command line hold, it is one or a list of what is wrong with it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::config::{Needs, Sources, load};

fuzz_target!(|given: (Vec<(String, String)>, Vec<(String, String)>)| {
    let (variables, flags) = given;
    let env = variables.into_iter().map(|(name, value)| (format!("TIDEGATE__{name}"), value)).collect();
    let _ = load(&Sources { file: None, env, flags }, Needs::BOTH);
});
