//! Accepted: what the configuration says of findings with which the daemon would not start.
//!
//! Takes the findings and `[[doctor.accept]]`; marks those that are accepted. A finding keeps its severity: what changes is how it counts. It
//! cannot fail.

use jiff::Timestamp;
use serde::Serialize;

use super::{Finding, Severity};
use crate::config::{Acceptance, Term};

/// How the configuration accepts a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AcceptedAs {
    /// Until when: a date, which lasts to its end in UTC, or a time.
    pub until: String,
    /// Why.
    pub reason: String,
    /// Whether `tidegate run` would start with it now.
    pub term: AcceptedFor,
    /// Whether that ends within 7 days.
    pub ends_soon: bool,
}

/// Whether an acceptance holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum AcceptedFor {
    /// It holds: the finding counts as a warning.
    InForce,
    /// Its time is over: the finding counts in full, and `tidegate run` does not start.
    Expired,
    /// It ends more than 90 days ahead: the finding counts in full, and `tidegate run` does not start.
    TooLong,
}

/// Marks the findings that are accepted.
pub(super) fn mark(findings: &mut [Finding], accepted: &[Acceptance], now: Timestamp) {
    for finding in findings {
        let acceptance = accepted.iter().find(|acceptance| acceptance.finding == finding.id);
        finding.accepted = acceptance.map(|Acceptance { until, reason, .. }| AcceptedAs {
            until: until.to_string(),
            reason: reason.clone(),
            term: match until.term(now) {
                Term::InForce => AcceptedFor::InForce,
                Term::Expired => AcceptedFor::Expired,
                Term::TooLong => AcceptedFor::TooLong,
            },
            ends_soon: until.ends_soon(now),
        });
    }
}

impl Finding {
    /// Whether it is an error that is accepted now.
    pub(super) fn is_accepted(&self) -> bool {
        let holds = self.accepted.as_ref().is_some_and(|accepted| accepted.term == AcceptedFor::InForce);
        holds && self.severity == Severity::Error
    }

    /// How bad it counts for the exit code.
    pub(super) fn counts_as(&self) -> Severity {
        if self.is_accepted() { Severity::Warning } else { self.severity }
    }
}

impl AcceptedAs {
    /// The same as a line.
    pub(super) fn sentence(&self) -> String {
        let AcceptedAs { until, reason, term, ends_soon } = self;
        match term {
            AcceptedFor::InForce if *ends_soon => format!(
                "accepted until {until}, 7 days more at the most; afterwards `tidegate run` refuses to start with it: {reason}"
            ),
            AcceptedFor::InForce => format!("accepted until {until}: {reason}"),
            AcceptedFor::Expired => format!("was accepted until {until}, and that is over: {reason}"),
            AcceptedFor::TooLong => {
                format!("accepted until {until}, which is more than 90 days ahead and is refused: {reason}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Until;

    #[test]
    fn an_accepted_error_counts_as_a_warning_until_its_time_is_over() {
        let finding = |severity| Finding {
            id: "D1",
            title: "eviction",
            severity,
            pipeline: None,
            evidence: String::new(),
            fix: None,
            accepted: None,
        };
        let until = Until::parse("2026-12-01").expect("a date");
        let accepted = [Acceptance { finding: "D1".into(), until, reason: "staging".into() }];
        for (at, severity, counts) in [
            ("2026-12-01T23:00:00Z", Severity::Error, Severity::Warning),
            ("2026-12-02T00:00:00Z", Severity::Error, Severity::Error),
            ("2026-01-01T00:00:00Z", Severity::Error, Severity::Error),
            ("2026-12-01T23:00:00Z", Severity::Ok, Severity::Ok),
            ("2026-12-01T23:00:00Z", Severity::Unknown, Severity::Unknown),
        ] {
            let mut findings = [finding(severity)];
            mark(&mut findings, &accepted, at.parse().expect("a time"));
            assert_eq!(findings[0].counts_as(), counts, "{at} {severity:?}");
        }
        let said = |at: &str| {
            let mut findings = [finding(Severity::Error)];
            mark(&mut findings, &accepted, at.parse().expect("a time"));
            findings[0].accepted.as_ref().expect("accepted").sentence()
        };
        assert_eq!(said("2026-11-24T23:59:59Z"), "accepted until 2026-12-01: staging");
        assert!(said("2026-11-25T00:00:00Z").contains("7 days more at the most; afterwards `tidegate run` refuses"));
        let mut other = [Finding { id: "D7", ..finding(Severity::Error) }];
        mark(&mut other, &accepted, "2026-12-01T23:00:00Z".parse().expect("a time"));
        assert_eq!((other[0].counts_as(), &other[0].accepted), (Severity::Error, &None));
    }
}
