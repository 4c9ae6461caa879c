//! `tidegate doctor`: everything that can be wrong around Tidegate, with evidence and the exact remedy.
//!
//! Takes the configuration and asks both servers; prints a finding for each check that has something to say. Changes nothing. Exit 4 when
//! something loses data or stops flushing and is not accepted (with --strict also for warnings, and for what is accepted), 69 when a server cannot be asked.

pub mod accepted;
mod certificates;
pub mod checks;
mod encryption;
mod postgres;
mod streams;
mod valkey;

use jiff::Timestamp;
use serde::Serialize;

use self::accepted::AcceptedAs;
use self::checks::{CHECKS, Check};
use super::columns::{Page, Tone, plural, printable};
use super::complete::{Name, by};
use super::context::{Report, chosen};
use super::observe::{Look, Servers};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::model::pipeline::Pipeline;
use crate::retry::{Fault, advised};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// Exit 4 for warnings, too
    #[arg(long)]
    pub strict: bool,
    /// Show the checks that found nothing, too
    #[arg(long)]
    pub all: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is well.
    Ok,
    /// Worth knowing.
    Info,
    /// It may lose data or time one day.
    Warning,
    /// It loses data, or stops flushing.
    Error,
    /// It could not be asked.
    Unknown,
}

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Finding {
    /// The check's number: `tidegate explain` tells more.
    pub id: &'static str,
    /// What was looked at.
    pub title: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// The pipeline it is about; null where it is about a server.
    pub pipeline: Option<String>,
    /// What was seen.
    pub evidence: String,
    /// What to do; null where there is nothing to do.
    pub fix: Option<String>,
    /// How the configuration accepts it; null where it does not.
    pub accepted: Option<AcceptedAs>,
}

/// Every finding.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Diagnosis {
    /// The worst of all; an error that is accepted counts as a warning.
    pub worst: Severity,
    /// The findings, in the order of the checks.
    pub findings: Vec<Finding>,
    #[serde(skip)]
    shows_all: bool,
}

/// Collects findings.
#[derive(Debug, Default)]
pub(super) struct Findings {
    all: Vec<Finding>,
    /// Which of several servers is being asked.
    at: Option<String>,
}

impl Findings {
    fn put(
        &mut self,
        id: &str,
        pipeline: Option<&Pipeline>,
        severity: Severity,
        evidence: String,
        fix: Option<String>,
    ) {
        let Some(check) = check_named(id) else { return };
        debug_assert!(severity <= check.worst || severity == Severity::Unknown, "{id} says that it is never so bad");
        let pipeline = pipeline.map(|pipeline| pipeline.name.clone());
        let evidence = match &self.at {
            Some(server) => format!("{server}: {evidence}"),
            None => evidence,
        };
        self.all.push(Finding { id: check.id, title: check.title, severity, pipeline, evidence, fix, accepted: None });
    }

    /// All is well.
    fn well(&mut self, id: &str, evidence: impl Into<String>) {
        self.put(id, None, Severity::Ok, evidence.into(), None);
    }

    /// All is well with those of these checks of which nothing was put.
    fn rest(&mut self, checks: &[(&str, &str)]) {
        for (id, evidence) in checks {
            if !self.all.iter().any(|finding| finding.id == *id) {
                self.well(id, *evidence);
            }
        }
    }

    /// About a server.
    fn of_server(&mut self, id: &str, severity: Severity, evidence: impl Into<String>, fix: impl Into<String>) {
        self.put(id, None, severity, evidence.into(), Some(fix.into()));
    }

    /// About a pipeline.
    fn of(
        &mut self,
        pipeline: &Pipeline,
        id: &str,
        severity: Severity,
        evidence: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.put(id, Some(pipeline), severity, evidence.into(), Some(fix.into()));
    }

    /// It could not be asked, because of this fault.
    fn unknown(&mut self, id: &str, fault: &Fault) {
        self.put(id, None, Severity::Unknown, format!("cannot be asked: {}", advised(fault)), None);
    }
}

/// The check of this number.
pub fn check_named(id: &str) -> Option<&'static Check> {
    CHECKS.iter().find(|check| check.id.eq_ignore_ascii_case(id))
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let pipelines = chosen(&config, &opts.pipelines)?;
    let mut servers = Servers::of(&config, "tidegate:doctor")?;
    let findings = examine(&config, &pipelines, &mut servers).await;
    let worst = findings.iter().map(Finding::counts_as).filter(|s| *s != Severity::Unknown).max();
    let worst = worst.unwrap_or(Severity::Ok);
    let away = findings.iter().any(|finding| finding.severity == Severity::Unknown);
    let diagnosis = Diagnosis { worst, findings, shows_all: opts.all };
    context.print(&diagnosis)?;
    Ok(match worst {
        Severity::Error => Exit::Degraded,
        Severity::Warning if opts.strict => Exit::Degraded,
        _ if away => Exit::Unavailable,
        _ => Exit::Ok,
    })
}

async fn examine(config: &Config, pipelines: &[&Pipeline], servers: &mut Servers) -> Vec<Finding> {
    let mut findings = Findings::default();
    let look = Look::take(servers, pipelines, config.reclaim.dead_after).await;
    encryption::examine(config, &mut findings);
    certificates::examine(config, &mut findings).await;
    match valkey::examine(config, pipelines, servers, &mut findings).await {
        Ok(()) => streams::examine(config, pipelines, servers, &look, &mut findings).await,
        Err(fault) => findings.unknown("D1", &fault),
    }
    postgres::examine(config, pipelines, servers, &look, &mut findings).await;
    let place = |id: &str| CHECKS.iter().position(|check| check.id == id);
    findings.all.sort_by_key(|finding| place(finding.id));
    accepted::mark(&mut findings.all, &config.accepted, Timestamp::now());
    findings.all
}

impl Report for Diagnosis {
    fn show(&self, page: &mut Page) {
        let of = |severity: Severity| {
            let counted = self.findings.iter().filter(|finding| finding.severity == severity && !finding.is_accepted());
            counted.count() as u64
        };
        let (errors, warnings, unknown) = (of(Severity::Error), of(Severity::Warning), of(Severity::Unknown));
        let mut words = vec![plural(errors, "error", "errors"), plural(warnings, "warning", "warnings")];
        let accepted = self.findings.iter().filter(|finding| finding.is_accepted()).count() as u64;
        if accepted > 0 {
            words.push(plural(accepted, "accepted error", "accepted errors"));
        }
        if unknown > 0 {
            words.push(format!("{} not made", plural(unknown, "check", "checks")));
        }
        let tone = match self.worst {
            Severity::Error => Tone::Bad,
            _ if warnings + accepted + unknown > 0 => Tone::Warn,
            _ => Tone::Good,
        };
        page.toned(tone, words.join(", "));
        for finding in &self.findings {
            let (tone, word) = match finding.severity {
                Severity::Ok if !self.shows_all => continue,
                Severity::Ok => (Tone::Good, "ok"),
                Severity::Info => (Tone::Good, "info"),
                Severity::Warning => (Tone::Warn, "warning"),
                Severity::Error if finding.is_accepted() => (Tone::Warn, "error"),
                Severity::Error => (Tone::Bad, "error"),
                Severity::Unknown => (Tone::Warn, "not made"),
            };
            let pipeline = finding.pipeline.as_deref().map(|name| format!(" {name}:")).unwrap_or_default();
            page.toned(
                tone,
                format!("{:<4} {word:<8} {}:{pipeline} {}", finding.id, finding.title, printable(&finding.evidence)),
            );
            if let Some(accepted) = finding.accepted.as_ref().filter(|_| finding.severity != Severity::Ok) {
                page.line(format!("              {}", printable(&accepted.sentence())));
            }
            if let Some(fix) = &finding.fix {
                page.line(format!("              fix: {fix}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ACCEPTABLE, NEVER_ACCEPTED};

    #[test]
    fn what_can_be_accepted_and_what_never_can_is_what_the_daemon_refuses() {
        let refused: Vec<&str> = CHECKS
            .iter()
            .filter(|check| check.consequence.contains("`tidegate run` refuses"))
            .map(|check| check.id)
            .collect();
        let mut told = [&ACCEPTABLE[..], &NEVER_ACCEPTED].concat();
        told.sort_by_key(|id| CHECKS.iter().position(|check| check.id == *id));
        assert_eq!(refused, told);
        let explained = |id: &str| check_named(id).is_some_and(|check| check.consequence.contains("[[doctor.accept]]"));
        assert!(ACCEPTABLE.into_iter().all(explained) && !NEVER_ACCEPTED.into_iter().any(explained));
    }

    #[test]
    fn checks_are_numbered_without_a_gap_and_each_says_what_to_do() {
        for (n, check) in CHECKS.iter().enumerate() {
            assert_eq!(check.id, format!("D{}", n + 1));
            assert!(check.meaning.len() > 30 && check.consequence.len() > 10, "{check:?}");
        }
    }
}
