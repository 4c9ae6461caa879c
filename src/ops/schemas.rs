//! The schemas of what the commands print with `--output json`: docs/schemas/*.json is generated from the types, and this test keeps it so.
//!
//! `TIDEGATE_UPDATE_DOCS=1 cargo test --lib ops::schemas` writes them.

use std::path::Path;

use schemars::{JsonSchema, generate::SchemaSettings};

use super::{
    adopt, audit, check, config, counter, dead, doctor, explain, group, invalidate, memory, pause, pending, pipeline,
    status, tap, trim, wait, warm,
};

fn schema<T: JsonSchema>() -> serde_json::Value {
    SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<T>().to_value()
}

fn schemas() -> Vec<(&'static str, serde_json::Value)> {
    vec![
        ("adopt", schema::<adopt::Adopted>()),
        ("audit", schema::<audit::Audit>()),
        ("check", schema::<check::Checked>()),
        ("config-show", schema::<config::Settings>()),
        ("counter", schema::<counter::Counter>()),
        ("dead-list", schema::<dead::list::DeadLetters>()),
        ("dead-mark", schema::<dead::discard::Marked>()),
        ("dead-redrive", schema::<dead::redrive::Redriven>()),
        ("dead-show", schema::<dead::show::LetterDetails>()),
        ("doctor", schema::<doctor::Diagnosis>()),
        ("explain", schema::<explain::Explanation>()),
        ("group-list", schema::<group::Groups>()),
        ("group-repair", schema::<group::Repaired>()),
        ("invalidate", schema::<invalidate::Invalidated>()),
        ("memory", schema::<memory::MemoryReport>()),
        ("pause", schema::<pause::Pauses>()),
        ("pending", schema::<pending::Pending>()),
        ("pipeline-new", schema::<pipeline::draft::Proposal>()),
        ("pipeline-test", schema::<pipeline::test::Tested>()),
        ("status", schema::<status::report::Status>()),
        ("tap", schema::<tap::Tapped>()),
        ("trim", schema::<trim::Trim>()),
        ("wait", schema::<wait::Waited>()),
        ("warm", schema::<warm::Warmed>()),
    ]
}

#[test]
fn what_is_printed_as_json_has_the_documented_schema() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schemas");
    let update = std::env::var_os("TIDEGATE_UPDATE_DOCS").is_some();
    if update {
        std::fs::create_dir_all(&folder).expect("a folder");
    }
    let mut documented: Vec<String> = Vec::new();
    for (name, schema) in schemas() {
        let (file, text) =
            (folder.join(format!("{name}.json")), serde_json::to_string_pretty(&schema).expect("JSON") + "\n");
        if update {
            std::fs::write(&file, &text).expect("written");
        }
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            found == text,
            "docs/schemas/{name}.json differs from the program: run this test with TIDEGATE_UPDATE_DOCS=1"
        );
        documented.push(format!("{name}.json"));
    }
    let mut files: Vec<String> = std::fs::read_dir(&folder)
        .expect("the folder")
        .map(|file| file.expect("a file").file_name().to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(files, documented, "docs/schemas has a file for each kind of document, and no other");
}
