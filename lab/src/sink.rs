//! An OTLP collector that keeps everything it is sent, for exact assertions: over HTTP and over gRPC.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tonic::codec::CompressionEncoding;
use tonic::{Request, Response, Status};

pub use opentelemetry_proto::tonic::metrics::v1::metric::Data;
pub use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;

/// What was sent, in the order in which it came.
#[derive(Debug, Default, Clone)]
pub struct Received {
    pub resources: Vec<Resource>,
    pub metrics: Vec<Metric>,
    pub spans: Vec<Span>,
    pub logs: Vec<LogRecord>,
    /// Of every request: its headers, as text.
    pub headers: Vec<String>,
}

/// See the module. Its clones are one.
#[derive(Debug, Clone, Default)]
pub struct Sink {
    received: Arc<Mutex<Received>>,
}

/// Where a sink listens.
pub struct Listening {
    pub sink: Sink,
    pub port: u16,
}

impl Listening {
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Sink {
    /// Listens for OTLP over HTTP.
    pub async fn http() -> Listening {
        let sink = Sink::default();
        let router = axum::Router::new()
            .route("/v1/metrics", post(http::<ExportMetricsServiceRequest>))
            .route("/v1/traces", post(http::<ExportTraceServiceRequest>))
            .route("/v1/logs", post(http::<ExportLogsServiceRequest>))
            .with_state(sink.clone());
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Listening { sink, port }
    }

    /// Listens for OTLP over gRPC.
    pub async fn grpc() -> Listening {
        let sink = Sink::default();
        let incoming = tonic::transport::server::TcpIncoming::bind(([127, 0, 0, 1], 0).into()).expect("a free port");
        let port = incoming.local_addr().expect("bound").port();
        let gzip = CompressionEncoding::Gzip;
        let server = tonic::transport::Server::builder()
            .add_service(MetricsServiceServer::new(sink.clone()).accept_compressed(gzip))
            .add_service(TraceServiceServer::new(sink.clone()).accept_compressed(gzip))
            .add_service(LogsServiceServer::new(sink.clone()).accept_compressed(gzip));
        tokio::spawn(server.serve_with_incoming(incoming));
        Listening { sink, port }
    }

    /// Everything so far.
    pub fn received(&self) -> Received {
        self.received.lock().expect("kept").clone()
    }

    fn take(&self, headers: String, sent: impl Sent) {
        let mut received = self.received.lock().expect("kept");
        received.headers.push(headers);
        sent.put(&mut received);
    }
}

impl Received {
    /// The last that was sent of the metric of this name.
    pub fn metric(&self, name: &str) -> Option<&Metric> {
        self.metrics.iter().rev().find(|metric| metric.name == name)
    }

    /// The spans of this name.
    pub fn spans(&self, name: &str) -> Vec<&Span> {
        self.spans.iter().filter(|span| span.name == name).collect()
    }

    /// Everything as one text, to look for what must not be in it.
    pub fn everything(&self) -> String {
        format!("{self:?}")
    }
}

/// The value of an attribute, as text.
pub fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value?;
    Some(match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

/// One of the three kinds of requests.
trait Sent: Message + Default + 'static {
    fn put(self, received: &mut Received);
}

impl Sent for ExportMetricsServiceRequest {
    fn put(self, received: &mut Received) {
        for of_resource in self.resource_metrics {
            received.resources.extend(of_resource.resource);
            received.metrics.extend(of_resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics));
        }
    }
}

impl Sent for ExportTraceServiceRequest {
    fn put(self, received: &mut Received) {
        for of_resource in self.resource_spans {
            received.resources.extend(of_resource.resource);
            received.spans.extend(of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
}

impl Sent for ExportLogsServiceRequest {
    fn put(self, received: &mut Received) {
        for of_resource in self.resource_logs {
            received.resources.extend(of_resource.resource);
            received.logs.extend(of_resource.scope_logs.into_iter().flat_map(|scope| scope.log_records));
        }
    }
}

async fn http<T: Sent>(State(sink): State<Sink>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let mut unzipped = Vec::new();
    let bytes: &[u8] = match headers.get("content-encoding").map(|encoding| encoding.as_bytes()) {
        Some(b"gzip") => {
            flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut unzipped).expect("gzip");
            &unzipped
        }
        _ => &body,
    };
    match T::decode(bytes) {
        Ok(sent) => {
            sink.take(format!("{headers:?}"), sent);
            StatusCode::OK
        }
        Err(_) => StatusCode::BAD_REQUEST,
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.take(format!("{:?}", request.metadata()), request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.take(format!("{:?}", request.metadata()), request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Sink {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        self.take(format!("{:?}", request.metadata()), request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

/// A collector that takes connections and never says a word.
pub async fn black_hole() -> u16 {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            held.push(connection);
        }
    });
    port
}

/// How often exporters of a test export: the standard's default of a minute is too long for one.
pub const EXPORT_EVERY: Duration = Duration::from_millis(200);

/// The variables that make a program export soon.
pub fn soon() -> [(&'static str, String); 3] {
    let every = EXPORT_EVERY.as_millis().to_string();
    [
        ("OTEL_METRIC_EXPORT_INTERVAL", every.clone()),
        ("OTEL_BSP_SCHEDULE_DELAY", every.clone()),
        ("OTEL_BLRP_SCHEDULE_DELAY", every),
    ]
}
