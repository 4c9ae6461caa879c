//! The tables of `docs/configuration.md` are those of the declaration, word for word.
//!
//! `TIDEGATE_UPDATE_DOCS=1 cargo test --lib config::docs` writes them; without the variable a difference is a failure.

use super::key::{Key, section_names};
use super::sections::{KEYS, Order, RELATIONS, Relation};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
const RELATIONS_HEADING: &str = "## What must fit together";

#[test]
fn the_tables_of_the_document_are_those_of_the_declaration() {
    let document = std::fs::read_to_string(DOCUMENT).expect("the document");
    let expected = with_tables(&document);
    if std::env::var_os("TIDEGATE_UPDATE_DOCS").is_some() {
        return std::fs::write(DOCUMENT, expected).expect("written");
    }
    for (line, (is, should)) in document.lines().zip(expected.lines()).enumerate() {
        let command = "TIDEGATE_UPDATE_DOCS=1 cargo test --lib config::docs";
        assert_eq!(is, should, "docs/configuration.md:{} differs from the declaration: run {command}", line + 1);
    }
    assert_eq!(document, expected);
}

#[test]
fn a_table_is_replaced_whole_and_has_a_blank_line_around_it() {
    let section = "## `[run]`\n\nBefore.\n| a | b |\n| c | d |\nAfter.\n| another | table |\n";
    let expected = "## `[run]`\n\nBefore.\n\n| new |\n\nAfter.\n| another | table |\n";
    assert_eq!(with_table(section, "| new |"), expected);
    assert_eq!(with_table("## `[run]`\n", "| new |"), "## `[run]`\n\n| new |\n");
}

/// The document with the tables of the declaration.
fn with_tables(document: &str) -> String {
    let mut tables = tables();
    let update = |chapter: &str| match tables.iter().position(|(heading, _)| chapter.lines().next() == Some(heading)) {
        Some(index) => with_table(chapter, &tables.remove(index).1),
        None => chapter.trim_end().to_owned() + "\n",
    };
    let chapters: Vec<String> = document.replace("\n## ", "\n\0## ").split('\0').map(update).collect();
    let missing: Vec<_> = tables.into_iter().map(|(heading, _)| heading).collect();
    assert!(missing.is_empty(), "docs/configuration.md has no heading {}", missing.join(", "));
    chapters.join("\n")
}

/// A chapter with its first table replaced, and a blank line before and after it; or with the table at its end.
fn with_table(chapter: &str, table: &str) -> String {
    let lines: Vec<&str> = chapter.lines().collect();
    let is_row = |line: &&str| line.starts_with('|');
    let start = lines.iter().position(is_row).unwrap_or(lines.len());
    let rows = lines[start..].iter().take_while(|line| is_row(line)).count();
    let (before, after) = (lines[..start].join("\n"), lines[start + rows..].join("\n"));
    let parts = [before.trim_end(), table, after.trim()];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n\n") + "\n"
}

/// Each table with the heading that it stands below.
fn tables() -> Vec<(String, String)> {
    let mut tables: Vec<_> = section_names()
        .into_iter()
        .map(|section| {
            let keys = KEYS.iter().filter(|key| key.name.split('.').next() == Some(section));
            let path = match section {
                "pipelines" => "[pipelines.<name>]",
                "doctor" => "[[doctor.accept]]",
                _ => &format!("[{section}]"),
            };
            let head = "| key | default | unit and limits | why |\n| --- | --- | --- | --- |\n";
            (format!("## `{path}`"), head.to_owned() + &keys.map(key_row).collect::<Vec<_>>().join("\n"))
        })
        .collect();
    let head = "| this | must be | that | otherwise |\n| --- | --- | --- | --- |\n";
    let rows: Vec<_> = RELATIONS.iter().map(relation_row).collect();
    tables.push((RELATIONS_HEADING.into(), head.to_owned() + &rows.join("\n")));
    tables
}

fn key_row(key: &Key) -> String {
    let default = match (key.default, key.default_only_for) {
        (None, _) => "required".into(),
        (Some(""), _) => "none".into(),
        (Some(text), []) => format!("`{text}`"),
        (Some(text), only) => format!("`{text}` for `{}`, otherwise required", only.join("`, `")),
    };
    format!("| `{}` | {default} | {}: {} | {} |", key.name, key.kind.unit(), key.kind.limits(), key.reason)
}

fn relation_row(relation: &Relation) -> String {
    let sign = match relation.order {
        Order::Below => "<",
        Order::AtMost => "≤",
    };
    format!("| `{}` | {sign} | `{}` | {} |", relation.lesser, relation.greater, relation.reason)
}
