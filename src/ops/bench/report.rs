//! What was measured, for people and for programs.

use serde_json::{Value, json};

use super::load::Load;
use super::{Drain, Measured, Opts};
use crate::ops::stage::{Stage, Trouble, say};
use crate::valkey::{Command, Connection};

/// Tells it, in a table or as JSON.
pub(super) async fn tell(opts: &Opts, stage: &Stage, load: &Load, measured: &Measured) -> Result<(), Trouble> {
    let report = report(opts, stage, load, measured).await?;
    if opts.json {
        say(&report.to_string());
        return Ok(());
    }
    let (seed, versions) = (&report["load"]["seed"], &report["versions"]);
    say(&format!(
        "{} keys in {} stream(s), {}; delivery {}, {} process(es) with {} worker(s), batches of {}; seed {seed}",
        opts.keys,
        opts.shards,
        report["load"]["distribution"].as_str().unwrap_or_default(),
        stage.pipeline.delivery.word(),
        opts.processes(),
        stage.config.run.workers,
        stage.config.batch.max_entries
    ));
    say(&format!(
        "tidegate {}, Valkey {}, PostgreSQL {}, {} cores here",
        text(&versions["tidegate"]),
        text(&versions["valkey"]),
        text(&versions["postgres"]),
        report["cores"]
    ));
    let line = |name: &str, figure: &Value, unit: &str| {
        let figure = match figure {
            Value::Null => "unknown".into(),
            Value::Number(n) if n.as_f64().is_some_and(|n| n >= 1_000.0) => {
                indicatif::HumanCount(n.as_f64().unwrap_or(0.0) as u64).to_string()
            }
            Value::Number(n) => format!("{:.2}", n.as_f64().unwrap_or(0.0)),
            other => other.to_string(),
        };
        say(&format!("  {name:<34}{figure:>14} {unit}"));
    };
    if let Some(drain) = report.get("drain").filter(|drain| !drain.is_null()) {
        say(&format!("\ndrain of {} entries, median of {} runs", indicatif::HumanCount(opts.entries), opts.runs));
        line("entries", &drain["entries_per_second"], "/s");
        line("  slowest run", &drain["slowest_entries_per_second"], "/s");
        line("  fastest run", &drain["fastest_entries_per_second"], "/s");
        line("rows written", &drain["rows_per_second"], "/s");
        line("worker's CPU for a million entries", &drain["cpu_seconds_per_million"], "s");
        line("Valkey's CPU for an entry", &drain["valkey_us_per_entry"], "us");
        line("worker's peak memory", &drain["peak_memory_mib"], "MiB a process");
        line("an entry's size in Valkey", &drain["bytes_per_entry"], "bytes");
        line("updates that touched no index (HOT)", &drain["hot_percent"], "%");
        line("the table, afterwards", &drain["table_mib"], "MiB");
    }
    if let Some(steady) = report.get("steady").filter(|steady| !steady.is_null()) {
        say(&format!(
            "\nsteady {} entries/s for {} s, from XADD to visible in PostgreSQL (seen by a poll every ms)",
            opts.rate, opts.seconds
        ));
        for percentile in ["p50", "p95", "p99", "p99.9", "max"] {
            line(percentile, &steady["latency_ms"][percentile], "ms");
        }
        line("workers' CPU", &steady["cpu_percent"], "% of a core");
    }
    if let Some(recovery) = report.get("recovery").filter(|recovery| !recovery.is_null()) {
        say(&format!(
            "\nrecovery at {} entries/s: a worker process is killed (SIGKILL) {} times; from the kill until everything added before is settled",
            opts.rate, opts.rounds
        ));
        for figure in ["median", "p95", "max"] {
            line(figure, &recovery["seconds"][figure], "s");
        }
        line("entries that killed processes held", &recovery["entries_held"], "");
    }
    say(if measured.exact { "\nevery row is exact" } else { "\nROWS DIFFER from what was added" });
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

async fn report(opts: &Opts, stage: &Stage, load: &Load, measured: &Measured) -> Result<Value, Trouble> {
    let Measured { drains, steady, recovery, .. } = measured;
    let entries = opts.entries as f64;
    let of = |figure: &dyn Fn(&Drain) -> Option<f64>| {
        let mut figures: Vec<f64> = drains.iter().filter_map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures
    };
    let median = |figure: &dyn Fn(&Drain) -> Option<f64>| of(figure).get(drains.len() / 2).copied();
    let rate = |drain: &Drain| Some(entries / drain.seconds);
    let drain = (!drains.is_empty()).then(|| {
        json!({
            "entries": opts.entries,
            "runs": opts.runs,
            "entries_per_second": median(&rate),
            "slowest_entries_per_second": of(&rate).first(),
            "fastest_entries_per_second": of(&rate).last(),
            "rows_per_second": median(&|drain| Some(drain.rows as f64 / drain.seconds)),
            "cpu_seconds_per_million": median(&|drain| Some(drain.cpu_seconds? / entries * 1e6)),
            "valkey_us_per_entry": median(&|drain| Some(drain.valkey_seconds? / entries * 1e6)),
            "peak_memory_mib": median(&|drain| Some(drain.peak_memory_bytes? as f64 / f64::from(1 << 20))),
            "bytes_per_entry": median(&|drain| Some(drain.bytes_per_entry)),
            "hot_percent": median(&|drain| (drain.table.updates > 0).then(|| drain.table.hot as f64 / drain.table.updates as f64 * 100.0)),
            "table_mib": median(&|drain| Some(drain.table.bytes as f64 / f64::from(1 << 20))),
        })
    });
    let steady = steady.as_ref().map(|steady| {
        let at = |percentile| steady.latency.value_at_quantile(percentile) as f64 / 1_000.0;
        json!({
            "rate": opts.rate,
            "seconds": opts.seconds,
            "latency_ms": {
                "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "p99.9": at(0.999),
                "max": steady.latency.max() as f64 / 1_000.0,
            },
            "cpu_percent": steady.cpu_share.map(|share| share * 100.0),
        })
    });
    let recovery = recovery.as_ref().map(|recovery| {
        let at = |percentile| recovery.times.value_at_quantile(percentile) as f64 / 1_000_000.0;
        json!({
            "rounds": recovery.times.len(),
            "rate": opts.rate,
            "entries_held": recovery.held,
            "seconds": { "median": at(0.5), "p95": at(0.95), "max": recovery.times.max() as f64 / 1_000_000.0 },
        })
    });
    let info = Connection::open(&stage.valkey, "tidegate:bench").await?;
    let info = info.call(Command::new("INFO").arg("server")).await?;
    let version =
        |name: &str| info.as_text()?.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
    let postgres: String =
        stage.database.run(async |c| sqlx::query_scalar("show server_version").fetch_one(c).await).await?;
    Ok(json!({
        "load": {
            "keys": load.keys,
            "distribution": load.skew.map_or_else(|| "uniform".into(), |skew| format!("zipf {skew}")),
            "amounts": [load.amounts.start(), load.amounts.end()],
            "id_bytes": [load.id_bytes.start(), load.id_bytes.end()],
            "seed": load.seed,
        },
        "delivery": stage.pipeline.delivery.word(),
        "shards": opts.shards,
        "processes": opts.processes(),
        "workers": stage.config.run.workers,
        "batch_max_entries": stage.config.batch.max_entries,
        "drain": drain,
        "steady": steady,
        "recovery": recovery,
        "exact": measured.exact,
        "versions": {
            "tidegate": env!("CARGO_PKG_VERSION"),
            "valkey": version("valkey_version:").or_else(|| version("redis_version:")),
            "postgres": postgres.split(' ').next(),
        },
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
    }))
}
