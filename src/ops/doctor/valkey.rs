//! Valkey: what the doctor asks of each of its servers.
//!
//! Takes a link to each primary; puts findings. What may not be asked is a finding of its own and no failure.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use secrecy::ExposeSecret;

use super::{Findings, Severity};
use crate::config::Config;
use crate::model::pipeline::Pipeline;
use crate::ops::columns::{bytes, plural};
use crate::ops::observe::Servers;
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Reply, info, unexpected};

/// The oldest version of Valkey that is tested.
const VALKEY_FROM: &str = "8.0";
/// The oldest version of Redis that is tested.
const REDIS_FROM: &str = "7.0";
/// How far clocks may differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(2);
/// An idle time-out of a server below this is met by connections that are kept busy every 3 s at the least.
const SHORTEST_IDLE: u64 = 10;
/// Where a user is not allowed to read settings.
const MAY_NOT_ASK: &str = "run the doctor as a user with the right config|get (docs/permissions.md)";
/// How full the memory may be, and how many of the connections may be open.
const FULL: f64 = 0.85;

/// Asks every primary, as the daemon does at its start. Whether that could be done.
pub(super) async fn examine(
    config: &Config,
    pipelines: &[&Pipeline],
    servers: &mut Servers,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let uses_more = uses_more_than_the_main_job(config, pipelines, servers);
    let postgres = clock_of_postgres(servers).await;
    let homes = servers.valkey.homes().await?;
    for home in &homes {
        findings.at = (homes.len() > 1).then(|| home.to_string());
        let asked = match servers.link_at(home).await {
            Ok(link) => server(link.commands(), uses_more, findings).await.map(|()| link),
            Err(fault) => Err(fault),
        };
        match asked {
            Ok(link) => match clock_of_valkey(link.commands()).await {
                Ok(valkey) => clocks(valkey, postgres, findings),
                Err(fault) => findings.unknown("D16", &fault),
            },
            // What is left of one primary that is away says it all.
            Err(fault) if homes.len() == 1 => return Err(fault),
            Err(fault) => findings.unknown("D1", &fault),
        }
    }
    findings.at = None;
    Ok(())
}

/// Whether these pipelines need more of a server than what is tried with Redis (docs/redis.md).
fn uses_more_than_the_main_job(config: &Config, pipelines: &[&Pipeline], servers: &Servers) -> bool {
    let scheme = servers.valkey.url().expose_secret().split("://").next().unwrap_or_default();
    let is_one_server = !scheme.ends_with("-cluster") && !scheme.ends_with("-sentinel");
    !is_one_server || !config.cache.touched_every.is_zero() || pipelines.iter().any(|pipeline| pipeline.is_managed())
}

/// What INFO and CONFIG tell.
async fn server(connection: &Connection, uses_more: bool, findings: &mut Findings) -> Result<(), Fault> {
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
    // Told only where writes need replicas.
    replication(number("connected_slaves"), field("min_slaves_good_slaves").parse().ok(), findings);
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
    version(field("valkey_version"), field("redis_version"), uses_more, findings);
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
    memory(number("used_memory"), number("maxmemory"), policy, findings);
    let fix = "CONFIG SET maxclients to more, and the same in valkey.conf; CLIENT LIST tells whose they are";
    connections("Valkey", number("connected_clients"), number("maxclients"), fix, findings);
    Ok(())
}

/// So many connections of those that a server allows are open.
pub(super) fn connections(server: &str, open: u64, most: u64, fix: &str, findings: &mut Findings) {
    let evidence = format!("{open} of {most} connections to {server} are open");
    if most > 0 && open as f64 > most as f64 * FULL {
        findings.of_server("D28", Severity::Warning, evidence, fix);
    } else {
        findings.well("D28", evidence);
    }
}

fn memory(used: u64, most: u64, policy: &str, findings: &mut Findings) {
    let of = if most == 0 { "no limit".into() } else { bytes(most) };
    let is_full = most > 0 && used as f64 > most as f64 * FULL;
    match (is_full, policy) {
        (true, "noeviction") => findings.of_server(
            "D25",
            Severity::Warning,
            format!("{} of {of} are used, and nothing is evicted", bytes(used)),
            "raise maxmemory, or lower trim.retention",
        ),
        (true, policy) => findings.of_server(
            "D25",
            Severity::Info,
            format!("{} of {of} are used, and {policy} makes room", bytes(used)),
            "nothing as long as `tidegate memory` tells of enough that may be evicted",
        ),
        (false, _) => findings.well("D25", format!("{} of {of} are used", bytes(used))),
    }
}

fn version(valkey: &str, redis: &str, uses_more: bool, findings: &mut Findings) {
    let is_valkey = !valkey.is_empty();
    let (version, from) = if is_valkey { (valkey, VALKEY_FROM) } else { (redis, REDIS_FROM) };
    let evidence = format!("this is {} {version}", if is_valkey { "Valkey" } else { "Redis" });
    if is_older(version, from) {
        let fix = format!("use Valkey {VALKEY_FROM} or newer");
        findings.of_server("D6", Severity::Warning, evidence, fix);
    } else if is_valkey {
        findings.well("D6", evidence);
    } else if uses_more {
        let evidence = format!(
            "{evidence}, and managed counters, cached rows, clusters and sentinels are tested with Valkey alone"
        );
        findings.of_server("D6", Severity::Warning, evidence, format!("use Valkey {VALKEY_FROM} or newer"));
    } else {
        findings.of_server("D6", Severity::Info, evidence, "nothing: docs/redis.md says what is tested with it");
    }
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

/// `near` is how many replicas are near enough for a write; none where writes need none.
fn replication(replicas: u64, near: Option<u64>, findings: &mut Findings) {
    match (replicas, near) {
        (_, Some(0)) => findings.of_server(
            "D3",
            Severity::Error,
            format!("{}, and none is near enough for min-replicas-to-write: every write is refused", connected(replicas)),
            "bring the replicas back; or, to go on without them: CONFIG SET min-replicas-to-write 0",
        ),
        (0, _) => findings.well("D3", "there are no replicas"),
        (_, None) => findings.of_server(
            "D3",
            Severity::Warning,
            format!("{}, and no write needs one: min-replicas-to-write, or min-replicas-max-lag, is 0", connected(replicas)),
            "CONFIG SET min-replicas-to-write 1 min-replicas-max-lag 10, and the same in valkey.conf; from then on writes are refused while no replica is there",
        ),
        (_, Some(near)) => findings.well("D3", format!("{}, {near} near enough for a write", connected(replicas))),
    }
}

fn connected(replicas: u64) -> String {
    match replicas {
        0 => "no replica is connected".into(),
        replicas => format!("{} connected", plural(replicas, "replica is", "replicas are")),
    }
}

/// The value in a reply to CONFIG GET of one name.
fn setting(reply: Reply) -> Option<String> {
    let mut pairs = reply.into_map()?;
    pairs.next().and_then(|(_, value)| value.as_text().map(str::to_owned))
}

fn is_older(version: &str, than: &str) -> bool {
    let numbers = |text: &str| text.split('.').map(|part| part.parse().unwrap_or(0)).collect::<Vec<u32>>();
    numbers(version) < numbers(than)
}

/// This machine's clock, in milliseconds since 1970.
fn here_ms() -> i128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as i128
}

/// How far a clock is from this machine's, which was looked at before it was asked and behind it, in milliseconds. How long the answer took
/// is held against nobody.
fn apart(before: i128, told: i128, after: i128) -> i128 {
    told - told.clamp(before, after.max(before))
}

async fn clock_of_valkey(connection: &Connection) -> Result<i128, Fault> {
    let before = here_ms();
    let told = i128::from(info::time_ms(connection).await?);
    Ok(apart(before, told, here_ms()))
}

/// None where PostgreSQL cannot be asked: its own checks say so.
async fn clock_of_postgres(servers: &Servers) -> Option<i128> {
    let query = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
    // A connection first: opening one is none of the time that the answer takes.
    servers.database.run(async |c| sqlx::query("select").execute(c).await).await.ok()?;
    let before = here_ms();
    let told: i64 = servers.database.run(async |c| sqlx::query_scalar(query).fetch_one(c).await).await.ok()?;
    Some(apart(before, told.into(), here_ms()))
}

fn clocks(valkey: i128, postgres: Option<i128>, findings: &mut Findings) {
    let far = |difference: i128| difference.unsigned_abs() > CLOCKS_DIFFER.as_millis();
    if far(valkey) || postgres.is_some_and(|postgres| far(postgres) || far(postgres - valkey)) {
        let postgres = postgres.map(|ms| format!(", PostgreSQL's by {ms} ms")).unwrap_or_default();
        let evidence = format!("Valkey's clock differs from this machine's by {valkey} ms{postgres}");
        let fix = "run a time service (chrony, systemd-timesyncd) on all three";
        findings.of_server("D16", Severity::Warning, evidence, fix);
    } else {
        let whose = if postgres.is_some() { "the clocks" } else { "Valkey's clock and this machine's" };
        findings.well("D16", format!("{whose} agree within 2 s"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(is_older("7.2.4", "8.0") && is_older("8.0", "8.0.1"));
        assert!(!is_older("8.0.1", "8.0") && !is_older("10.0.0", "8.0") && !is_older("9.1.0", "8.0"));
    }

    fn found(put: impl FnOnce(&mut Findings)) -> Severity {
        let mut findings = Findings::default();
        put(&mut findings);
        findings.all[0].severity
    }

    #[test]
    fn clocks_that_differ_are_told_whichever_it_is_and_a_slow_answer_is_none() {
        assert_eq!(apart(1_000, 9_000, 60_000), 0, "the answer took a minute");
        assert_eq!((apart(1_000, 400, 1_010), apart(1_000, 1_500, 1_010)), (-600, 490));
        assert_eq!(apart(1_000, 1_000, 990), 0, "this machine's clock was set back meanwhile");
        let severity = |valkey, postgres| found(|findings| clocks(valkey, postgres, findings));
        for well in [(0, None), (2_000, None), (-1_000, Some(1_000)), (0, Some(-2_000))] {
            assert_eq!(severity(well.0, well.1), Severity::Ok, "{well:?}");
        }
        for bad in [(2_001, None), (-2_001, Some(0)), (0, Some(3_000)), (-1_100, Some(1_100)), (3_000, Some(3_000))] {
            assert_eq!(severity(bad.0, bad.1), Severity::Warning, "{bad:?}");
        }
    }

    #[test]
    fn what_is_older_than_what_is_tested_is_told_and_a_redis_that_is_tested_is_no_warning() {
        let severity = |valkey, redis, uses_more| found(|findings| version(valkey, redis, uses_more, findings));
        assert_eq!(severity("8.0.1", "7.2.4", true), Severity::Ok);
        assert_eq!(severity("7.2.9", "7.2.4", false), Severity::Warning);
        assert_eq!(severity("", "8.2.0", false), Severity::Info);
        assert_eq!(severity("", "8.2.0", true), Severity::Warning);
        assert_eq!(severity("", "6.2.14", false), Severity::Warning);
    }
}
