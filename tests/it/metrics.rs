//! Metrics as Prometheus scrapes them: every one that the contract declares, with right numbers and bounded labels.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use tidegate::telemetry::contract::{METRICS, SECONDS, Source};

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, Resp, STREAM, eventually};
use crate::proxy::Proxy;

/// The name of a series' metric: without what a histogram's series add.
fn metric_of(series: &str) -> &str {
    let histogram = |suffix| {
        let name = series.strip_suffix(suffix)?;
        let is_one = |metric: &&tidegate::telemetry::contract::Metric| {
            metric.kind() == "histogram" && metric.prometheus_name() == name
        };
        METRICS.iter().any(|metric| is_one(&metric)).then_some(name)
    };
    ["_bucket", "_sum", "_count"].into_iter().find_map(histogram).unwrap_or(series)
}

/// A daemon of whose metrics none is without a value: it manages counters, reads alone, takes turns, meets a fault and buries; and what its
/// Valkey may evict is accepted for an hour.
pub(crate) async fn busy(lab: &Lab) -> (Daemon, Admin) {
    lab.client().await.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    lab.execute("alter table public.counters add constraint small check (value < 1000)").await;
    let mut program = lab.exclusive(&["run"]);
    // Nobody takes it over, however long this one is held up: what comes again would be counted again.
    program.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed").env("TIDEGATE__EXCLUSIVE__LEASE", "30s");
    let until = (Timestamp::now() + Duration::from_secs(3_600)).to_string();
    for (key, value) in [("FINDING", "D1"), ("UNTIL", &*until), ("REASON", "a test")] {
        program.env(format!("TIDEGATE__DOCTOR__ACCEPT__1__{key}"), value);
    }
    let mut daemon = Daemon::start(program);
    let admin = Admin::of(&mut daemon).await;
    // Before there are values of plain producers, on which an operator would be asked.
    let gate = async || admin.scrape().await.text.contains("tidegate_managed_gate{pipeline=\"counters\"} 1");
    eventually("the shard is managed", true, gate).await;
    let mut client = lab.client().await;
    // So that there is a runway.
    client.call(&["CONFIG", "SET", "maxmemory", "1gb"]).await;
    // In one step, so that one flush has all of their rows and takes its turn.
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let adds = (0..300).flat_map(|n| {
        let key = format!("key-{n}");
        [words(&["INCRBY", &format!("counter:{key}"), "1"]), words(&["XADD", STREAM, "*", "id", &key, "amount", "1"])]
    });
    let step: Vec<Vec<String>> = [words(&["MULTI"])].into_iter().chain(adds).chain([words(&["EXEC"])]).collect();
    client.pipeline(&step).await;
    client.add("refused", 5_000).await;
    client.add_many("hot", 500).await;
    lab.await_value("hot", 500).await;
    lab.await_value("key-299", 1).await;
    (daemon, admin)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_the_contract_is_scraped_with_its_type_and_no_label_but_its_own() {
    let lab = Lab::new().await;
    let (_daemon, admin) = busy(&lab).await;
    let declared: BTreeSet<String> = METRICS.iter().map(|metric| metric.prometheus_name()).collect();
    let names = |scrape: &crate::admin::Scrape| -> BTreeSet<String> {
        scrape.samples.iter().map(|sample| metric_of(&sample.name).to_owned()).collect()
    };
    // The ledger's size, the backlog and the memory are asked for at intervals; the runway is that of what is added between two looks.
    let mut client = lab.client().await;
    eventually("metrics that are declared and not scraped", BTreeSet::new(), async || {
        client.add("hot", 1).await;
        let scraped = names(&admin.scrape().await);
        declared.difference(&scraped).cloned().collect::<BTreeSet<_>>()
    })
    .await;
    let scrape = admin.scrape().await;
    let own: BTreeSet<String> = ["target_info".to_owned()].into();
    let undeclared: Vec<String> =
        names(&scrape).into_iter().filter(|name| !declared.contains(name) && !own.contains(name)).collect();
    assert_eq!(undeclared, Vec::<String>::new());
    for metric in METRICS {
        let name = metric.prometheus_name();
        assert!(scrape.text.contains(&format!("# TYPE {name} {}\n", metric.kind())), "{name}: {}", scrape.text);
        assert!(scrape.text.contains(&format!("# HELP {name} ")), "{name}");
        for sample in scrape.samples.iter().filter(|sample| metric_of(&sample.name) == name) {
            let labels: Vec<&str> = sample.labels.keys().map(String::as_str).filter(|label| *label != "le").collect();
            assert!(labels.iter().all(|label| metric.labels.contains(label)), "{sample:?}");
            let needed = metric.labels.iter().all(|label| labels.contains(label));
            assert!(needed, "{sample:?} lacks one of {:?}", metric.labels);
        }
        if let Source::Histogram(bounds) = metric.source {
            let told: BTreeSet<String> = scrape
                .samples
                .iter()
                .filter(|sample| sample.name == format!("{name}_bucket"))
                .map(|sample| sample.labels["le"].clone())
                .collect();
            let expected: BTreeSet<String> = bounds.iter().map(f64::to_string).chain(["+Inf".into()]).collect();
            assert_eq!(told, expected, "{name}");
        }
    }
    assert_eq!((SECONDS.first(), SECONDS.last()), (Some(&0.0005), Some(&60.0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_scraped_is_what_happened() {
    let lab = Lab::new().await;
    let (_daemon, admin) = busy(&lab).await;
    let of = [("pipeline", "counters")];
    let settled = |outcome| [("pipeline", "counters"), ("outcome", outcome)];
    eventually("dead letters, as PostgreSQL tells them", Some(1.0), async || {
        admin.scrape().await.sum("tidegate_dead_letters_open", &of)
    })
    .await;
    eventually("the backlog", Some(0.0), async || admin.scrape().await.sum("tidegate_backlog_entries", &of)).await;
    let scrape = admin.scrape().await;
    let is = |name: &str, labels: &[(&str, &str)]| scrape.sum(name, labels);
    assert_eq!(is("tidegate_entries_settled_total", &settled("applied")), Some(800.0));
    assert_eq!(is("tidegate_entries_settled_total", &settled("buried")), Some(1.0));
    assert_eq!(is("tidegate_entries_settled_total", &of), Some(801.0));
    assert_eq!(is("tidegate_managed_strangers_total", &of), Some(801.0), "all of them came from a plain producer");
    let flushes = is("tidegate_flushes_total", &of).expect("flushes");
    assert_eq!(is("tidegate_flush_duration_seconds_count", &settled("committed")), Some(flushes));
    assert_eq!(is("tidegate_batch_entries_count", &of), Some(flushes));
    assert_eq!(is("tidegate_batch_entries_sum", &of), Some(801.0));
    assert_eq!(is("tidegate_entry_age_seconds_count", &of), Some(flushes));
    assert!(is("tidegate_flush_duration_seconds_sum", &settled("committed")).is_some_and(|seconds| seconds > 0.0));
    assert!(
        is("tidegate_faults_total", &[("side", "flushing"), ("code", "23514")]).is_some_and(|faults| faults >= 1.0)
    );
    assert_eq!(is("tidegate_halted", &of), Some(0.0));
    assert_eq!(is("tidegate_degraded", &of), Some(0.0));
    assert_eq!(is("tidegate_leases_held", &of), Some(1.0));
    assert_eq!(is("tidegate_pipeline_info", &[("table", "public.counters"), ("delivery", "exclusive")]), Some(1.0));
    assert_eq!(is("tidegate_shards", &[]), Some(1.0));
    assert!(is("tidegate_postgres_connections", &[]).is_some_and(|connections| (1.0..=8.0).contains(&connections)));
    let rows = lab.number("select count(*) from tidegate.ledger").await as f64;
    assert!(is("tidegate_ledger_rows", &of).is_some_and(|told| told > 0.0 && told <= rows.max(told)), "{rows}");
    assert!(is("tidegate_ledger_size_bytes", &[]).is_some_and(|bytes| bytes >= 8192.0));
    assert!(is("tidegate_at_risk_seconds", &of).is_some_and(|seconds| seconds < 30.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_shows_in_backlog_age_and_degraded() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut daemon = lab.daemon_through(None, Some(proxy.port()));
    let admin = Admin::of(&mut daemon).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    proxy.cut();
    client.add_many("a", 10).await;
    let of = [("pipeline", "counters")];
    eventually("the state in an outage", (Some(10.0), Some(1.0), true, true), async || {
        let scrape = admin.scrape().await;
        let above_two = |name| scrape.sum(name, &of).is_some_and(|seconds| seconds > 2.0);
        (
            scrape.sum("tidegate_backlog_entries", &of),
            scrape.sum("tidegate_degraded", &of),
            above_two("tidegate_oldest_unsettled_age_seconds"),
            above_two("tidegate_at_risk_seconds"),
        )
    })
    .await;
    let scrape = admin.scrape().await;
    assert!(scrape.sum("tidegate_faults_total", &[("code", "postgres_lost")]).is_some_and(|faults| faults >= 1.0));
    assert!(scrape.sum("tidegate_flush_duration_seconds_count", &[("outcome", "failed")]).is_some());
    proxy.heal();
    lab.await_value("a", 11).await;
    eventually("the state afterwards", (Some(0.0), Some(0.0), Some(0.0)), async || {
        let scrape = admin.scrape().await;
        let is = |name| scrape.sum(name, &of);
        (is("tidegate_backlog_entries"), is("tidegate_degraded"), is("tidegate_oldest_unsettled_age_seconds"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backlog_is_right_where_valkey_cannot_tell_the_lag() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.postgres_port()).await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__BATCH__MAX_ENTRIES", "10").env("TIDEGATE__BATCH__READ_COUNT", "10");
    let mut daemon = lab.start_through(command, None, Some(proxy.port()));
    let admin = Admin::of(&mut daemon).await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    // What it holds from now on cannot be flushed, and the rest is not read.
    proxy.cut();
    let ids = {
        let mut ids = Vec::new();
        for _ in 0..700 {
            ids.push(client.add("a", 1).await);
        }
        ids
    };
    // With a tombstone behind the group's position the server cannot tell.
    client.call(&["XDEL", STREAM, &ids[650]]).await;
    assert_eq!(lab.group("lag").await, Resp::Nil, "the server tells it all the same");
    let backlog = async || admin.scrape().await.sum("tidegate_backlog_entries", &[]);
    eventually("the backlog", Some(699.0), backlog).await;
    proxy.heal();
    lab.await_value("a", 700).await;
    eventually("the backlog afterwards", Some(0.0), backlog).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_labels_only_where_that_is_asked_for() {
    let lab = Lab::new().await;
    for (per_stream, expected) in [("false", 1), ("true", 3)] {
        let mut command = lab.program(&["run"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", "3").env("TIDEGATE__TELEMETRY__PER_STREAM", per_stream);
        let mut daemon = Daemon::start(command);
        let admin = Admin::of(&mut daemon).await;
        eventually("series of the backlog", expected, async || {
            let scrape = admin.scrape().await;
            scrape.samples.iter().filter(|sample| sample.name == "tidegate_backlog_entries").count()
        })
        .await;
        let scrape = admin.scrape().await;
        let with_stream = scrape.samples.iter().filter(|sample| sample.labels.contains_key("stream")).count();
        assert_eq!(with_stream > 0, per_stream == "true");
        assert_eq!(scrape.sum("tidegate_shards", &[]), Some(3.0));
        daemon.kill().await;
    }
}
