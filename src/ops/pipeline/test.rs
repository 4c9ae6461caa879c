//! `tidegate pipeline test`: what sample entries make of empty tables, compared with the rows that are expected, without a server.
//!
//! Takes files with tests and the configuration; prints a line for each test and, below one that fails, what differs. Exit 1 when one fails, 65 when a
//! file is no file of tests.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::cases::{self, MAX_FILE_BYTES};
use super::compare::{Difference, compare};
use crate::config::{Config, Needs};
use crate::model::pipeline::Pipeline;
use crate::ops::columns::{Page, Tone, plural, printable};
use crate::ops::context::{Report, one};
use crate::ops::{Context, Exit, Failure};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Files with tests, in TOML: docs/pipelines.md has the form
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Only tests whose name contains this text
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
}

/// How the tests went.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Tested {
    /// How many passed.
    pub passed: u64,
    /// How many failed.
    pub failed: u64,
    /// What keeps a file, or a test, from being understood: path:line and a sentence each.
    pub problems: Vec<String>,
    /// The tests, in their order.
    pub tests: Vec<TestResult>,
}

/// How a test went.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TestResult {
    /// Where it is written: path:line.
    pub place: String,
    /// Its name.
    pub name: String,
    /// The pipeline that is tested.
    pub pipeline: String,
    /// Whether everything is as it is expected.
    pub passed: bool,
    /// What is not.
    pub differences: Vec<Difference>,
}

/// Runs the verb.
pub(super) fn run(opts: &Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.load(Vec::new(), Needs::NONE)?.config;
    let mut tested = Tested { passed: 0, failed: 0, problems: Vec::new(), tests: Vec::new() };
    let mut is_unreadable = false;
    for file in &opts.files {
        match read_text(file) {
            Ok(text) => tested.file(&config, &file.display().to_string(), &text, opts.only.as_deref()),
            Err(error) => {
                is_unreadable = true;
                tested.problems.push(format!("{}: cannot be read ({error}); name a file of tests", file.display()));
            }
        }
    }
    if tested.tests.is_empty() && tested.problems.is_empty() {
        let only = opts.only.as_deref().unwrap_or_default();
        return Err(Failure::new(Exit::BadInput, format!("no test's name contains {only:?}: leave out --only")));
    }
    context.print(&tested)?;
    Ok(match (is_unreadable, tested.problems.is_empty(), tested.failed) {
        (true, ..) => Exit::NoInput,
        (_, false, _) => Exit::BadInput,
        (_, _, 0) => Exit::Ok,
        _ => Exit::Error,
    })
}

fn read_text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let length = std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if length as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("it is larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

impl Tested {
    fn file(&mut self, config: &Config, path: &str, text: &str, only: Option<&str>) {
        let cases = match cases::read(path, text) {
            Ok(cases) => cases,
            Err(problems) => return self.problems.extend(problems),
        };
        for case in cases.into_iter().filter(|case| only.is_none_or(|only| case.name.contains(only))) {
            let pipeline: &Pipeline = match one(config, case.pipeline.as_deref()) {
                Ok(pipeline) => pipeline,
                Err(_) => {
                    let names = config.pipelines.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
                    let sentence = match &case.pipeline {
                        Some(name) => format!("there is no pipeline {name:?} that reads a stream; name one of {names}"),
                        None => format!("there are several pipelines; add pipeline = one of {names}"),
                    };
                    self.problems.push(format!("{}: {sentence}", case.place));
                    continue;
                }
            };
            match compare(&case, pipeline, config.batch.max_entry_bytes) {
                Ok(differences) => {
                    let passed = differences.is_empty();
                    *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
                    let (place, name, pipeline) = (case.place, case.name, pipeline.name.clone());
                    self.tests.push(TestResult { place, name, pipeline, passed, differences });
                }
                Err(problem) => self.problems.push(problem),
            }
        }
    }
}

impl Report for Tested {
    fn show(&self, page: &mut Page) {
        for test in &self.tests {
            let line = format!("{} ({}, pipeline {})", printable(&test.name), printable(&test.place), test.pipeline);
            match test.passed {
                true => page.toned(Tone::Good, format!("ok    {line}")),
                false => page.toned(Tone::Bad, format!("FAIL  {line}")),
            }
            for difference in &test.differences {
                difference.show(page);
            }
        }
        for problem in &self.problems {
            page.toned(Tone::Bad, printable(problem));
        }
        let mut words = vec![format!("{} passed", plural(self.passed, "test", "tests"))];
        if self.failed > 0 {
            words.push(format!("{} failed", self.failed));
        }
        if !self.problems.is_empty() {
            words.push(format!("{} to correct first", plural(self.problems.len() as u64, "mistake", "mistakes")));
        }
        page.line(words.join(", "));
    }
}

impl Difference {
    fn show(&self, page: &mut Page) {
        let shown = |text: &Option<String>| text.as_deref().map_or_else(|| "null".into(), printable);
        match self {
            Difference::Value { table, key, column, expected, found } => {
                page.line(format!("      {table} {}", printable(key)));
                page.line(format!("        {column}  expected {}", shown(expected)));
                page.line(format!("        {:width$}  found    {}", "", shown(found), width = column.len()));
            }
            Difference::MissingRow { table, key, place } => {
                page.line(format!("      {table} {}: expected ({}), and not there", printable(key), printable(place)));
            }
            Difference::UnexpectedRow { table, row } => {
                page.line(format!("      {table} {}: there, and not expected", printable(row)));
            }
            Difference::Entry { entry, expected, found, detail } => {
                let expected = expected
                    .as_ref()
                    .map_or_else(|| "it lands".into(), |reason| format!("it is buried for {}", printable(reason)));
                let found = match (found, detail) {
                    (Some(reason), Some(detail)) => format!("it is buried for {reason} ({})", printable(detail)),
                    _ => "it lands".into(),
                };
                page.line(format!("      entry {entry}: expected that {expected}; found that {found}"));
            }
            Difference::Fault { words } => page.line(format!("      {words}")),
        }
    }
}
