//! What a process says of itself while it runs: lines on stderr, for people or for programs.
//!
//! Stdout stays free for results. No line carries the content of an entry or a secret.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFormat, LogSection};

/// What libraries may say, unless the level names them.
const LIBRARIES: &str = "fred=error,sqlx=warn";

/// Starts writing. Does nothing where a subscriber is set already, as in tests.
pub fn start(log: &LogSection) {
    // Libraries speak when something is wrong. The configuration has checked the level.
    let filter = EnvFilter::try_new(format!("{LIBRARIES},{}", log.level)).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let _ = match log.format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).finish().try_init(),
    };
}
