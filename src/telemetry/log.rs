//! What a process says of itself while it runs: lines on stderr, for people or for programs, and the same as records for a collector.
//!
//! Takes the configuration's `[log]`; stdout stays free for results. No line carries the content of an entry or a secret. It
//! cannot fail: the configuration has checked the level. The level can be changed while the process runs.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::ffi::OsStr;
use std::fmt;
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use tracing::{Event, Subscriber, error};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use super::trace::current;
use crate::config::{LogFormat, LogSection};

/// What libraries may say, unless the level names them.
const LIBRARIES: &str =
    "fred=error,sqlx=warn,opentelemetry=warn,hyper=warn,h2=warn,tonic=warn,tower=warn,reqwest=warn,rustls=warn";
/// Whose words are not exported: about an export they would lead to the next one.
const OF_EXPORTERS: [&str; 6] = ["opentelemetry", "hyper", "h2", "tonic", "tower", "reqwest"];

/// What the level can be changed by.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts writing; and exporting, where there is something to export by. Does nothing where a subscriber is set already, as in tests.
pub fn start(log: &LogSection, exported: Option<&SdkLoggerProvider>) {
    let (filter, handle) = reload::Layer::new(filter(&log.level));
    let colours = colours_for(std::io::stderr().is_terminal());
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match log.format {
        LogFormat::Text => {
            let traced = |format| Traced { format, is_json: false };
            lines.with_ansi(colours).map_event_format(traced).boxed()
        }
        LogFormat::Json => {
            let traced = |format| Traced { format, is_json: true };
            lines.json().flatten_event(true).with_current_span(false).map_event_format(traced).boxed()
        }
    };
    let is_ours = filter_fn(|about| !OF_EXPORTERS.iter().any(|library| about.target().starts_with(library)));
    let exported = exported.map(|loggers| OpenTelemetryTracingBridge::new(loggers).with_filter(is_ours));
    if tracing_subscriber::registry().with(filter).with(lines).with(exported).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// A form of lines, in which those about a sampled batch end with its trace. The records for a collector have it anyway.
struct Traced<F> {
    format: F,
    is_json: bool,
}

impl<S, N, F> FormatEvent<S, N> for Traced<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let Some((trace, span)) = current() else { return self.format.format_event(context, writer, event) };
        let mut line = String::new();
        self.format.format_event(context, Writer::new(&mut line), event)?;
        let line = line.trim_end();
        match line.strip_suffix('}') {
            Some(fields) if self.is_json => {
                writeln!(writer, "{fields},\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}")
            }
            _ => writeln!(writer, "{line} trace_id={trace} span_id={span}"),
        }
    }
}

/// What is quoted of a panic's message: it may hold a piece of what was at hand.
const QUOTED: usize = 200;

/// Panics of this process since [`tell_panics`].
static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many panics there were in this process.
pub(super) fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// From now on a panic, in whatever thread or task, is counted, and is an event like any other, and no text among them. Where even errors are not to
/// be told it is text.
pub fn tell_panics() {
    std::panic::set_hook(Box::new(|panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        let message: String = panic.payload_as_str().unwrap_or("without a message").chars().take(QUOTED).collect();
        let at = panic.location().map_or_else(String::new, ToString::to_string);
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        if !tracing::enabled!(tracing::Level::ERROR) {
            // If stderr is closed there is nobody to tell.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("panicked at {at}: {message}\n"));
            return;
        }
        let backtrace = Backtrace::capture();
        match backtrace.status() {
            BacktraceStatus::Captured => error!(event = "panicked", thread, at, message, %backtrace, "{A_BUG}"),
            _ => error!(event = "panicked", thread, at, message, "{A_BUG}"),
        }
    }));
}

/// What a panic is.
const A_BUG: &str = "a panic, which is a bug: please report it, with RUST_BACKTRACE=1 if it comes again";

/// From now on this much is told.
pub fn set_level(level: &str) {
    if let Some(handle) = FILTER.get() {
        // Fails only if the subscriber is gone.
        let _ = handle.reload(filter(level));
    }
}

/// Libraries speak when something is wrong.
fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_new(format!("{LIBRARIES},{level}")).unwrap_or_else(|_| EnvFilter::new("info"))
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
