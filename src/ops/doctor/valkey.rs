//! Valkey: what the doctor asks of it, and of the streams.
//!
//! Takes a link and what was seen; puts findings. What may not be asked is a finding of its own and no failure.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use super::{Findings, Severity};
use crate::care::session::Session;
use crate::care::trim;
use crate::client::OP_FIELD;
use crate::config::Config;
use crate::flow::rows::Plan;
use crate::flow::{judge, ledger, strangers};
use crate::lanes::{self, Identity};
use crate::model::entry::{Canonical, EntryId, write_canonical};
use crate::model::pipeline::Pipeline;
use crate::ops::columns::{bytes, lasting_ms, plural};
use crate::ops::observe::valkey::Stream;
use crate::ops::observe::{Look, Seen, Servers};
use crate::retry::Fault;
use crate::valkey::{Command, Connection, info, unexpected};

/// The oldest version that is tested.
const TESTED_FROM: &str = "8.0";
/// How far clocks may differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(2);
/// How many of a stream's last entries are looked at.
const SAMPLE: usize = 100;
/// How many of the entries before the group's position are compared with the ledger.
const COMPARED: usize = 2_000;
/// An idle time-out of a server below this is met by connections that are kept busy every 3 s at the least.
const SHORTEST_IDLE: u64 = 10;
/// Where a user is not allowed to read settings.
const MAY_NOT_ASK: &str = "run the doctor as a user with the right config|get (docs/permissions.md)";
/// How full the memory may be.
const FULL: f64 = 0.85;
/// How old an unsettled entry may be.
const MAX_AGE: Duration = Duration::from_secs(60);

pub(super) async fn examine(
    config: &Config,
    pipelines: &[&Pipeline],
    servers: &mut Servers,
    look: &Look,
    findings: &mut Findings,
) {
    let first = pipelines.first().map(|pipeline| pipeline.stream.clone()).unwrap_or_default();
    let link = match servers.link(&first).await {
        Ok(link) => link,
        Err(fault) => return findings.unknown("D1", &fault),
    };
    every_primary(servers, findings).await;
    encryption(config, findings);
    if let Err(fault) = clock(link.commands(), servers, findings).await {
        findings.unknown("D16", &fault);
    }
    for (pipeline, seen) in &look.pipelines {
        for seen in seen {
            if let Ok(stream) = &seen.stream {
                of_stream(config, pipeline, seen, stream, findings);
                if let Err(fault) = group(config, servers, pipeline, seen, stream, findings).await {
                    findings.unknown("D7", &fault);
                }
                if let Err(fault) = producers(servers, pipeline, seen, stream, findings).await {
                    findings.unknown("D13", &fault);
                }
            }
        }
    }
}

/// Asks every primary, as the daemon does at its start.
async fn every_primary(servers: &mut Servers, findings: &mut Findings) {
    let homes = match servers.valkey.homes().await {
        Ok(homes) => homes,
        Err(fault) => return findings.unknown("D1", &fault),
    };
    for home in &homes {
        findings.at = (homes.len() > 1).then(|| home.to_string());
        let asked = match servers.link_at(home).await {
            Ok(link) => server(link.commands(), findings).await,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = asked {
            findings.unknown("D1", &fault);
        }
    }
    findings.at = None;
}

/// What INFO and CONFIG tell.
async fn server(connection: &Connection, findings: &mut Findings) -> Result<(), Fault> {
    let reply = connection.call(Command::new("INFO").arg("everything")).await?;
    let text = reply.as_text().ok_or_else(|| unexpected("INFO"))?;
    let info: HashMap<&str, &str> = text.lines().filter_map(|line| line.trim().split_once(':')).collect();
    let field = |name: &str| info.get(name).copied().unwrap_or_default();
    let number = |name: &str| field(name).parse::<u64>().unwrap_or(0);

    let policy = field("maxmemory_policy");
    if info::evicts_any_key(policy) {
        findings.of_server(
            "D1",
            Severity::Error,
            format!("maxmemory-policy is {policy}: Valkey may evict the stream"),
            "CONFIG SET maxmemory-policy noeviction, and the same in valkey.conf",
        );
    } else {
        findings.well("D1", format!("maxmemory-policy is {policy}"));
    }
    persistence(connection, field("aof_enabled") == "1", findings).await;
    replication(connection, number("connected_slaves"), findings).await;
    let user = connection.call(Command::new("ACL").arg("WHOAMI")).await.ok();
    match user.as_ref().and_then(|reply| reply.as_text()) {
        Some("default") => findings.of_server(
            "D4",
            Severity::Warning,
            "this configuration connects as the user default, who may do everything",
            "create users with the lines of docs/permissions.md, name one in valkey.url, and switch the default user off",
        ),
        Some(user) => findings.well("D4", format!("the user is {user}")),
        // Who may not ask has not all rights.
        None => findings.well("D4", "the user may not ask who it is: it has not all rights"),
    }
    let version = if field("valkey_version").is_empty() { field("redis_version") } else { field("valkey_version") };
    if is_older(version, TESTED_FROM) || field("valkey_version").is_empty() {
        let what = if field("valkey_version").is_empty() { "this is Redis" } else { "this is Valkey" };
        let fix = format!("use Valkey {TESTED_FROM} or newer");
        findings.of_server("D6", Severity::Warning, format!("{what} {version}"), fix);
    } else {
        findings.well("D6", format!("Valkey {version}"));
    }
    match connection.call(Command::new("CONFIG").arg("GET").arg("timeout")).await.map(setting) {
        Ok(Some(seconds)) if seconds.parse().is_ok_and(|seconds: u64| (1..SHORTEST_IDLE).contains(&seconds)) => {
            findings.of_server(
                "D11",
                Severity::Warning,
                format!("Valkey closes connections that are idle for {seconds} s"),
                "CONFIG SET timeout 0, or 60",
            )
        }
        Ok(_) => findings.well("D11", "Valkey's idle time-out is long enough"),
        Err(Fault::Valkey { .. }) => {
            findings.of_server("D11", Severity::Info, "this user may not ask for Valkey's time-out", MAY_NOT_ASK);
        }
        Err(fault) => findings.unknown("D11", &fault),
    }
    if number("cluster_enabled") == 1 {
        findings.well("D12", "this is a cluster: streams of several shards have hash tags");
    }
    let (used, most) = (number("used_memory"), number("maxmemory"));
    if most > 0 && used as f64 > most as f64 * FULL {
        findings.of_server(
            "D25",
            Severity::Warning,
            format!("{} of {} are used", bytes(used), bytes(most)),
            "raise maxmemory, or lower trim.retention",
        );
    } else {
        let of = if most == 0 { "no limit".into() } else { bytes(most) };
        findings.well("D25", format!("{} of {of} are used", bytes(used)));
    }
    Ok(())
}

async fn persistence(connection: &Connection, is_on: bool, findings: &mut Findings) {
    let fsync = connection.call(Command::new("CONFIG").arg("GET").arg("appendfsync")).await.ok().and_then(setting);
    match (is_on, fsync.as_deref()) {
        (false, _) => findings.of_server(
            "D2",
            Severity::Warning,
            "appendonly is no: a restart loses what was added since the last snapshot",
            "CONFIG SET appendonly yes, and the same in valkey.conf",
        ),
        (true, Some("no")) => findings.of_server(
            "D2",
            Severity::Warning,
            "appendfsync is no: a crash of the machine loses what the operating system had not written, often 30 s",
            "CONFIG SET appendfsync everysec",
        ),
        (true, Some(fsync)) => findings.well("D2", format!("appendonly yes, appendfsync {fsync}")),
        (true, None) => {
            findings.of_server(
                "D2",
                Severity::Info,
                "appendonly yes; this user may not ask for appendfsync",
                MAY_NOT_ASK,
            );
        }
    }
}

async fn replication(connection: &Connection, replicas: u64, findings: &mut Findings) {
    if replicas == 0 {
        return findings.well("D3", "there are no replicas");
    }
    let told = connection.call(Command::new("CONFIG").arg("GET").arg("min-replicas-to-write")).await;
    match told.map(setting) {
        Ok(Some(least)) if least == "0" => findings.of_server(
            "D3",
            Severity::Warning,
            format!("{} connected, and min-replicas-to-write is 0", plural(replicas, "replica is", "replicas are")),
            "CONFIG SET min-replicas-to-write 1 and min-replicas-max-lag 10",
        ),
        Ok(_) => findings.well("D3", format!("{} and a write needs some", plural(replicas, "replica", "replicas"))),
        Err(fault) => findings.unknown("D3", &fault),
    }
}

/// The value in a reply to CONFIG GET of one name.
fn setting(reply: crate::valkey::Reply) -> Option<String> {
    let mut pairs = reply.into_map()?;
    pairs.next().and_then(|(_, value)| value.as_text().map(str::to_owned))
}

fn is_older(version: &str, than: &str) -> bool {
    let numbers = |text: &str| text.split('.').map(|part| part.parse().unwrap_or(0)).collect::<Vec<u32>>();
    numbers(version) < numbers(than)
}

fn encryption(config: &Config, findings: &mut Findings) {
    use secrecy::ExposeSecret;
    let host =
        |url: &str| url::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default();
    let is_near =
        |host: &str| matches!(host, "" | "localhost" | "127.0.0.1" | "[::1]" | "::1") || host.starts_with('/');
    let mut open = Vec::new();
    if let Some(url) = config.valkey.url.as_ref().map(|url| url.expose_secret()) {
        let is_encrypted = url.starts_with("valkeys") || url.starts_with("rediss");
        if !is_encrypted && !is_near(&host(url)) {
            open.push(("valkey.url", "write valkeys:// in valkey.url"));
        }
    }
    if let Some(url) = config.postgres.url.as_ref().map(|url| url.expose_secret()) {
        let is_encrypted =
            ["sslmode=require", "sslmode=verify-ca", "sslmode=verify-full"].iter().any(|mode| url.contains(mode));
        if !is_encrypted && !is_near(&host(url)) {
            open.push(("postgres.url", "add sslmode=verify-full to postgres.url"));
        }
    }
    for (key, fix) in &open {
        findings.of_server(
            "D5",
            Severity::Warning,
            format!("{key} leads to another machine without encryption being required"),
            *fix,
        );
    }
    if open.is_empty() {
        findings.well("D5", "connections to other machines are encrypted, or there are none");
    }
}

async fn clock(connection: &Connection, servers: &Servers, findings: &mut Findings) -> Result<(), Fault> {
    let here = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as i128;
    let valkey = i128::from(info::time_ms(connection).await?) - here();
    let query = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
    let postgres: Option<i64> = servers.database.run(async |c| sqlx::query_scalar(query).fetch_one(c).await).await.ok();
    let postgres = postgres.map(|postgres| i128::from(postgres) - here());
    let far = |difference: i128| difference.unsigned_abs() > CLOCKS_DIFFER.as_millis();
    let between = postgres.map(|postgres| postgres - valkey).unwrap_or(0);
    if far(valkey) || far(between) {
        let postgres = postgres.map(|ms| format!(", PostgreSQL's by {ms} ms")).unwrap_or_default();
        let evidence = format!("Valkey's clock differs from this machine's by {valkey} ms{postgres}");
        findings.of_server(
            "D16",
            Severity::Warning,
            evidence,
            "run a time service (chrony, systemd-timesyncd) on all three",
        );
    } else {
        findings.well("D16", "the clocks agree within 2 s");
    }
    Ok(())
}

fn of_stream(config: &Config, pipeline: &Pipeline, seen: &Seen, stream: &Stream, findings: &mut Findings) {
    let name = &seen.shard.stream;
    let dead: Vec<_> = stream.consumers.iter().filter(|consumer| !consumer.alive && consumer.entries > 0).collect();
    if !dead.is_empty() {
        let entries: u64 = dead.iter().map(|consumer| consumer.entries).sum();
        let evidence = format!(
            "{} of {name} held by {} whose connection has gone",
            plural(entries, "entry", "entries"),
            plural(dead.len() as u64, "consumer", "consumers")
        );
        findings.of(
            pipeline,
            "D8",
            Severity::Warning,
            evidence,
            "keep a daemon running: it takes them over; see `tidegate pending`",
        );
    }
    let age = Duration::from_millis(stream.age_ms());
    if stream.backlog() > 0 && age > MAX_AGE {
        let evidence = format!("the oldest unsettled entry of {name} was added {} ago", lasting_ms(stream.age_ms()));
        findings.of(pipeline, "D9", Severity::Warning, evidence, "see `tidegate status` for why");
    }
    if stream.undelivered.exactly().is_none() {
        let evidence = format!("Valkey cannot tell how many entries of {name} the group has not read");
        findings.of(pipeline, "D10", Severity::Info, evidence, "nothing: Tidegate counts them itself");
    }
    let ours: Vec<String> = config.pipelines.iter().map(Pipeline::group).collect();
    let retention = config.trim.retention.as_millis() as u64;
    for group in stream.groups.iter().filter(|group| !ours.contains(&group.name)) {
        let behind =
            stream.now_ms.saturating_sub(group.last_delivered.ms.max(stream.first.map_or(0, |first| first.ms)));
        if behind > retention && group.last_delivered < stream.last_generated {
            let evidence = format!("group {} of {name} has read nothing for {}", group.name, lasting_ms(behind));
            let fix = format!("if nobody uses it any more: `tidegate group repair --group {}`", group.name);
            findings.of(pipeline, "D21", Severity::Warning, evidence, fix);
        }
    }
}

/// Whether what lies before the group's position is in the ledger: if not, somebody moved the group past it.
async fn group(
    config: &Config,
    servers: &mut Servers,
    pipeline: &Pipeline,
    seen: &Seen,
    stream: &Stream,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let name = &seen.shard.stream;
    let Some(group) = &stream.group else {
        if stream.length.is_some_and(|length| length > 0) {
            let evidence = format!("stream {name} has entries, and no group {}", pipeline.group());
            findings.of(
                pipeline,
                "D7",
                Severity::Warning,
                evidence,
                "start `tidegate run`: it creates the group at the stream's start",
            );
        }
        return Ok(());
    };
    let source = &config.valkey.source;
    let identity = Identity::of(source, &seen.shard);
    let lane = match servers.database.run(async |c| lanes::find(c, &identity).await).await {
        Ok(lane) => lane,
        // PostgreSQL's own checks say so.
        Err(_) => return Ok(()),
    };
    let last = group.oldest_pending.and_then(|id| id.number().checked_sub(1).map(EntryId::from_number));
    let last = last.unwrap_or(group.last_delivered).min(group.last_delivered);
    let mut session = Session::open(&servers.valkey, "tidegate:doctor").await?;
    let page = trim::page(&mut session, name, EntryId::MIN, last, COMPARED).await?;
    let (Some(first), Some(last)) = (page.entries().first(), page.entries().last()) else { return Ok(()) };
    let rows = match lane {
        Some(lane) => servers.database.run(async |c| ledger::rows_within(c, lane, first.id, last.id).await).await?,
        None => Vec::new(),
    };
    let found = judge::examine(&page, &rows);
    if let Some(&index) = found.new.first() {
        let from = page.entries()[index].id;
        let evidence = format!(
            "{} of {name} lie before the group's position and are not in the ledger, from {from} on (was the group created at $, or were entries acknowledged by hand?)",
            plural(found.new.len() as u64, "entry", "entries")
        );
        let fix = format!("tidegate replay --pipeline {} --since {from} --yes", pipeline.name);
        findings.of(pipeline, "D7", Severity::Error, evidence, fix);
    } else if !found.unjudgeable.is_empty() {
        let evidence = format!(
            "of {} in {name} the ledger no longer has the digests",
            plural(found.unjudgeable.len() as u64, "entry", "entries")
        );
        findings.of(pipeline, "D15", Severity::Warning, evidence, "raise compact.margin above trim.retention");
    } else {
        findings.well("D7", format!("{}: what lies before the group's position is in the ledger", pipeline.name));
    }
    Ok(())
}

/// Looks at the last entries of a stream.
async fn producers(
    servers: &mut Servers,
    pipeline: &Pipeline,
    seen: &Seen,
    stream: &Stream,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let name = &seen.shard.stream;
    if stream.length.unwrap_or(0) == 0 {
        return Ok(());
    }
    // A zone that is not known keeps the daemon from starting, which says so.
    let Ok(plan) = Plan::of(pipeline) else { return Ok(()) };
    let link = servers.link(name).await?;
    let (bounds, mut sampled, mut with_op, mut plain, mut bad) =
        (crate::valkey::resp::Bounds { entry: 64 << 10, kept: 1 << 10 }, 0u64, 0u64, 0u64, None);
    let (mut wire, _) = link.open_wire("tidegate:doctor", bounds).await?;
    wire.send(&Command::new("XREVRANGE").arg(name).arg("+").arg("-").arg("COUNT").arg(SAMPLE));
    let read = wire.run(Duration::ZERO, |delivered| {
        if let crate::valkey::Delivered::Whole(id, strings) = delivered {
            let mut bytes = Vec::new();
            write_canonical(&mut bytes, id, strings);
            let entry = Canonical(&bytes);
            sampled += 1;
            with_op += u64::from(entry.fields().any(|(name, _)| name == OP_FIELD.as_bytes()));
            plain += u64::from(pipeline.is_managed() && !strangers::is_marked(entry));
            if let Some(death) = plan.refusal_of(entry) {
                bad.get_or_insert((id, death.detail));
            }
        }
        std::ops::ControlFlow::Continue(())
    });
    read.await?;
    if let Some((id, why)) = &bad {
        let evidence = format!("entry {id} of {name} cannot be applied: {why}");
        findings.of(
            pipeline,
            "D13",
            Severity::Warning,
            evidence,
            "correct the producer, or the fields that the pipeline names",
        );
    }
    if plain > 0 {
        let evidence = format!(
            "{plain} of the last {sampled} entries of {name} came from plain producers, whose INCRBY may begin at zero again"
        );
        let fix = "have all producers of a managed pipeline call the functions (docs/functions.md)";
        findings.of(pipeline, "D13", Severity::Warning, evidence, fix);
    }
    if with_op < sampled {
        let evidence =
            format!("{} of the last {sampled} entries of {name} have no field {OP_FIELD}", sampled - with_op);
        let fix = format!("have producers add a field {OP_FIELD}, unique for each increment");
        findings.of(pipeline, "D13", Severity::Info, evidence, fix);
    } else if bad.is_none() && plain == 0 {
        findings
            .well("D13", format!("the last {sampled} entries of {name} can be applied and have a field {OP_FIELD}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(is_older("7.2.4", "8.0") && is_older("8.0", "8.0.1"));
        assert!(!is_older("8.0.1", "8.0") && !is_older("10.0.0", "8.0") && !is_older("9.1.0", "8.0"));
    }
}
