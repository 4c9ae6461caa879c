//! The repository tests itself: its fences, its manners, its documents.

use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Files that are, or could be, committed.
fn files() -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(ROOT)
        .output()
        .expect("git lists the files");
    let names = String::from_utf8(listed.stdout).expect("names are text");
    names.lines().map(|name| Path::new(ROOT).join(name)).filter(|path| path.is_file()).collect()
}

fn sources() -> Vec<(String, String)> {
    let source = |path: &PathBuf| {
        let name = path.strip_prefix(ROOT).ok()?.to_str()?.to_owned();
        (name.starts_with("src/") && name.ends_with(".rs"))
            .then(|| (name, std::fs::read_to_string(path).expect("text")))
    };
    files().iter().filter_map(source).collect()
}

/// The code of a file without its comments and its tests.
fn code(text: &str) -> String {
    let live = text.split("#[cfg(test)]").next().unwrap_or_default();
    live.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn only_the_door_to_valkey_names_its_client_library() {
    for (name, text) in sources() {
        let names_it = code(&text).contains("fred::");
        assert!(!names_it || name == "src/valkey.rs", "{name} names fred: go through crate::valkey");
    }
}

#[test]
fn of_the_steps_only_those_at_valkeys_side_send_it_commands() {
    let at_its_side = ["read", "ack", "reclaim", "trim"].map(|step| format!("src/flow/{step}.rs"));
    for (name, text) in sources().into_iter().filter(|(name, _)| name.starts_with("src/flow/")) {
        let sends = code(&text).contains("Command::new");
        assert!(!sends || at_its_side.contains(&name), "{name} sends commands to Valkey: that is for {at_its_side:?}");
    }
}

#[test]
fn of_the_steps_only_those_at_postgresqls_side_write_sql() {
    let at_its_side = ["ledger", "flush", "bury", "compact"].map(|step| format!("src/flow/{step}.rs"));
    let pure = ["src/entry.rs", "src/retry.rs", "src/pipeline.rs", "src/keys.rs"];
    for (name, text) in sources() {
        let step = name.starts_with("src/flow/") || name.starts_with("src/config") || pure.contains(&name.as_str());
        assert!(
            !step || !code(&text).contains("sqlx") || at_its_side.contains(&name),
            "{name} names sqlx: that is for {at_its_side:?}"
        );
    }
}

#[test]
fn nothing_but_the_composition_root_spawns() {
    for (name, text) in sources() {
        let spawns = code(&text).contains("tokio::spawn") || code(&text).contains(".spawn(");
        let allowed = name == "src/service.rs" || name.starts_with("src/ops/");
        assert!(!spawns || allowed, "{name} spawns: src/service.rs is the place");
    }
}

#[test]
fn no_debug_output_is_left() {
    for (name, text) in sources() {
        // What an operator types may speak on stderr.
        let text = if name.starts_with("src/ops/") { text.replace("eprintln!(", "") } else { text };
        for word in ["dbg!(", "println!(", "todo!(", "unimplemented!("] {
            assert!(!code(&text).contains(word), "{name} has {word}…)");
        }
    }
}

#[test]
fn the_project_names_no_machine_and_no_registry() {
    // Put together here, so that this file does not name them either.
    let words = [["/wo", "rk/"], ["/ro", "ot/"], ["deb.deb", "ian.org"], ["py", "pi.org"], ["static.cra", "tes.io"]];
    for path in files() {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if path.ends_with("Cargo.lock") {
            continue;
        }
        for word in words.map(|parts| parts.concat()) {
            assert!(!text.contains(&word), "{} names {word}", path.display());
        }
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (name, text) in sources() {
        assert!(text.starts_with("//!"), "{name} does not begin with what it is");
    }
}

#[cfg(not(any(feature = "sabotage", feature = "failpoints")))]
#[test]
fn the_program_holds_nothing_that_breaks_its_promises() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_tidegate")).expect("the program");
    for name in [b"TIDEGATE_SABOTAGE".as_slice(), b"TIDEGATE_FAILPOINT"] {
        assert!(!program.windows(name.len()).any(|window| window == name), "{}", String::from_utf8_lossy(name));
    }
}
