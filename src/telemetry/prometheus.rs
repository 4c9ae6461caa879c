//! Prometheus: the metrics as a scrape reads them.
//!
//! Takes the registry into which the meters export; gives the text format 0.0.4. It fails only where a metric cannot be written as text, which
//! is a bug.

use prometheus::{Encoder, Registry, TextEncoder};

/// What the text is called in HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics of this process, to be scraped. Its clones are one.
#[derive(Debug, Clone, Default)]
pub struct Scrape(Registry);

impl Scrape {
    /// The reader that makes meters export into it. The error is the library's.
    pub(super) fn reader(&self) -> Result<opentelemetry_prometheus::PrometheusExporter, String> {
        let exporter = opentelemetry_prometheus::exporter().with_registry(self.0.clone());
        exporter.scope_info_enabled(false).build().map_err(|error| error.to_string())
    }

    /// What a scrape reads now.
    pub fn text(&self) -> Result<String, String> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.gather(), &mut text).map_err(|error| error.to_string())?;
        String::from_utf8(text).map_err(|error| error.to_string())
    }
}
