//! Draft: a pipeline that is proposed, as the configuration and SQL write it. Pure.
//!
//! Takes columns with remarks; gives the section in TOML, the migration in SQL, and both as one file that can be used as it is. It cannot fail.

use serde::Serialize;

use crate::model::pipeline::{Identifier, Table};
use crate::model::target::{KeyColumn, Target, ValueColumn, Write};
use crate::ops::columns::{Page, printable};
use crate::ops::context::Report;

/// How wide a remark is before it goes on in the next line.
const WIDTH: usize = 110;

/// A pipeline that is proposed.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) name: String,
    pub(super) stream: String,
    pub(super) table: Table,
    pub(super) keys: Vec<KeyColumn>,
    pub(super) values: Vec<ValueColumn>,
    pub(super) updated_at: Option<Identifier>,
    /// What is to be known of all of it.
    pub(super) notes: Vec<String>,
    /// What is to be chosen about keys.
    pub(super) of_keys: Vec<String>,
    /// What is to be chosen about values.
    pub(super) of_values: Vec<String>,
    /// The statements that the table needs.
    pub(super) migration: Vec<String>,
}

/// A pipeline that is proposed, in text.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Proposal {
    /// The pipeline's name.
    pub pipeline: String,
    /// The section of the configuration, in TOML, with remarks.
    pub section: String,
    /// The migration, in SQL; empty where the table needs none.
    pub migration: String,
    /// What is to be known or chosen, each in one sentence.
    pub remarks: Vec<String>,
}

impl Draft {
    /// With no columns yet; `made_from`: what it is made from, in a sentence.
    pub(super) fn of(name: &str, stream: &str, table: &Table, made_from: String) -> Draft {
        Draft {
            name: name.into(),
            stream: stream.into(),
            table: table.clone(),
            keys: Vec::new(),
            values: Vec::new(),
            updated_at: None,
            notes: vec![made_from],
            of_keys: Vec::new(),
            of_values: Vec::new(),
            migration: Vec::new(),
        }
    }

    /// The table and what is written into it.
    pub(super) fn target(&self) -> Target {
        Target {
            table: self.table.clone(),
            keys: self.keys.clone(),
            values: self.values.clone(),
            updated_at: self.updated_at.clone(),
            write: Write::Merge,
        }
    }

    pub(super) fn proposal(&self) -> Proposal {
        let mut section = String::new();
        remark(&mut section, &self.notes);
        section.push_str(&format!("[pipelines.{}]\n", self.name));
        section.push_str(&format!("stream = {}\n", quoted(&self.stream)));
        section.push_str(&format!("table = \"{}\"\n", self.table));
        remark(&mut section, &self.of_keys);
        listed(&mut section, "keys", &self.keys);
        remark(&mut section, &self.of_values);
        listed(&mut section, "values", &self.values);
        let updated_at = self.updated_at.as_ref().map_or("", Identifier::as_str);
        section.push_str(&format!("updated_at_column = \"{updated_at}\"\n"));
        let migration: String = self.migration.iter().map(|statement| format!("{statement};\n")).collect();
        let remarks = [&self.notes[..], &self.of_keys, &self.of_values].concat();
        Proposal { pipeline: self.name.clone(), section, migration, remarks }
    }
}

/// Remarks as comments: nothing of foreign origin can end one.
fn remark(out: &mut String, remarks: &[String]) {
    for remark in remarks {
        let (mut line, mut width) = (String::from("#"), 1);
        for word in printable(remark).split(' ') {
            let length = word.chars().count();
            if width > 1 && width + 1 + length > WIDTH {
                out.push_str(&line);
                out.push('\n');
                (line, width) = (String::from("#  "), 3);
            }
            line.push(' ');
            line.push_str(word);
            width += 1 + length;
        }
        out.push_str(&line);
        out.push('\n');
    }
}

/// A key with an item a line.
fn listed(out: &mut String, key: &str, items: &[impl std::fmt::Display]) {
    let items: Vec<String> = items.iter().map(|item| format!("    {}", escaped(&item.to_string()))).collect();
    out.push_str(&format!("{key} = \"\"\"\n{}\n\"\"\"\n", items.join(",\n")));
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", escaped(text))
}

/// As it stands within quotes in TOML.
fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\\' => shown.extend(['\\', c]),
            c if c.is_control() => shown.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => shown.push(c),
        }
    }
    shown
}

impl Report for Proposal {
    /// One file: the section, and the migration as comments below it.
    fn show(&self, page: &mut Page) {
        for line in self.section.lines() {
            page.line(line);
        }
        if self.migration.is_empty() {
            page.line("\n# The table needs no migration.");
        } else {
            page.line("\n# The migration, which --sql prints alone:");
            for line in self.migration.lines() {
                page.line(format!("#   {line}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::target::{parse_keys, parse_values};
    use proptest::prelude::*;

    fn draft(stream: &str, note: &str, field: &str) -> Draft {
        Draft {
            name: "usage".into(),
            stream: stream.into(),
            table: Table::parse("usage").expect("valid"),
            keys: parse_keys(&format!("a = {field}: uuid")).expect("keys"),
            values: parse_values("n = count(), s = sum(s?: numeric(2))").expect("values"),
            updated_at: None,
            notes: vec![note.into()],
            of_keys: vec![],
            of_values: vec![note.into()],
            migration: vec!["create table public.usage (\n    a uuid\n)".into()],
        }
    }

    proptest! {
        #[test]
        fn whatever_a_stream_holds_the_section_is_toml_that_says_what_is_meant(stream in ".{1,20}", note in "(.|\n|\r){0,200}", field in "[^\\p{C}\\s(),?=:]{1,10}") {
            let draft = draft(&stream, &note, &field);
            let mut page = Page::new(crate::ops::columns::Paint::Plain);
            draft.proposal().show(&mut page);
            let text = page.into_text();
            let table: toml::Table = text.parse().expect("TOML");
            let section = &table["pipelines"]["usage"];
            prop_assert_eq!(section["stream"].as_str(), Some(stream.as_str()));
            prop_assert_eq!(parse_keys(section["keys"].as_str().expect("text")), Ok(draft.keys.clone()));
            prop_assert_eq!(parse_values(section["values"].as_str().expect("text")), Ok(draft.values.clone()));
            prop_assert_eq!(table.len(), 1);
        }
    }
}
