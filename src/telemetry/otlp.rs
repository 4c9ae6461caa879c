//! OTLP: metrics, traces and the log go to a collector, over HTTP or gRPC.
//!
//! Takes `[telemetry]` and the standard variables `OTEL_*`; gives the exporters of the signals that somebody wants. Fails with a sentence that
//! names the key or the variable. What is exported waits in bounded queues on threads of its own: a collector that is away, slow or silent
//! loses telemetry and nothing else, and never holds up a flush.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig};
use opentelemetry_otlp::{
    LogExporter, MetricExporter, Protocol, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};
use opentelemetry_semantic_conventions::resource::{
    HOST_ARCH, HOST_NAME, OS_TYPE, PROCESS_EXECUTABLE_NAME, PROCESS_PID, SERVICE_INSTANCE_ID, SERVICE_NAME,
    SERVICE_VERSION,
};

use super::Refused;
use crate::config::{OtlpProtocol, TelemetrySection};
use crate::model::names;

/// How long one export may take, where `OTEL_EXPORTER_OTLP_TIMEOUT` says nothing: the standard's.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest file of headers or certificates that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// One of the three kinds of telemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    Metrics,
    Traces,
    Logs,
}

impl Signal {
    pub(super) const ALL: [Signal; 3] = [Signal::Metrics, Signal::Traces, Signal::Logs];

    fn word(self) -> &'static str {
        match self {
            Signal::Metrics => "METRICS",
            Signal::Traces => "TRACES",
            Signal::Logs => "LOGS",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Signal::Metrics => "v1/metrics",
            Signal::Traces => "v1/traces",
            Signal::Logs => "v1/logs",
        }
    }

    fn is_wanted(self, section: &TelemetrySection) -> bool {
        match self {
            Signal::Metrics => section.metrics,
            Signal::Traces => section.traces,
            Signal::Logs => section.logs,
        }
    }
}

/// The environment, as far as it concerns telemetry. An empty variable is none, as the standard asks.
pub(super) struct Environment(Box<Lookup>);

type Lookup = dyn Fn(&str) -> Option<String>;

impl Environment {
    pub(super) fn of_process() -> Environment {
        Environment(Box::new(|name| std::env::var(name).ok()))
    }

    pub(super) fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// The variable of one signal, else the general one; with its name.
    fn of_signal(&self, signal: Signal, what: &str) -> Option<(String, String)> {
        let names = [format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.word()), format!("OTEL_EXPORTER_OTLP_{what}")];
        names.into_iter().find_map(|name| self.get(&name).map(|value| (name, value)))
    }
}

/// How one signal is exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) is_grpc: bool,
    /// Set where the configuration says it; otherwise the library asks the environment.
    endpoint: Option<String>,
    headers: Vec<(String, String)>,
    authorities: Option<Vec<u8>>,
    timeout: Option<Duration>,
}

/// How a signal is to be exported; none: it is not.
pub(super) fn way(signal: Signal, section: &TelemetrySection, env: &Environment) -> Result<Option<Way>, Refused> {
    let is_off = |name: &str, off: &str| env.get(name).is_some_and(|value| value.eq_ignore_ascii_case(off));
    let is_named = section.endpoint.is_some() || env.of_signal(signal, "ENDPOINT").is_some();
    let exporter = format!("OTEL_{}_EXPORTER", signal.word());
    if !signal.is_wanted(section) || !is_named || is_off("OTEL_SDK_DISABLED", "true") || is_off(&exporter, "none") {
        return Ok(None);
    }
    if let Some(other) = env.get(&exporter).filter(|value| !value.eq_ignore_ascii_case("otlp")) {
        return Err(Refused(format!(
            "{exporter} is {other:?}; write otlp or none: metrics are scraped on admin.listen at any rate"
        )));
    }
    let is_grpc = match section.protocol {
        OtlpProtocol::Http => false,
        OtlpProtocol::Grpc => true,
        OtlpProtocol::Auto => match env.of_signal(signal, "PROTOCOL") {
            None => false,
            Some((_, protocol)) if protocol == "http/protobuf" => false,
            Some((_, protocol)) if protocol == "grpc" => true,
            Some((name, other)) => {
                return Err(Refused(format!(
                    "{name} is {other:?}; write http/protobuf or grpc, or set telemetry.protocol"
                )));
            }
        },
    };
    let endpoint = section.endpoint.as_ref().map(|endpoint| match is_grpc {
        true => endpoint.clone(),
        false => format!("{}/{}", endpoint.trim_end_matches('/'), signal.path()),
    });
    if let Some((name, endpoint)) = env.of_signal(signal, "ENDPOINT").filter(|_| section.endpoint.is_none()) {
        let is_url = url::Url::parse(&endpoint).is_ok_and(|url| {
            let has_secret = !url.username().is_empty() || url.password().is_some();
            ["http", "https"].contains(&url.scheme()) && url.has_host() && !has_secret
        });
        // gRPC's may be a host and a port alone. It is not quoted: it may hold a password.
        let is_place = is_grpc && !endpoint.contains("://") && !endpoint.contains('@');
        if !is_url && !is_place {
            return Err(Refused(format!(
                "{name} is not a url of HTTP without a user and a password; write http://host:port or https://host:port, and credentials into OTEL_EXPORTER_OTLP_HEADERS"
            )));
        }
    }
    let headers = section.headers_file.as_deref().map(headers).transpose()?.unwrap_or_default();
    let certificate = match &section.certificate_file {
        Some(path) => Some(("telemetry.certificate_file".to_owned(), path.clone())),
        None => env.of_signal(signal, "CERTIFICATE").map(|(name, path)| (name, PathBuf::from(path))),
    };
    let authorities = certificate.map(|(name, path)| read(&name, &path)).transpose()?;
    let timeout = env.of_signal(signal, "TIMEOUT").and_then(|(_, ms)| ms.parse().ok()).map(Duration::from_millis);
    Ok(Some(Way { is_grpc, endpoint, headers, authorities, timeout }))
}

/// Reads `name=value` lines. A value is a secret: it is never quoted.
fn headers(path: &Path) -> Result<Vec<(String, String)>, Refused> {
    const NAME: &str = "telemetry.headers_file";
    let text = String::from_utf8(read(NAME, path)?)
        .map_err(|_| Refused(format!("{NAME} is {path:?}, which is not UTF-8; write name=value lines")))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(n, line)| {
            let header =
                line.split_once('=').map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().to_owned()));
            let is_sound = |(name, value): &(String, String)| {
                let is_name =
                    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
                is_name && value.bytes().all(|b| (b' '..=b'~').contains(&b))
            };
            header.filter(is_sound).ok_or_else(|| {
                Refused(format!("line {} of {NAME} ({path:?}) is not name=value in plain ASCII; correct it", n + 1))
            })
        })
        .collect()
}

fn read(key: &str, path: &Path) -> Result<Vec<u8>, Refused> {
    let refused =
        |why: String| Refused(format!("{key} is {path:?}, which cannot be read ({why}); name a readable file"));
    let about = std::fs::metadata(path).map_err(|error| refused(error.kind().to_string()))?;
    if !about.is_file() || about.len() > MAX_FILE_BYTES {
        return Err(refused("it is no file, or larger than 1 MiB".into()));
    }
    std::fs::read(path).map_err(|error| refused(error.kind().to_string()))
}

impl Way {
    pub(super) fn metrics(&self) -> Result<MetricExporter, Refused> {
        let builder = MetricExporter::builder();
        let built = if self.is_grpc {
            self.grpc(builder.with_tonic())?.build()
        } else {
            self.http(builder.with_http())?.build()
        };
        built.map_err(refused)
    }

    pub(super) fn traces(&self) -> Result<SpanExporter, Refused> {
        let builder = SpanExporter::builder();
        let built = if self.is_grpc {
            self.grpc(builder.with_tonic())?.build()
        } else {
            self.http(builder.with_http())?.build()
        };
        built.map_err(refused)
    }

    pub(super) fn logs(&self) -> Result<LogExporter, Refused> {
        let builder = LogExporter::builder();
        let built = if self.is_grpc {
            self.grpc(builder.with_tonic())?.build()
        } else {
            self.http(builder.with_http())?.build()
        };
        built.map_err(refused)
    }

    fn http<B: WithExportConfig + WithHttpConfig>(&self, builder: B) -> Result<B, Refused> {
        // Exports run on threads without a runtime, and so this client blocks.
        let mut client = reqwest::blocking::Client::builder()
            .timeout(self.timeout.unwrap_or(TIMEOUT))
            .redirect(reqwest::redirect::Policy::none());
        if let Some(authorities) = &self.authorities {
            let bundle = reqwest::Certificate::from_pem_bundle(authorities).map_err(|_| no_certificates())?;
            if bundle.is_empty() {
                return Err(no_certificates());
            }
            client = bundle.into_iter().fold(client, |client, one| client.add_root_certificate(one));
        }
        let client = client.build().map_err(|error| Refused(format!("the exporter cannot be set up: {error}")))?;
        let headers: HashMap<String, String> = self.headers.iter().cloned().collect();
        let builder = builder.with_protocol(Protocol::HttpBinary).with_http_client(client).with_headers(headers);
        Ok(match &self.endpoint {
            Some(endpoint) => builder.with_endpoint(endpoint.clone()),
            None => builder,
        })
    }

    fn grpc<B: WithExportConfig + WithTonicConfig>(&self, builder: B) -> Result<B, Refused> {
        let mut metadata = MetadataMap::new().into_headers();
        for (name, value) in &self.headers {
            let pair = name.parse::<axum::http::HeaderName>().ok().zip(value.parse::<axum::http::HeaderValue>().ok());
            // Both were checked when they were read.
            if let Some((name, value)) = pair {
                metadata.insert(name, value);
            }
        }
        let mut builder = builder.with_metadata(MetadataMap::from_headers(metadata));
        let is_tls = self.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("https://"));
        if let Some(authorities) = &self.authorities {
            let tls = ClientTlsConfig::new().with_native_roots().ca_certificate(Certificate::from_pem(authorities));
            builder = builder.with_tls_config(tls);
        } else if is_tls {
            builder = builder.with_tls_config(ClientTlsConfig::new().with_native_roots());
        }
        Ok(match &self.endpoint {
            Some(endpoint) => builder.with_endpoint(endpoint.clone()),
            None => builder,
        })
    }
}

fn no_certificates() -> Refused {
    Refused("telemetry.certificate_file, or OTEL_EXPORTER_OTLP_CERTIFICATE, holds no certificate in PEM; name a file that does".into())
}

fn refused(error: opentelemetry_otlp::ExporterBuildError) -> Refused {
    Refused(format!("telemetry cannot be exported: {error}"))
}

/// Who tells all this: by the semantic conventions, with what the environment adds or says otherwise.
pub(super) fn resource(env: &Environment) -> Resource {
    let executable =
        std::env::current_exe().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let ours = [
        KeyValue::new(SERVICE_NAME, "tidegate"),
        KeyValue::new(SERVICE_VERSION, env!("CARGO_PKG_VERSION")),
        KeyValue::new(SERVICE_INSTANCE_ID, instance_id()),
        KeyValue::new(HOST_NAME, names::host()),
        KeyValue::new(HOST_ARCH, architecture()),
        KeyValue::new(OS_TYPE, std::env::consts::OS),
        KeyValue::new(PROCESS_PID, i64::from(std::process::id())),
        KeyValue::new(PROCESS_EXECUTABLE_NAME, executable.unwrap_or_else(|| "tidegate".into())),
    ];
    let detectors = Resource::builder_empty()
        .with_attributes(ours)
        .with_detectors(&[Box::new(TelemetryResourceDetector), Box::new(EnvResourceDetector::new())]);
    match env.get("OTEL_SERVICE_NAME") {
        Some(name) => detectors.with_service_name(name).build(),
        None => detectors.build(),
    }
}

/// The conventions' word for this machine's kind.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A random UUID (version 4): no two processes have the same, and none outlives its process.
fn instance_id() -> String {
    let random: u128 = rand::random();
    let uuid = (random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{uuid:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section() -> TelemetrySection {
        TelemetrySection {
            endpoint: None,
            protocol: OtlpProtocol::Auto,
            headers_file: None,
            certificate_file: None,
            metrics: true,
            traces: true,
            logs: true,
            trace_one_in: 0,
            per_stream: false,
        }
    }

    fn env(variables: &'static [(&'static str, &'static str)]) -> Environment {
        Environment(Box::new(move |name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        }))
    }

    fn found(section: &TelemetrySection, variables: &'static [(&'static str, &'static str)]) -> Option<Way> {
        way(Signal::Traces, section, &env(variables)).expect("allowed")
    }

    #[test]
    fn nothing_is_exported_unless_a_collector_is_named() {
        assert_eq!(found(&section(), &[]), None);
        assert_eq!(found(&section(), &[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]), None, "an empty variable is none");
        assert_eq!(found(&section(), &[("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://c:4318/v1/metrics")]), None);
        assert!(found(&section(), &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4318/v1/traces")]).is_some());
        let named = TelemetrySection { endpoint: Some("http://c:4318".into()), ..section() };
        assert!(found(&named, &[]).is_some());
        assert_eq!(found(&named, &[("OTEL_SDK_DISABLED", "true")]), None);
        assert_eq!(found(&named, &[("OTEL_TRACES_EXPORTER", "none")]), None);
        assert_eq!(found(&TelemetrySection { traces: false, ..named }, &[]), None);
    }

    #[test]
    fn a_key_wins_over_the_variable_of_the_signal_which_wins_over_the_general_one() {
        let variables = &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://general:4318"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
        ];
        let by_variables = found(&section(), variables).expect("exported");
        assert!(by_variables.is_grpc && by_variables.endpoint.is_none(), "the library reads the endpoint itself");
        let keys = TelemetrySection {
            endpoint: Some("http://key:4318/base/".into()),
            protocol: OtlpProtocol::Http,
            ..section()
        };
        let by_keys = found(&keys, variables).expect("exported");
        assert!(!by_keys.is_grpc);
        assert_eq!(by_keys.endpoint.as_deref(), Some("http://key:4318/base/v1/traces"));
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_name_and_without_secrets() {
        for (variables, named) in [
            (
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")][..],
                "http/json",
            ),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "hunter2")], "OTEL_EXPORTER_OTLP_ENDPOINT"),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@c:4318")], "OTEL_EXPORTER_OTLP_HEADERS"),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"), ("OTEL_TRACES_EXPORTER", "zipkin")], "zipkin"),
        ] {
            let Refused(sentence) = way(Signal::Traces, &section(), &env(variables)).expect_err("refused");
            assert!(sentence.contains(named) && !sentence.contains("hunter2"), "{sentence}");
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "authorization=Bearer a\nhunter2\n").expect("written");
        let Refused(sentence) = headers(file.path()).expect_err("no name");
        assert!(
            sentence.starts_with("line 2 of telemetry.headers_file") && !sentence.contains("hunter2"),
            "{sentence}"
        );
        std::fs::write(file.path(), "Authorization = Bearer a=b\n\nx-scope=1\n").expect("written");
        let pairs = headers(file.path()).expect("sound");
        assert_eq!(pairs, [("authorization".into(), "Bearer a=b".into()), ("x-scope".into(), "1".into())]);
    }

    #[test]
    fn every_process_has_an_instance_id_of_its_own() {
        let (one, other) = (instance_id(), instance_id());
        assert_ne!(one, other);
        assert_eq!((one.len(), &one[14..15]), (36, "4"));
        assert!(["8", "9", "a", "b"].contains(&&one[19..20]), "{one}");
    }
}
