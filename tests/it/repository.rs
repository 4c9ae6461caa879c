//! The repository tests itself: its fences, its manners, its documents.

use std::path::{Path, PathBuf};
use std::process::Command;

use tidegate::telemetry::contract::{EVENTS, INSTRUMENTS, Instrument, Kind, METRICS};

use crate::documents::documented;

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
    rust_files(&["src/"])
}

/// All Rust files under these folders, with their names from the root.
pub(crate) fn rust_files(folders: &[&str]) -> Vec<(String, String)> {
    let source = |path: &PathBuf| {
        let name = path.strip_prefix(ROOT).ok()?.to_str()?.to_owned();
        (folders.iter().any(|folder| name.starts_with(folder)) && name.ends_with(".rs"))
            .then(|| (name, std::fs::read_to_string(path).expect("text")))
    };
    files().iter().filter_map(source).collect()
}

/// The code of a file without its comments and its tests.
fn code(text: &str) -> String {
    let live = text.split("#[cfg(test)]").next().unwrap_or_default();
    live.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect()
}

/// Whether a file's code imports a crate, or names it in a path.
fn imports(text: &str, library: &str) -> bool {
    code(text).contains(&format!("{library}::"))
}

/// Whether a path lies in one of these folders, or is one of these files.
fn is_in(name: &str, places: &[&str]) -> bool {
    places.iter().any(|place| name == format!("src/{place}.rs") || name.starts_with(&format!("src/{place}/")))
}

#[test]
fn only_the_valkey_module_imports_its_client_library() {
    for (name, text) in sources() {
        assert!(!imports(&text, "fred") || is_in(&name, &["valkey"]), "{name} imports fred: go through crate::valkey");
    }
}

#[test]
fn only_the_valkey_side_of_the_flow_sends_commands() {
    // Strangers' values are dropped between COMMIT and XACK: that is the flow's to do, and nobody else's.
    let valkey_side = [
        "flow/read",
        "flow/ack",
        "flow/reclaim",
        "flow/liveness",
        "flow/lease",
        "flow/position",
        "flow/news",
        "flow/strangers",
        // Before anything flows: whether this Valkey had another name.
        "flow/source",
    ];
    for (name, text) in sources().into_iter().filter(|(name, _)| is_in(name, &["flow"])) {
        let sends = ["Command::new", "Call::new"].iter().any(|sends| code(&text).contains(sends));
        assert!(!sends || is_in(&name, &valkey_side), "{name} sends commands to Valkey: that is for {valkey_side:?}");
    }
}

#[test]
fn no_step_of_a_delta_asks_this_machines_clock() {
    // Its clock may be wrong, or jump: idle times are Valkey's, times of rows PostgreSQL's, waits monotonic.
    let steps = ["flow", "care", "lanes", "pauses", "postgres", "target", "valkey", "merge", "model", "retry"];
    for (name, text) in sources().into_iter().filter(|(name, _)| is_in(name, &steps)) {
        for clock in ["SystemTime::now", "Timestamp::now", "Zoned::now", "Utc::now"] {
            assert!(!code(&text).contains(clock), "{name} asks for {clock}: ask a server, or Instant");
        }
    }
}

#[test]
fn scripts_speak_to_redis_as_well() {
    for (name, text) in rust_files(&["src/", "lab/src/"]) {
        assert!(
            !code(&text).contains("server.call("),
            "{name}: write redis.call in scripts: Redis does not know server.call, Valkey knows both"
        );
    }
}

#[test]
fn only_the_postgresql_side_imports_its_client_library() {
    let postgresql_side = [
        "postgres",
        "flow/ledger",
        "flow/flush",
        "flow/bury",
        "care/compact",
        "care/kept",
        "care/merge",
        "care/touched",
        "client/postgres",
        "target",
        "lanes",
        "pauses",
        "flow/redrive",
        "ops",
    ];
    for (name, text) in sources() {
        let allowed = is_in(&name, &postgresql_side);
        assert!(!imports(&text, "sqlx") || allowed, "{name} imports sqlx: that is for {postgresql_side:?}");
    }
}

#[test]
fn only_the_service_spawns() {
    // In an application the near cache listens, a row is renewed, and what a cancelled reader held is given back, in tasks of the application's runtime.
    let places = ["service", "ops", "client/near", "client/cache", "client/lease"];
    for (name, text) in sources() {
        // The end of telemetry waits on threads, when there is no runtime any more.
        let text = text.replace("std::thread::spawn(", "");
        let spawns = code(&text).contains("tokio::spawn") || code(&text).contains(".spawn(");
        assert!(!spawns || is_in(&name, &places), "{name} spawns: src/service is the place");
    }
}

#[test]
fn a_producer_links_neither_the_daemon_nor_its_command_line() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let tree = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "--edges", "normal", "--no-default-features", "--prefix", "none"])
        .current_dir(ROOT)
        .output()
        .expect("cargo lists the crates");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).expect("names are text");
    assert!(tree.lines().any(|line| line.starts_with("fred ")), "{tree}");
    for library in [
        "sqlx",
        "moka",
        "clap",
        "indicatif",
        "hdrhistogram",
        "config",
        "toml",
        "tempfile",
        "tracing-subscriber",
        "opentelemetry",
        "axum",
        "tonic",
        "prometheus",
    ] {
        assert!(!tree.lines().any(|line| line.starts_with(&format!("{library} "))), "a producer links {library}");
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
fn documents_have_every_instrument_and_every_event_word_for_word() {
    let mut events = String::from("| event | fields | when |\n| --- | --- | --- |\n");
    for event in EVENTS {
        events.push_str(&format!("| `{}` | {} | {} |\n", event.name, event.fields, event.sentence));
    }
    documented("docs/telemetry.md", "events", &events);
    let mut instruments = String::from("| name | kind | unit | meaning |\n| --- | --- | --- | --- |\n");
    for Instrument { name, kind, unit, sentence } in INSTRUMENTS {
        let kind = if *kind == Kind::Counter { "counter" } else { "gauge" };
        instruments.push_str(&format!("| `{name}` | {kind} | {unit} | {sentence} |\n"));
    }
    documented("docs/telemetry.md", "instruments", &instruments);
    let mut metrics = String::from(
        "| scraped as | over OTLP | kind | unit | labels | meaning |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for metric in METRICS {
        let (labels, unit) =
            (metric.labels.join(", "), if metric.unit.is_empty() { "" } else { &format!("`{}`", metric.unit) });
        let (scraped, name, kind, sentence) = (metric.prometheus_name(), metric.name, metric.kind(), metric.sentence);
        metrics.push_str(&format!("| `{scraped}` | `{name}` | {kind} | {unit} | {labels} | {sentence} |\n"));
    }
    documented("docs/telemetry.md", "metrics", &metrics);
}

#[test]
fn every_event_in_the_code_is_in_the_contract_and_the_other_way_round() {
    let mut told = std::collections::BTreeSet::new();
    for (_, text) in sources() {
        let code = code(&text);
        told.extend(code.split("event = \"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
    }
    let contract: std::collections::BTreeSet<String> = EVENTS.iter().map(|event| event.name.to_owned()).collect();
    assert_eq!(told, contract);
}

#[test]
fn every_module_says_what_it_is() {
    for (name, text) in rust_files(&["src/", "lab/"]) {
        assert!(text.starts_with("//!"), "{name} does not begin with what it is");
    }
}

#[test]
fn no_file_is_dead() {
    let files = rust_files(&["src/", "lab/", "tests/"]);
    let roots =
        ["src/lib.rs", "src/main.rs", "lab/src/lib.rs", "lab/src/main.rs", "tests/it/main.rs", "tests/model.rs"];
    for (name, _) in files.iter().filter(|(name, _)| !roots.contains(&name.as_str())) {
        let path = Path::new(name.strip_suffix("/mod.rs").or(name.strip_suffix(".rs")).unwrap_or(name));
        let (folder, module) = (path.parent().expect("in a folder"), path.file_name().and_then(|m| m.to_str()));
        let parents = ["lib.rs", "main.rs", "mod.rs"].map(|file| folder.join(file));
        let is_parent = |other: &str| {
            parents.iter().any(|p| p == Path::new(other)) || Path::new(other) == folder.with_extension("rs")
        };
        let declaration = format!("mod {};", module.expect("a name"));
        let declares = |text: &str| text.lines().any(|line| line.trim_start().trim_end().ends_with(&declaration));
        assert!(files.iter().any(|(other, text)| is_parent(other) && declares(text)), "{name} belongs to no module");
    }
}

#[test]
fn every_control_applies_to_the_tree_as_it_is() {
    let controls = tidegate_lab::edits::controls();
    let read = |file: &str| std::fs::read_to_string(Path::new(ROOT).join(file));
    let faults = tidegate_lab::edits::apply(&controls, read).err().unwrap_or_default();
    assert!(faults.is_empty(), "edit lab/controls.toml: {}", faults.join("\n"));
    for test in controls.iter().flat_map(|control| &control.tests) {
        let (file, name) = test.rsplit_once("::").expect("a test is named FILE::NAME");
        let text = read(&format!("tests/it/{}.rs", file.replace("::", "/"))).unwrap_or_default();
        assert!(
            text.contains(&format!("async fn {name}()")),
            "lab/controls.toml names a test that is not there: {test}"
        );
    }
}

#[cfg(not(feature = "failpoints"))]
#[test]
fn the_program_holds_nothing_that_breaks_its_promises() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_tidegate")).expect("the program");
    let name = b"TIDEGATE_FAILPOINT";
    assert!(!program.windows(name.len()).any(|window| window == name), "the program knows failpoints");
}
