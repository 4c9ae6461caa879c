//! What a process says of itself while it runs: lines on stderr, for people or for programs.
//!
//! Takes the configuration's `[log]`; stdout stays free for results. No line carries the content of an entry or a secret. It
//! cannot fail: the configuration has checked the level.

use std::ffi::OsStr;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFormat, LogSection};

/// What libraries may say, unless the level names them.
const LIBRARIES: &str = "fred=error,sqlx=warn";

/// Starts writing. Does nothing where a subscriber is set already, as in tests.
pub fn start(log: &LogSection) {
    // Libraries speak when something is wrong.
    let filter = EnvFilter::try_new(format!("{LIBRARIES},{}", log.level)).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let colours = colours_for(std::io::stderr().is_terminal());
    let _ = match log.format {
        LogFormat::Text => builder.with_ansi(colours).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).finish().try_init(),
    };
}

/// Whether to write colours, on a terminal or elsewhere.
pub fn colours_for(is_terminal: bool) -> bool {
    let variable = |name| std::env::var_os(name);
    wants_colours(is_terminal, variable("NO_COLOR"), variable("TERM"))
}

/// Colours are for a terminal that can show them, and for people who have not set `NO_COLOR` (<https://no-color.org>).
fn wants_colours(is_terminal: bool, no_color: Option<impl AsRef<OsStr>>, term: Option<impl AsRef<OsStr>>) -> bool {
    let is_set = no_color.is_some_and(|value| !value.as_ref().is_empty());
    is_terminal && !is_set && term.is_none_or(|term| term.as_ref() != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_that_show_them_and_people_who_want_them() {
        assert!(wants_colours(true, None::<&str>, Some("xterm-256color")));
        assert!(wants_colours(true, Some(""), None::<&str>), "an empty NO_COLOR is none");
        assert!(!wants_colours(true, Some("1"), Some("xterm-256color")));
        assert!(!wants_colours(true, None::<&str>, Some("dumb")));
        assert!(!wants_colours(false, None::<&str>, Some("xterm-256color")));
    }
}
