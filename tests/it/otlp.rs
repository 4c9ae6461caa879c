//! What goes to a collector: metrics, traces and the log, over HTTP and gRPC, with the standard's names, and no secret.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tidegate::telemetry::contract::METRICS;
use tokio::process::Command;

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, eventually, output};
use crate::sink::{Data, Listening, Number, Received, Sink, attribute, black_hole, soon};

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// The daemon, exporting soon, and a trace of every batch.
fn exporting(lab: &Lab, arguments: &[&str]) -> Command {
    let mut command = lab.program(arguments);
    command.envs(soon()).env("TIDEGATE__TELEMETRY__TRACE_ONE_IN", "1");
    command
}

/// The sum of all points of a counter whose attributes have these values.
fn counted(received: &Received, name: &str, labels: &[(&str, &str)]) -> Option<u64> {
    let Data::Sum(sum) = received.metric(name)?.data.as_ref()? else { panic!("{name} is no sum") };
    assert!(sum.is_monotonic, "{name} may go down");
    let fits = |attributes| labels.iter().all(|(key, value)| attribute(attributes, key).as_deref() == Some(*value));
    let number = |value: &Option<Number>| match value {
        Some(Number::AsInt(number)) => *number as u64,
        other => panic!("{name}: {other:?}"),
    };
    Some(sum.data_points.iter().filter(|point| fits(&point.attributes)).map(|point| number(&point.value)).sum())
}

async fn everything_arrives(listening: Listening, configure: impl Fn(&mut Command, &str)) {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 20).await;
    let traced = ["XADD", "flush:counters", "*", "id", "a", "amount", "3", "traceparent", TRACEPARENT];
    client.call(&traced).await;
    let mut command = exporting(&lab, &["run", "--until-empty"]);
    configure(&mut command, &listening.url());
    command.env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.namespace=counting");
    let mut daemon = Daemon::start(command);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    assert_eq!(lab.value("a").await, Some(23));

    // The process has ended: whatever it had to say is here.
    let received = listening.sink.received();
    let settled =
        |outcome| counted(&received, "tidegate.entries.settled", &[("pipeline", "counters"), ("outcome", outcome)]);
    assert_eq!((settled("applied"), settled("recognised"), settled("buried")), (Some(21), Some(0), Some(0)));
    for metric in METRICS.iter().filter(|metric| received.metric(metric.name).is_some()) {
        let sent = received.metric(metric.name).expect("sent");
        assert_eq!((sent.unit.as_str(), sent.description.as_str()), (metric.unit, metric.sentence), "{}", metric.name);
    }
    let undeclared: Vec<&str> = received
        .metrics
        .iter()
        .map(|sent| sent.name.as_str())
        .filter(|name| METRICS.iter().all(|m| m.name != *name))
        .collect();
    assert_eq!(undeclared, Vec::<&str>::new());

    let resource = received.resources.first().expect("a resource");
    let of = |key| attribute(&resource.attributes, key);
    assert_eq!(of("service.name").as_deref(), Some("tidegate"));
    assert_eq!(of("service.version").as_deref(), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(of("service.instance.id").map(|id| id.len()), Some(36));
    assert_eq!(
        of("process.pid"),
        received.resources.last().and_then(|last| attribute(&last.attributes, "process.pid"))
    );
    assert_eq!(of("deployment.environment.name").as_deref(), Some("test"));
    assert_eq!(of("service.namespace").as_deref(), Some("counting"));
    for key in ["host.name", "host.arch", "os.type", "process.executable.name", "telemetry.sdk.version"] {
        assert!(of(key).is_some(), "{key}: {resource:?}");
    }

    // One trace for each batch: its root, how it came, its flush, its acknowledgement.
    let roots = received.spans("settle");
    assert!(!roots.is_empty(), "{received:?}");
    for root in &roots {
        assert!(root.parent_span_id.is_empty());
        let within = |name| {
            let mut spans = received.spans(name);
            spans.retain(|span| span.trace_id == root.trace_id && span.parent_span_id == root.span_id);
            spans.len()
        };
        assert_eq!((within("read") + within("reclaim"), within("flush"), within("ack")), (1, 1, 1), "{received:#?}");
        assert_eq!(attribute(&root.attributes, "tidegate.pipeline").as_deref(), Some("counters"));
    }
    let linked: Vec<_> = received.spans("flush").into_iter().filter(|span| !span.links.is_empty()).collect();
    let [flush] = linked[..] else { panic!("one flush has stored it: {linked:?}") };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let link = &flush.links[0];
    assert_eq!(format!("00-{}-{}-01", hex(&link.trace_id), hex(&link.span_id)), TRACEPARENT);
    assert_eq!(attribute(&flush.attributes, "tidegate.outcome").as_deref(), Some("committed"));
    assert_eq!(attribute(&flush.attributes, "db.system.name").as_deref(), Some("postgresql"));

    let stopped = received.logs.iter().find(|log| attribute(&log.attributes, "event").as_deref() == Some("stopped"));
    let stopped = stopped.unwrap_or_else(|| panic!("the last word is missing: {:?}", received.logs));
    assert_eq!(
        (stopped.severity_text.as_str(), attribute(&stopped.attributes, "phase").as_deref()),
        ("INFO", Some("settled"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_traces_and_the_log_arrive_over_http() {
    everything_arrives(Sink::http().await, |command, url| {
        command.env("TIDEGATE__TELEMETRY__ENDPOINT", url).env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_traces_and_the_log_arrive_over_grpc() {
    everything_arrives(Sink::grpc().await, |command, url| {
        command.env("TIDEGATE__TELEMETRY__ENDPOINT", url).env("TIDEGATE__TELEMETRY__PROTOCOL", "grpc");
        command.env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standard_variables_alone_are_enough() {
    everything_arrives(Sink::grpc().await, |command, url| {
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", url).env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        command.env_remove("TIDEGATE__TELEMETRY__TRACE_ONE_IN");
        command.env("OTEL_TRACES_SAMPLER", "always_on");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_tidegate_produce_was_asked_to_carry_leads_to_the_flush_that_stored_it() {
    let lab = Lab::new().await;
    let listening = Sink::http().await;
    let folder = tempfile::tempdir().expect("a folder");
    let lines = folder.path().join("lines");
    std::fs::write(&lines, "a 2\nb 3\n").expect("written");
    let lines = lines.to_str().expect("a path");
    let (code, _, stderr) = output(&mut lab.program(&["produce", "--traceparent", TRACEPARENT, lines])).await;
    assert_eq!(code, 0, "{stderr}");
    let (code, _, stderr) = output(&mut lab.program(&["produce", "--traceparent", "00-nonsense", lines])).await;
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("write 00-<32 hexadecimal digits>"), "{stderr}");
    let mut command = exporting(&lab, &["run", "--until-empty"]);
    let (code, _, stderr) = output(command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url())).await;
    assert_eq!(code, 0, "{stderr}");
    let received = listening.sink.received();
    let links: Vec<_> = received.spans("flush").into_iter().flat_map(|span| &span.links).collect();
    assert_eq!(links.len(), 1, "both entries have the same cause: {links:?}");
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(2), Some(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_from_a_file_reach_the_collector_and_nobody_else() {
    let lab = Lab::new().await;
    let listening = Sink::http().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "Authorization=Bearer hunter2\n").expect("written");
    let mut command = exporting(&lab, &["run", "--until-empty"]);
    command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url()).env("TIDEGATE__TELEMETRY__HEADERS_FILE", file.path());
    command.env("TIDEGATE__LOG__LEVEL", "trace");
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stderr}");
    let received = listening.sink.received();
    assert!(!received.headers.is_empty() && received.headers.iter().all(|headers| headers.contains("authorization")));
    let told = Received { headers: Vec::new(), ..received };
    assert!(!told.everything().contains("hunter2") && !stdout.contains("hunter2") && !stderr.contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_fatal_error_too_the_last_words_arrive() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters drop column value").await;
    let listening = Sink::http().await;
    let mut command = exporting(&lab, &["run"]);
    command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url());
    let (code, _, stderr) = output(&mut command).await;
    assert_eq!(code, 78, "{stderr}");
    let received = listening.sink.received();
    let listened = received.logs.iter().any(|log| attribute(&log.attributes, "event").as_deref() == Some("listening"));
    assert!(listened, "{:?}", received.logs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_or_silent_costs_telemetry_and_nothing_else() {
    let lab = Lab::new().await;
    let (nobody, silent) = (crate::harness::free_port(), black_hole().await);
    for (port, protocol) in [(nobody, "http/protobuf"), (nobody, "grpc"), (silent, "http/protobuf"), (silent, "grpc")] {
        let mut command = exporting(&lab, &["run"]);
        command.env("TIDEGATE__TELEMETRY__ENDPOINT", format!("http://127.0.0.1:{port}"));
        command.env("TIDEGATE__TELEMETRY__PROTOCOL", protocol).env("TIDEGATE__LOG__LEVEL", "info");
        let mut daemon = Daemon::start(command);
        daemon.wait_for_event("running", |_| true).await;
        let before = lab.value("a").await.unwrap_or(0);
        lab.client().await.add_many("a", 1_000).await;
        lab.await_value("a", before + 1_000).await;
        daemon.signal(Signal::TERM);
        let asked = Instant::now();
        assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
        assert!(asked.elapsed() < Duration::from_secs(12), "{protocol}: the end waited for the collector");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_be_exported_by_is_refused_with_the_next_step() {
    let lab = Lab::new().await;
    for (name, value, told) in [
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "http/json",
            "OTEL_EXPORTER_OTLP_PROTOCOL is \"http/json\"; write http/protobuf or grpc",
        ),
        (
            "TIDEGATE__TELEMETRY__ENDPOINT",
            "http://u:hunter2@collector",
            "write http://host:port, and credentials into telemetry.headers_file",
        ),
        (
            "TIDEGATE__TELEMETRY__HEADERS_FILE",
            "/nonexistent",
            "telemetry.headers_file is \"/nonexistent\", which cannot be read",
        ),
        ("TIDEGATE__TELEMETRY__CERTIFICATE_FILE", "/dev/null", "telemetry.certificate_file"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER is \"zipkin\"; write otlp or none"),
    ] {
        let mut command = lab.program(&["run"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1").env(name, value);
        let (code, _, stderr) = output(&mut command).await;
        assert_eq!(code, 78, "{name}: {stderr}");
        assert!(stderr.contains(told) && !stderr.contains("hunter2"), "{name}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_batches_few_are_traced_and_trimming_has_a_span() {
    let lab = Lab::new().await;
    let listening = Sink::http().await;
    let mut command = exporting(&lab, &["run"]);
    command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url()).env("TIDEGATE__TELEMETRY__TRACE_ONE_IN", "1000000");
    command.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__COMPACT__MARGIN", "1s");
    let mut daemon = Daemon::start(command);
    lab.client().await.add_many("a", 2_000).await;
    lab.await_value("a", 2_000).await;
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
    assert_eq!(listening.sink.received().spans.len(), 0);
    let mut command = exporting(&lab, &["run"]);
    command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url());
    command.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__COMPACT__MARGIN", "1s");
    let _daemon = Daemon::start(command);
    lab.client().await.add_many("a", 10).await;
    eventually("a span of a trim", true, async || {
        let received = listening.sink.received();
        received.spans("trim").iter().any(|span| attribute(&span.attributes, "tidegate.entries.trimmed").is_some())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_about_a_sampled_batch_name_its_trace_on_stderr_and_at_the_collector() {
    let lab = Lab::new().await;
    lab.client().await.call(&["XADD", "flush:counters", "*", "id", "a", "amount", "no number"]).await;
    for (format, one_in) in [("json", "1"), ("text", "1"), ("json", "1000000000")] {
        lab.execute("delete from tidegate.dead_letters; delete from tidegate.ledger").await;
        lab.client().await.call(&["XGROUP", "DESTROY", "flush:counters", "tidegate:counters"]).await;
        let listening = Sink::http().await;
        let mut command = exporting(&lab, &["run", "--until-empty"]);
        command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url()).env("TIDEGATE__LOG__FORMAT", format);
        command.env("TIDEGATE__TELEMETRY__TRACE_ONE_IN", one_in).env("TIDEGATE__COMPACT__EVERY", "1h");
        let mut daemon = Daemon::start(command);
        daemon.exit().await;
        let lines = daemon.all_lines();
        let line =
            lines.iter().find(|line| line.contains("entries were buried")).unwrap_or_else(|| panic!("{lines:?}"));
        let received = listening.sink.received();
        let log = received.logs.iter().find(|log| attribute(&log.attributes, "event").as_deref() == Some("buried"));
        let log = log.expect("sent");
        if one_in != "1" {
            assert!(!line.contains("trace_id") && log.trace_id.iter().all(|byte| *byte == 0), "{line} {log:?}");
            continue;
        }
        let settle = received.spans("settle");
        let trace = &settle.iter().find(|span| span.trace_id == log.trace_id).expect("the batch's trace").trace_id;
        let hex: String = trace.iter().map(|byte| format!("{byte:02x}")).collect();
        let named = if format == "json" { format!("\"trace_id\":\"{hex}\"") } else { format!(" trace_id={hex} ") };
        assert!(line.contains(&named), "{named} in {line}");
        let started =
            lines.iter().find(|line| line.contains("\"running\"") || line.contains("running")).expect("a line");
        assert!(!started.contains("trace_id"), "{started}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_are_taken_over_are_traced_as_reclaimed() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add_many("a", 10).await;
    client.call(&["XGROUP", "CREATE", "flush:counters", "tidegate:counters", "0"]).await;
    let read =
        ["XREADGROUP", "GROUP", "tidegate:counters", "somebody", "COUNT", "10", "STREAMS", "flush:counters", ">"];
    client.call(&read).await;
    let listening = Sink::http().await;
    let mut command = exporting(&lab, &["run"]);
    command.env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url());
    let _daemon = Daemon::start(command);
    lab.await_value("a", 10).await;
    eventually("a span of the takeover", true, async || !listening.sink.received().spans("reclaim").is_empty()).await;
}

/// What nobody may ever read.
const CANARY: &str = "c4n4ry-hunter2";

/// Verbs that print what they find, or what keeps them from it.
const TELLING: &[&[&str]] = &[
    &["run", "--until-empty", "--timeout", "2s"],
    &["check", "--print"],
    &["check", "--live"],
    &["config", "show", "--origin"],
    &["config", "show", "--output", "json"],
    &["migrate"],
    &["replay", "--since", "1h"],
    &["health"],
    &["status"],
    &["doctor"],
    &["doctor", "--output", "json"],
    &["audit"],
    &["dead", "list"],
    &["pending"],
    &["group", "list"],
    &["memory"],
    &["wait", "--timeout", "2s"],
    &["trim", "--dry-run"],
    &["pipeline", "new", "--table", "public.counters"],
    &["pipeline", "new", "--stream", "flush:counters"],
    &["pipeline", "test", "no/such/file.toml"],
];

#[tokio::test(flavor = "multi_thread")]
async fn a_password_appears_in_no_log_line_metric_trace_health_answer_or_error() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["ACL", "SETUSER", "tide", "on", &format!(">{CANARY}"), "~*", "+@all"]).await;
    lab.execute(&format!("drop role if exists canary; create role canary login superuser password '{CANARY}'")).await;
    let listening = Sink::http().await;
    let valkey = lab.valkey.url().replace("valkey://", &format!("valkey://tide:{CANARY}@"));
    let database = lab.database.split_once('@').map_or(lab.database.clone(), |(_, rest)| format!("postgres://{rest}"));
    let database = database.replace("postgres://", &format!("postgres://canary:{CANARY}@"));
    let headers = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(headers.path(), format!("authorization=Bearer {CANARY}\n")).expect("written");
    let program = |arguments: &[&str]| {
        let mut command = exporting(&lab, arguments);
        command.env("VALKEY_URL", &valkey).env("DATABASE_URL", &database).env("TIDEGATE__LOG__LEVEL", "trace");
        command
            .env("TIDEGATE__TELEMETRY__ENDPOINT", listening.url())
            .env("TIDEGATE__TELEMETRY__HEADERS_FILE", headers.path());
        command
    };
    let mut daemon = Daemon::start(program(&["run"]));
    let admin = Admin::of(&mut daemon).await;
    client.add_many("a", 100).await;
    client.add("bad\n\u{1b}[31mname", 1).await;
    lab.await_value("a", 100).await;
    let mut told = Vec::new();
    for arguments in TELLING {
        let (_, stdout, stderr) = output(&mut program(arguments)).await;
        told.extend([stdout, stderr]);
    }
    // Faults of both servers, while they last.
    lab.execute("alter table public.counters rename to away").await;
    client.add("a", 1).await;
    daemon.wait_for_event("halted", |_| true).await;
    client.call(&["ACL", "SETUSER", "tide", ">another", &format!("<{CANARY}")]).await;
    client.call(&["CLIENT", "KILL", "USER", "tide"]).await;
    daemon.wait_for("reading is halted").await;
    lab.execute("alter role canary password 'another'").await;
    for path in ["/metrics", "/live", "/ready", "/startup"] {
        told.push(admin.ask(path, "127.0.0.1").await.expect("an answer").1);
    }
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("reload_refused", |_| true).await;
    daemon.signal(Signal::TERM);
    daemon.signal(Signal::TERM);
    daemon.exit().await;
    told.extend(daemon.all_lines());
    for arguments in TELLING {
        let (_, stdout, stderr) = output(&mut program(arguments)).await;
        told.extend([stdout, stderr]);
    }
    let received = listening.sink.received();
    assert!(!received.logs.is_empty() && !received.metrics.is_empty() && !received.spans.is_empty());
    told.push(Received { headers: Vec::new(), ..received }.everything());
    for text in told {
        assert!(!text.contains(CANARY) && !text.contains("hunter2"), "{text}");
    }
}
