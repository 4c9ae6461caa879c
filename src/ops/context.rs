//! Context: what every command is given beside its own options.
//!
//! Takes the process's environment and the options that all commands share; gives the configuration, a way to print data on stdout
//! in the asked form, a way to talk on stderr, and the answer to a question. It fails where the configuration is not valid, or where
//! stdout or stderr is closed.

use std::io::{BufRead, ErrorKind, IsTerminal, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::Exit;
use super::columns::{Page, Paint};
use super::failure::Failure;
use crate::config::{Config, Loaded, Needs, Sources, load};
use crate::model::pipeline::Pipeline;
use crate::retry::socket_words;
use crate::telemetry;

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON document, or one a line where there are several; docs/schemas has what it holds
    Json,
}

/// What of the process is a terminal, and how it is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terminal {
    /// Whether somebody can be asked.
    pub can_ask: bool,
    /// Whether stdout is a terminal.
    pub shows_output: bool,
    /// Whether stdout takes colours.
    pub paint: Paint,
}

impl Terminal {
    fn of_process() -> Terminal {
        let shows_output = std::io::stdout().is_terminal();
        let can_ask = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        let colours = telemetry::log::colours_for(shows_output);
        Terminal { can_ask, shows_output, paint: if colours { Paint::Colours } else { Paint::Plain } }
    }
}

/// What can be printed: as a page for people, and as JSON by its [`Serialize`].
pub trait Report: Serialize {
    /// Writes it for people.
    fn show(&self, page: &mut Page);
}

/// See the module.
#[derive(Debug)]
pub struct Context {
    file: Option<PathBuf>,
    /// How data is printed.
    pub format: Format,
    /// Where it is printed.
    pub terminal: Terminal,
}

impl Context {
    /// Of this process.
    pub fn of_process(file: Option<PathBuf>, format: Format) -> Context {
        Context { file, format, terminal: Terminal::of_process() }
    }

    /// Where the configuration comes from; `flags` are keys and texts of the command line.
    pub fn sources(&self, flags: Vec<(String, String)>) -> Sources {
        Sources::from_process(self.file.clone(), flags)
    }

    /// The configuration with the origin of each value.
    pub fn load(&self, flags: Vec<(String, String)>, needs: Needs) -> Result<Loaded, Failure> {
        Ok(load(&self.sources(flags), needs)?)
    }

    /// The configuration, with the log started as it says.
    pub fn configured(&self, flags: Vec<(String, String)>, needs: Needs) -> Result<Config, Failure> {
        let config = self.load(flags, needs)?.config;
        telemetry::log::start(&config.log, None);
        Ok(config)
    }

    /// Prints data on stdout, in the form that was asked for.
    pub fn print(&self, report: &impl Report) -> Result<(), Failure> {
        let text = match self.format {
            Format::Table => {
                let mut page = Page::new(self.terminal.paint);
                report.show(&mut page);
                page.into_text()
            }
            Format::Json => json(report)? + "\n",
        };
        self.write(&text)
    }

    /// Writes text on stdout as it is.
    pub fn write(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(not_written)
    }

    /// Talks on stderr.
    pub fn say(&self, line: &str) {
        // If stderr is closed there is nobody to talk to.
        let _ = writeln!(std::io::stderr(), "{line}");
    }

    /// Asks whether to go on, unless that was answered on the command line. Where nobody can be asked, what was not allowed is refused.
    pub fn confirm(&self, question: &str, yes: bool) -> Result<(), Failure> {
        if yes {
            return Ok(());
        }
        if !self.terminal.can_ask {
            let words =
                format!("{question} Nothing was changed: add --yes to do it, or --dry-run to see what it would do");
            return Err(Failure::usage(words));
        }
        write!(std::io::stderr(), "{question} [y/N] ")?;
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::new(Exit::Error, "nothing was changed")),
        }
    }
}

/// Why stdout could not be written to. That nobody reads the rest is no failure.
pub(super) fn not_written(error: std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::BrokenPipe => error.into(),
        _ => Failure::new(Exit::Error, format!("stdout cannot be written to: {}", socket_words(&error))),
    }
}

/// A document on one line.
pub fn json(report: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(report)
        .map_err(|error| Failure::new(Exit::Error, format!("cannot be written as JSON: {error}")))
}

/// The pipelines that are asked for: those that are named, or all.
pub fn chosen<'a>(config: &'a Config, names: &[String]) -> Result<Vec<&'a Pipeline>, Failure> {
    if names.is_empty() {
        return Ok(config.pipelines.iter().collect());
    }
    names.iter().map(|name| one(config, Some(name))).collect()
}

/// The managed pipeline that is asked for; `otherwise`: why a plain one will not do.
pub fn managed<'a>(config: &'a Config, name: Option<&str>, otherwise: &str) -> Result<&'a Pipeline, Failure> {
    let pipeline = one(config, name)?;
    match pipeline.is_managed() {
        true => Ok(pipeline),
        false => Err(Failure::new(Exit::Config, format!("pipeline {} is plain: {otherwise}", pipeline.name))),
    }
}

/// The pipeline that is asked for; the only one may go unnamed.
pub fn one<'a>(config: &'a Config, name: Option<&str>) -> Result<&'a Pipeline, Failure> {
    let names = || config.pipelines.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
    let words = match (name, &config.pipelines[..]) {
        (Some(name), pipelines) => match pipelines.iter().find(|pipeline| pipeline.name == name) {
            Some(found) => return Ok(found),
            None => format!("there is no pipeline {name:?}: name one of {}", names()),
        },
        (None, [only]) => return Ok(only),
        (None, _) => format!("there are several pipelines: add --pipeline and one of {}", names()),
    };
    Err(Failure::new(Exit::Config, words))
}

/// The same where the verb is about counters: a counter in Valkey to each row.
pub fn one_of_counters<'a>(config: &'a Config, name: Option<&str>) -> Result<&'a Pipeline, Failure> {
    let pipeline = one(config, name)?;
    if pipeline.is_counter() {
        return Ok(pipeline);
    }
    let words = format!(
        "the rows of pipeline {} are more than a counter each, and Valkey has no counter that stands for one: name a pipeline of counters",
        pipeline.name
    );
    Err(Failure::new(Exit::Config, words))
}
