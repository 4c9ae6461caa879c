//! What a daemon tells, as a real OpenTelemetry collector and a real Prometheus take it: `make telemetry-test`, which fetches both. Where one
//! cannot be had the test says so and is skipped.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tidegate::telemetry::contract::METRICS;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::harness::{Daemon, Lab, eventually, free_port};
use crate::metrics::busy;
use crate::sink::soon;

/// The program that a variable names; none if it could not be had, and then it is said why.
fn part(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        let why = std::env::var(format!("{variable}_MISSING"));
        eprintln!("skipped: {}", why.unwrap_or_else(|_| format!("{variable} is not set; run make telemetry-test")));
    }
    found
}

/// A collector; everything it prints of what it takes.
struct Collector {
    _child: Child,
    printed: Arc<Mutex<String>>,
}

impl Collector {
    fn start(program: PathBuf, grpc: u16, http: u16, directory: &std::path::Path) -> Collector {
        let mut command = Command::new(program);
        command.arg("start").args(["--exporter", "blackhole", "--debug-log-verbosity", "detailed"]);
        command.args(["--debug-log", "traces", "--debug-log", "metrics", "--debug-log", "logs"]);
        command.arg("--otlp-grpc-endpoint").arg(format!("127.0.0.1:{grpc}"));
        command.arg("--otlp-http-endpoint").arg(format!("127.0.0.1:{http}"));
        command.arg("--pid-file").arg(directory.join("pid"));
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the collector starts");
        let printed = Arc::new(Mutex::new(String::new()));
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        tokio::spawn(keep(stdout, printed.clone()));
        tokio::spawn(keep(stderr, printed.clone()));
        Collector { _child: child, printed }
    }

    fn has(&self, text: &str) -> bool {
        self.printed.lock().expect("kept").contains(text)
    }
}

async fn keep(from: impl tokio::io::AsyncRead + Unpin, to: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let mut to = to.lock().expect("kept");
        to.push_str(&line);
        to.push('\n');
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "wants a collector: make telemetry-test"]
async fn a_real_collector_takes_metrics_traces_and_the_log_over_grpc_and_http() {
    let Some(program) = part("TIDEGATE_ROTEL") else { return };
    let directory = tempfile::tempdir().expect("a folder");
    let (grpc, http) = (free_port(), free_port());
    let collector = Collector::start(program, grpc, http, directory.path());
    for port in [grpc, http] {
        eventually("the collector's port", true, async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    }
    for (port, protocol, namespace) in [(grpc, "grpc", "by-grpc"), (http, "http/protobuf", "by-http")] {
        let lab = Lab::new().await;
        let traceparent = format!("00-{:032x}-{:016x}-01", 0x0af7_6519_16cd_43dd_u128 + u128::from(port), 7);
        let traced = ["XADD", "flush:counters", "*", "id", "a", "amount", "3", "traceparent", &traceparent];
        lab.client().await.call(&traced).await;
        let mut command = lab.program(&["run"]);
        command.envs(soon()).env("TIDEGATE__TELEMETRY__TRACE_ONE_IN", "1");
        command.env("TIDEGATE__TELEMETRY__ENDPOINT", format!("http://127.0.0.1:{port}"));
        command.env("TIDEGATE__TELEMETRY__PROTOCOL", protocol);
        command.env("OTEL_RESOURCE_ATTRIBUTES", format!("service.namespace={namespace}"));
        let mut daemon = Daemon::start(command);
        daemon.wait_for_event("running", |_| true).await;
        lab.await_value("a", 3).await;
        let link = traceparent[3..35].to_owned();
        for expected in [namespace, "tidegate.backlog.entries", "tidegate.flush.duration", "settle", "running", &link] {
            eventually(expected, true, async || collector.has(expected)).await;
        }
    }
}

/// One request to Prometheus' own interface.
async fn query(port: u16, expression: &str) -> Option<Value> {
    let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let request = format!("GET /api/v1/query?query={encoded} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    serde_json::from_str::<Value>(body).ok().filter(|answer| answer["status"] == "success")
}

/// The value of an expression that gives one series.
async fn value(port: u16, expression: &str) -> Option<f64> {
    query(port, expression).await?["data"]["result"][0]["value"][1].as_str()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "wants a Prometheus: make telemetry-test"]
async fn a_real_prometheus_scrapes_every_metric_and_computes_with_it() {
    let Some(program) = part("TIDEGATE_PROMETHEUS") else { return };
    let lab = Lab::new().await;
    let (_daemon, admin) = busy(&lab).await;
    let directory = tempfile::tempdir().expect("a folder");
    let (port, configuration) = (free_port(), directory.path().join("prometheus.yml"));
    let scrape = format!(
        "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms }}\nscrape_configs:\n- job_name: tidegate\n  static_configs: [{{ targets: ['{}'] }}]\n",
        admin.address
    );
    std::fs::write(&configuration, scrape).expect("written");
    let mut command = Command::new(program);
    command.arg(format!("--config.file={}", configuration.display()));
    command.arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _prometheus = command.spawn().expect("Prometheus starts");

    eventually("the scrape", Some(1.0), async || value(port, "up{job=\"tidegate\"}").await).await;
    let settled = "sum(tidegate_entries_settled_total{pipeline=\"counters\"})";
    eventually("what is settled", Some(801.0), async || value(port, settled).await).await;
    // The runway is that of what is added between two looks.
    let mut client = lab.client().await;
    for metric in METRICS {
        let name = metric.prometheus_name();
        let series = if metric.kind() == "histogram" { format!("{name}_count") } else { name };
        eventually(&series, true, async || {
            client.add("hot", 1).await;
            value(port, &format!("count({series})")).await.is_some()
        })
        .await;
    }
    let quantile =
        "histogram_quantile(0.99, sum by (le) (tidegate_flush_duration_seconds_bucket{outcome=\"committed\"}))";
    assert!(value(port, quantile).await.is_some_and(|seconds| seconds > 0.0 && seconds < 60.0));
    let metadata = query(port, "tidegate_halted").await.expect("an answer");
    assert_eq!(metadata["data"]["result"][0]["metric"]["pipeline"], "counters");
    // As the alert computes it, with a real clock.
    let left = value(port, "min by (finding) (tidegate_acceptance_until_timestamp_seconds) - time()").await;
    assert!(left.is_some_and(|seconds| (0.0..=3_600.0).contains(&seconds)), "{left:?}");
}
