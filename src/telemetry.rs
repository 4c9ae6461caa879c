//! What a process says of itself while it runs: lines on stderr, for people or for programs.
//!
//! Stdout stays free for results. No line carries the content of an entry or a secret.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What libraries may say, unless the level names them.
const LIBRARIES: &str = "fred=error,sqlx=warn";

/// Starts writing. `level`: a filter as of `tracing_subscriber::EnvFilter`, such as `info` or `info,tidegate=debug`.
///
/// Does nothing where a subscriber is set already, as in tests.
pub fn start(format: Format, level: &str) {
    // Libraries speak when something is wrong. The configuration has checked the level.
    let filter = EnvFilter::try_new(format!("{LIBRARIES},{level}")).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let _ = match format {
        Format::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).finish().try_init(),
        Format::Json => builder.json().flatten_event(true).with_current_span(false).finish().try_init(),
    };
}
