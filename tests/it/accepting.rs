//! Findings of the doctor with which the daemon does not start, unless the configuration accepts them for a while.

use std::time::Duration;

use jiff::Timestamp;
use rustix::process::Signal;
use serde_json::Value;
use tidegate::config::TOLD_BEFORE;
use tokio::process::Command;

use crate::admin::Admin;
use crate::contract::assert_fits;
use crate::harness::{Daemon, Lab, eventually, output};
use crate::proxy::Proxy;

/// The metric that tells when an acceptance ends.
const UNTIL: &str = "tidegate_acceptance_until_timestamp_seconds";
const REASON: &str = "cache node of the staging cluster; tracked in OPS-1234";

/// A lab whose Valkey may evict the stream, with an entry in it.
async fn evicting() -> Lab {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    client.add("a", 1).await;
    lab
}

/// Sets the keys of an acceptance.
fn accept<'c>(command: &'c mut Command, keys: &[(&str, &str)]) -> &'c mut Command {
    command.envs(keys.iter().map(|(key, value)| (format!("TIDEGATE__DOCTOR__ACCEPT__1__{key}"), *value)))
}

/// The program, accepting the eviction policy.
fn accepting(lab: &Lab, arguments: &[&str], until: &str) -> Command {
    let mut command = lab.program(arguments);
    accept(&mut command, &[("FINDING", "D1"), ("UNTIL", until), ("REASON", REASON)]);
    command
}

/// The date so many days from now, in UTC.
fn in_days(days: i64) -> String {
    let moment = Timestamp::now() + jiff::SignedDuration::from_hours(24 * days);
    moment.to_string().split_once('T').expect("a date and a time").0.to_owned()
}

/// The end of the day so many days from now, in UTC, in seconds since 1970.
fn end_of(days: i64) -> f64 {
    let end: Timestamp = format!("{}T00:00:00Z", in_days(days + 1)).parse().expect("a time");
    end.as_second() as f64
}

/// A document that this program prints, and its exit code.
async fn document(schema: &str, mut command: Command) -> (i32, Value) {
    let (code, stdout, stderr) = output(command.args(["--output", "json"])).await;
    let document: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("no JSON: {code} {stdout} {stderr}"));
    assert_fits(schema, &document);
    (code, document)
}

pub(crate) fn has_reason(status: &Value, code: &str) -> bool {
    status["reasons"].as_array().expect("a list").iter().any(|reason| reason["code"] == code)
}

/// Waits until the status has this reason, or has it no longer; gives its exit code and the document.
async fn await_reason(lab: &Lab, code: &str, present: bool) -> (i32, Value) {
    let last = std::sync::Mutex::new((0, Value::Null));
    eventually(code, present, async || {
        let found = document("status", lab.program(&["status"])).await;
        let has = has_reason(&found.1, code);
        *last.lock().expect("unpoisoned") = found;
        has
    })
    .await;
    last.into_inner().expect("unpoisoned")
}

/// What the doctor says of the eviction policy.
fn eviction(diagnosis: &Value) -> Value {
    let findings = diagnosis["findings"].as_array().expect("a list");
    findings.iter().find(|finding| finding["id"] == "D1").expect("the check is made").clone()
}

fn events(daemon: &mut Daemon, name: &str) -> usize {
    let name = format!("\"event\":\"{name}\"");
    daemon.all_lines().iter().filter(|line| line.contains(&name)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_may_evict_the_stream_is_refused_unless_that_is_accepted() {
    let lab = evicting().await;
    let (code, _, stderr) = output(&mut lab.program(&["run"])).await;
    assert_eq!(code, 78, "{stderr}");
    for words in ["maxmemory-policy is allkeys-lru", "(D1)", "set maxmemory-policy to noeviction", "[[doctor.accept]]"]
    {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text =
        format!("[[doctor.accept]]\nfinding = \"D1\"\nuntil = {}\nreason = \"staging; OPS-1234\"\n", in_days(90));
    std::fs::write(file.path(), text).expect("written");
    let mut command = lab.program(&["run", "--until-empty"]);
    let (code, _, stderr) = output(command.env("TIDEGATE_CONFIG", file.path())).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.value("a").await, Some(1));
    let told = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told: Vec<Value> = told.filter(|line| line["event"] == "accepted").collect();
    assert_eq!(told.len(), 1, "{stderr}");
    assert_eq!((&told[0]["finding"], &told[0]["found"]), (&"D1".into(), &true.into()), "{stderr}");
    assert_eq!((&told[0]["until"], &told[0]["reason"]), (&in_days(90).into(), &"staging; OPS-1234".into()), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_over_too_long_or_cannot_be_accepted_is_refused_with_the_next_step() {
    let lab = evicting().await;
    let whole = [("FINDING", "D1"), ("UNTIL", &*in_days(30)), ("REASON", REASON)];
    for (key, value, words) in [
        (
            "UNTIL",
            &*in_days(-1),
            &[&*format!("D1 was accepted until {} ({REASON})", in_days(-1)), "write a later until"][..],
        ),
        ("UNTIL", &*in_days(91), &[&*format!("more than 90 days ahead: write {} at the latest", in_days(90))]),
        ("UNTIL", "tomorrow", &["doctor.accept.1.until is \"tomorrow\"; write a date such as"]),
        ("REASON", "", &["doctor.accept.1.reason is \"\"; write 1 to 512 bytes"]),
        ("FINDING", "D99", &["doctor.accept.1.finding is \"D99\"; write D1"]),
        ("FINDING", "D2", &["All others do not keep it from starting"]),
        ("FINDING", "D19", &["D17, D19, D26 keep `tidegate run` from starting in any case"]),
    ] {
        let mut command = lab.program(&["run", "--until-empty"]);
        accept(&mut command, &whole);
        let (code, _, stderr) = output(accept(&mut command, &[(key, value)])).await;
        assert_eq!(code, 78, "{key} {value}: {stderr}");
        words.iter().for_each(|words| assert!(stderr.contains(words), "{key} {value}: {stderr}"));
    }
    for lacking in ["FINDING", "UNTIL", "REASON"] {
        let mut command = lab.program(&["run", "--until-empty"]);
        accept(&mut command, &whole).env_remove(format!("TIDEGATE__DOCTOR__ACCEPT__1__{lacking}"));
        let (code, _, stderr) = output(&mut command).await;
        let words = format!("doctor.accept.1.{} is missing", lacking.to_lowercase());
        assert!(code == 78 && stderr.contains(&words), "{code}: {stderr}");
    }
    assert_eq!(lab.value("a").await, None, "nothing was flushed");
    // Too long is too long, whatever Valkey says; what is over and needed no more is no reason not to start.
    lab.client().await.call(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    let until_empty = ["run", "--until-empty"];
    assert_eq!(output(&mut accepting(&lab, &until_empty, &in_days(91))).await.0, 78);
    let (code, _, stderr) = output(&mut accepting(&lab, &until_empty, &in_days(-1))).await;
    assert!(code == 0 && stderr.contains("is not there any more: remove the [[doctor.accept]]"), "{code}: {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_accepted_is_shown_by_status_doctor_and_metrics() {
    let lab = evicting().await;
    let until = in_days(30);
    let mut daemon = Daemon::start(accepting(&lab, &["run"], &until));
    let admin = Admin::of(&mut daemon).await;
    lab.await_value("a", 1).await;
    let (code, status) = await_reason(&lab, "accepted", true).await;
    assert_eq!((code, &status["verdict"]["state"]), (0, &"notice".into()), "{status}");
    let finding = &status["findings"][0];
    assert_eq!((&finding["finding"], &finding["accepted"]), (&"D1".into(), &"in_force".into()), "{status}");
    assert_eq!((&finding["until"], &finding["reason"]), (&(&*until).into(), &REASON.into()), "{status}");
    let (_, page, _) = output(&mut lab.program(&["status"])).await;
    assert!(
        page.contains(&format!("D1 is accepted until {until} ({REASON}): maxmemory-policy is allkeys-lru")),
        "{page}"
    );
    let is = |scrape: &crate::admin::Scrape, accepted| scrape.sum("tidegate_findings", &[("accepted", accepted)]);
    let scrape = admin.scrape().await;
    assert_eq!(["in_force", "expired", "no"].map(|word| is(&scrape, word)), [Some(1.0), Some(0.0), Some(0.0)]);
    assert_eq!(scrape.sum(UNTIL, &[("finding", "D1")]), Some(end_of(30)));
    assert_eq!(finding["ends_soon"], false, "{status}");

    let (code, diagnosis) = document("doctor", accepting(&lab, &["doctor"], &until)).await;
    assert_eq!((code, &diagnosis["worst"]), (0, &"warning".into()), "{diagnosis}");
    let found = eviction(&diagnosis);
    assert_eq!((&found["severity"], &found["accepted"]["term"]), (&"error".into(), &"in_force".into()), "{found}");
    assert_eq!(found["accepted"]["ends_soon"], false, "{found}");
    let (_, page, _) = output(&mut accepting(&lab, &["doctor"], &until)).await;
    assert!(page.starts_with("0 errors, ") && page.contains("1 accepted error"), "{page}");
    assert!(page.contains(&format!("accepted until {until}: {REASON}")), "{page}");
    assert_eq!(output(&mut accepting(&lab, &["doctor", "--strict"], &until)).await.0, 4);
    // It counts in full where it is accepted for too long, or not at all.
    let (code, diagnosis) = document("doctor", accepting(&lab, &["doctor"], &in_days(91))).await;
    assert_eq!((code, &eviction(&diagnosis)["accepted"]["term"]), (4, &"too_long".into()), "{diagnosis}");
    let (code, diagnosis) = document("doctor", lab.program(&["doctor"])).await;
    assert_eq!((code, &eviction(&diagnosis)["accepted"]), (4, &Value::Null), "{diagnosis}");
    for event in ["acceptance_expired", "acceptance_ends_soon", "not_accepted"] {
        assert_eq!(events(&mut daemon, event), 0, "{event}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acceptance_that_ends_within_seven_days_is_told_before_it_does() {
    let lab = evicting().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let configure = |until: &str| {
        let text = format!("[[doctor.accept]]\nfinding = 'D1'\nuntil = '{until}'\nreason = '{REASON}'\n");
        std::fs::write(file.path(), text).expect("written");
    };
    configure(&in_days(3));
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE_CONFIG", file.path());
    let mut daemon = Daemon::start(command);
    let admin = Admin::of(&mut daemon).await;
    let told = daemon.wait_for_event("acceptance_ends_soon", |_| true).await;
    assert_eq!((&told["finding"], &told["level"]), (&"D1".into(), &"WARN".into()), "{told}");
    assert_eq!((&told["until"], &told["reason"]), (&(&*in_days(3)).into(), &REASON.into()), "{told}");
    let message = told["message"].as_str().unwrap_or_default();
    assert!(message.contains("none starts with it") && message.contains("later until in [[doctor.accept]]"), "{told}");

    let (code, status) = await_reason(&lab, "acceptance_ends_soon", true).await;
    assert_eq!((code, &status["verdict"]["state"]), (0, &"notice".into()), "{status}");
    let finding = &status["findings"][0];
    assert_eq!((&finding["accepted"], &finding["ends_soon"]), (&"in_force".into(), &true.into()), "{status}");
    let (_, page, _) = output(&mut lab.program(&["status"])).await;
    for words in
        [&*format!("D1 is accepted until {} ({REASON}), 7 days more at the most", in_days(3)), "refuses to start"]
    {
        assert!(page.contains(words), "{words}: {page}");
    }
    let (code, diagnosis) = document("doctor", accepting(&lab, &["doctor"], &in_days(3))).await;
    let found = eviction(&diagnosis);
    assert_eq!((code, &found["accepted"]["term"]), (0, &"in_force".into()), "{diagnosis}");
    assert_eq!(found["accepted"]["ends_soon"], true, "{diagnosis}");
    let (_, page, _) = output(&mut accepting(&lab, &["doctor"], &in_days(3))).await;
    assert!(page.contains("7 days more at the most; afterwards `tidegate run` refuses to start with it"), "{page}");
    let scrape = admin.scrape().await;
    assert_eq!(scrape.sum(UNTIL, &[("finding", "D1")]), Some(end_of(3)));
    assert_eq!(scrape.sum("tidegate_findings", &[("accepted", "in_force")]), Some(1.0));

    // A later date ends it; once it is near again that is told again.
    configure(&in_days(60));
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("accepted", |told| told["until"] == *in_days(60)).await;
    await_reason(&lab, "acceptance_ends_soon", false).await;
    assert_eq!(admin.scrape().await.sum(UNTIL, &[("finding", "D1")]), Some(end_of(60)));
    configure(&in_days(2));
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("acceptance_ends_soon", |told| told["until"] == *in_days(2)).await;
    assert_eq!(events(&mut daemon, "acceptance_ends_soon"), 2, "{}", daemon.last_lines());
    // What is corrected is accepted no longer than needed, and nothing has to be done before any date.
    lab.client().await.call(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    await_reason(&lab, "acceptance_ends_soon", false).await;
    assert_eq!(admin.scrape().await.sum(UNTIL, &[]), None);
}

#[test]
fn the_alert_fires_as_long_before_an_acceptance_ends_as_the_daemon_tells_it() {
    let rule = std::fs::read_to_string("helm/tidegate/rules/TidegateAcceptanceEnds.yaml").expect("a rule");
    let days = TOLD_BEFORE.as_secs() / 86_400;
    assert!(rule.contains(&format!("({UNTIL}) - time() < {days} * 86400")), "{rule}");
    let sources = ["src/service/accept.rs", "src/ops/status/reasons.rs", "src/ops/doctor/accepted.rs"];
    for source in sources {
        let text = std::fs::read_to_string(source).expect("a source");
        assert!(text.contains(&format!("{days} days more at the most")), "{source} tells another time");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_date_lasts_to_its_end_in_utc_wherever_the_clock_on_the_wall_is() {
    let lab = evicting().await;
    // The day in UTC, of five minutes from now: midnight may be near. The farthest zones have another date at any hour, one of them at the least.
    let moment = Timestamp::now() + Duration::from_secs(300);
    let today = moment.to_string().split_once('T').expect("a date and a time").0.to_owned();
    for zone in ["Pacific/Kiritimati", "Etc/GMT+12", "Nowhere/AtAll"] {
        for (until, expected) in [(&*today, 0), (&*in_days(-1), 78)] {
            let mut command = accepting(&lab, &["run", "--until-empty"], until);
            let (code, _, stderr) = output(command.env("TZ", zone)).await;
            assert_eq!(code, expected, "{zone} {until}: {stderr}");
        }
    }
    assert_eq!(lab.value("a").await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finding_that_is_accepted_twice_is_refused_at_the_start_and_at_a_reload() {
    let lab = evicting().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let configure = |days: &[i64]| {
        let one = |days: &i64| {
            format!("[[doctor.accept]]\nfinding = 'D1'\nuntil = '{}'\nreason = '{days}'\n", in_days(*days))
        };
        std::fs::write(file.path(), days.iter().map(one).collect::<String>()).expect("written");
    };
    let run = |arguments: &[&str]| {
        let mut command = lab.program(arguments);
        command.env("TIDEGATE_CONFIG", file.path());
        command
    };
    // Whichever of them is over, and also where a variable changes one of them.
    for days in [[10, 20], [-1, 20], [20, -1]] {
        configure(&days);
        for verb in [&["run", "--until-empty"][..], &["check"]] {
            let (code, _, stderr) = output(&mut run(verb)).await;
            assert_eq!(code, 78, "{stderr}");
            assert!(stderr.contains("doctor.accept.2 accepts D1 a second time; remove one of them"), "{stderr}");
        }
    }
    let mut command = run(&["run", "--until-empty"]);
    let (code, _, stderr) = output(command.env("TIDEGATE__DOCTOR__ACCEPT__2__REASON", "both")).await;
    assert!(code == 78 && stderr.contains("a second time"), "{code}: {stderr}");

    configure(&[20]);
    let mut daemon = Daemon::start(run(&["run"]));
    daemon.wait_for_event("running", |_| true).await;
    configure(&[20, 30]);
    daemon.signal(Signal::HUP);
    let refused = daemon.wait_for_event("reload_refused", |_| true).await;
    assert!(refused["refusal"].as_str().is_some_and(|refusal| refusal.contains("a second time")), "{refused}");
    lab.await_value("a", 1).await;
    let (_, status) = await_reason(&lab, "accepted", true).await;
    assert_eq!(status["findings"][0]["until"], *in_days(20), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acceptance_that_runs_out_stops_nothing_and_is_told() {
    let lab = evicting().await;
    let until = (Timestamp::now() + Duration::from_secs(10)).to_string();
    let mut daemon = Daemon::start(accepting(&lab, &["run"], &until));
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("accepted", |told| told["until"] == *until).await;
    daemon.wait_for_event("acceptance_ends_soon", |told| told["until"] == *until).await;
    let told = daemon.wait_for_event("acceptance_expired", |_| true).await;
    assert_eq!((&told["finding"], &told["level"]), (&"D1".into(), &"WARN".into()), "{told}");
    assert_eq!((&told["until"], &told["reason"]), (&(&*until).into(), &REASON.into()), "{told}");
    assert!(told["evidence"].as_str().is_some_and(|evidence| evidence.contains("allkeys-lru")), "{told}");
    lab.await_value("a", 1).await;
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 2).await;

    let (code, status) = await_reason(&lab, "acceptance_expired", true).await;
    let verdict = &status["verdict"];
    assert_eq!((code, &verdict["state"], &verdict["flushing"]), (4, &"degraded".into(), &true.into()), "{status}");
    assert_eq!(status["findings"][0]["accepted"], "expired", "{status}");
    let sentence = verdict["sentence"].as_str().unwrap_or_default();
    assert!(
        sentence.contains(&format!("D1 was accepted until {until}")) && sentence.contains("later until"),
        "{status}"
    );
    let scrape = admin.scrape().await;
    assert_eq!(scrape.sum("tidegate_findings", &[("accepted", "expired")]), Some(1.0));
    assert_eq!(scrape.sum(UNTIL, &[]), None, "it is over");
    let (code, diagnosis) = document("doctor", accepting(&lab, &["doctor"], &until)).await;
    assert_eq!((code, &eviction(&diagnosis)["accepted"]["term"]), (4, &"expired".into()), "{diagnosis}");
    assert_eq!(output(&mut accepting(&lab, &["run"], &until)).await.0, 78, "no other daemon starts");

    // A reload is followed all the same: a password may have to be read.
    assert_eq!(events(&mut daemon, "acceptance_expired"), 1);
    let starts = events(&mut daemon, "running");
    daemon.signal(Signal::HUP);
    eventually("starts", starts + 1, async || admin_starts(&admin).await).await;
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 3).await;
    assert_eq!(events(&mut daemon, "acceptance_expired"), 1, "it is told once: {}", daemon.last_lines());
    // The cause is corrected.
    lab.client().await.call(&["CONFIG", "SET", "maxmemory-policy", "volatile-lru"]).await;
    let (code, status) = await_reason(&lab, "acceptance_expired", false).await;
    assert_eq!((code, &status["findings"]), (0, &Value::Array(Vec::new())), "{status}");
}

/// How often the workers were started.
async fn admin_starts(admin: &Admin) -> usize {
    1 + admin.scrape().await.sum("tidegate_reloads_total", &[("outcome", "followed")]).unwrap_or(0.0) as usize
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_started_without_valkey_tells_what_it_finds_later() {
    let lab = evicting().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    proxy.cut();
    let mut daemon = lab.daemon_through(Some(proxy.port()), None);
    daemon.wait_for_event("running", |_| true).await;
    proxy.heal();
    let told = daemon.wait_for_event("not_accepted", |_| true).await;
    assert!(told["evidence"].as_str().is_some_and(|evidence| evidence.contains("allkeys-lru")), "{told}");
    lab.await_value("a", 1).await;
    let (code, status) = await_reason(&lab, "not_accepted", true).await;
    assert_eq!((code, &status["findings"][0]["accepted"]), (4, &"no".into()), "{status}");
    assert_eq!(status["verdict"]["flushing"], true, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_brings_only_what_is_in_force_and_takes_away_what_it_lacks() {
    let lab = evicting().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let configure = |until: Option<&str>| {
        let text =
            until.map(|until| format!("[[doctor.accept]]\nfinding = 'D1'\nuntil = '{until}'\nreason = 'staging'\n"));
        std::fs::write(file.path(), text.unwrap_or_default()).expect("written");
    };
    configure(Some(&in_days(10)));
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE_CONFIG", file.path());
    let mut daemon = Daemon::start(command);
    daemon.wait_for_event("running", |_| true).await;
    for (until, words) in [(in_days(-1), "and that is over"), (in_days(91), "more than 90 days ahead")] {
        configure(Some(&until));
        daemon.forget();
        daemon.signal(Signal::HUP);
        let refused = daemon.wait_for_event("reload_refused", |_| true).await;
        assert!(refused["refusal"].as_str().is_some_and(|refusal| refusal.contains(words)), "{refused}");
    }
    configure(Some(&in_days(20)));
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("accepted", |told| told["until"] == *in_days(20)).await;
    // Nothing that runs is stopped because a finding is accepted no longer.
    configure(None);
    daemon.signal(Signal::HUP);
    daemon.wait_for_event("not_accepted", |_| true).await;
    assert_eq!(await_reason(&lab, "not_accepted", true).await.0, 4);
    lab.client().await.add("a", 1).await;
    lab.await_value("a", 2).await;
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
}
