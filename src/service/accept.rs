//! Accept: what would keep the daemon from starting, and what of it the configuration accepts for a while.
//!
//! Takes the configuration and asks Valkey at the start; gives [`Findings`], which all who tell of them share, or refuses with the next
//! step. Afterwards nothing stops the daemon: an acceptance that will soon run out, one that has, and a finding that comes, are told once in the
//! log, and for as long as they last in the metrics and in what the process says of itself in Valkey.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Date;
use tracing::warn;

use super::prepare::{Options, Refusal};
use crate::config::{Acceptance, Config, Term, Until};
use crate::flow::read;
use crate::presence::{Accepted, Finding};
use crate::retry::{Fault, Verdict, judge};
use crate::telemetry::registry::Registry;
use crate::valkey::{Endpoint, Link, info};

/// How often it is looked at least whether an acceptance has run out: this machine's clock may jump.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// The check of the eviction policy.
const EVICTION: &str = "D1";
/// What to do about it.
const REMEDY: &str =
    "set maxmemory-policy to noeviction, or to one that begins with volatile-, and the same in valkey.conf";

/// Why the configuration does not let the daemon start with what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAccepted {
    /// Nothing accepts it.
    #[error(
        "{evidence}, undelivered entries included ({finding}): {remedy}; or accept it until a date that is at most 90 days ahead, with \
         [[doctor.accept]] in the configuration (docs/configuration.md)",
        remedy = REMEDY
    )]
    Found {
        /// The check's number.
        finding: &'static str,
        /// What was seen.
        evidence: String,
    },
    /// It was accepted, and that is over.
    #[error(
        "{finding} was accepted until {until} ({reason}), and that is over: {remedy}, and remove the [[doctor.accept]]; or write a later \
         until, {last} at the latest",
        remedy = REMEDY
    )]
    Expired {
        /// The check's number.
        finding: String,
        /// Until when it was accepted.
        until: Until,
        /// Why it was accepted.
        reason: String,
        /// The last day that may be written.
        last: Date,
    },
    /// It would be accepted for too long.
    #[error(
        "[[doctor.accept]] accepts {finding} until {until}, which is more than 90 days ahead: write {last} at the latest"
    )]
    TooLong {
        /// The check's number.
        finding: String,
        /// Until when it would be accepted.
        until: Until,
        /// The last day that may be written.
        last: Date,
    },
}

/// What keeps a daemon from starting, and is there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    finding: &'static str,
    evidence: String,
}

impl Found {
    /// The finding that this `maxmemory-policy` is; none where it is well.
    fn of_policy(policy: &str) -> Option<Found> {
        let evidence = || format!("maxmemory-policy is {policy}: Valkey may evict the stream when its memory is full");
        info::evicts_any_key(policy).then(|| Found { finding: EVICTION, evidence: evidence() })
    }
}

/// Lets the daemon start, or says why not.
///
/// # Errors
/// [`Refusal::NotAccepted`]. With `until_empty` also what Valkey says where waiting would not help. A Valkey that is out of reach is none: the
/// workers meet it, and tell, and what it is like is looked at later.
pub(super) async fn admit(
    config: &Config,
    valkey: &Endpoint,
    options: Options,
    registry: &Registry,
) -> Result<Findings, Refusal> {
    let now = Timestamp::now();
    let found = match look(valkey).await {
        Ok(found) => Some(found),
        Err(fault) if options.until_empty && judge(&fault, 1).verdict == Verdict::Halt => {
            return Err(Refusal::Fault(fault));
        }
        Err(_) => None,
    };
    judged(&config.accepted, found.as_deref(), now)?;
    let found = found.unwrap_or_default();
    for acceptance in &config.accepted {
        tell_accepted(acceptance, &found, now);
    }
    let state = State { accepted: config.accepted.clone(), found, told: Vec::new() };
    let findings = Findings(Arc::new(Inner { state: Mutex::new(state), registry: registry.clone() }));
    findings.tell(now);
    Ok(findings)
}

/// Whether the daemon would start with these acceptances, as far as their dates tell.
///
/// # Errors
/// The first that is over, or that is too long.
pub fn in_term(accepted: &[Acceptance], now: Timestamp) -> Result<(), NotAccepted> {
    terms(accepted, now, |_| true)
}

/// Asks every primary, for each has a policy of its own. One that is not allowed to say counts as one that is well.
async fn look(valkey: &Endpoint) -> Result<Vec<Found>, Fault> {
    for home in valkey.homes().await? {
        let link = Link::open(&valkey.at(&home), "tidegate:start").await?;
        let policy = read::eviction_policy(&link).await.unwrap_or_default();
        if let Some(found) = Found::of_policy(&policy) {
            return Ok(vec![found]);
        }
    }
    Ok(Vec::new())
}

/// Whether these acceptances are as long as they may be, and none is over of those that are `needed`.
fn terms(accepted: &[Acceptance], now: Timestamp, needed: impl Fn(&Acceptance) -> bool) -> Result<(), NotAccepted> {
    for Acceptance { finding, until, .. } in accepted {
        if until.term(now) == Term::TooLong {
            return Err(NotAccepted::TooLong { finding: finding.clone(), until: *until, last: Until::last_day(now) });
        }
    }
    match accepted.iter().find(|acceptance| acceptance.until.term(now) == Term::Expired && needed(acceptance)) {
        Some(Acceptance { finding, until, reason }) => Err(NotAccepted::Expired {
            finding: finding.clone(),
            until: *until,
            reason: reason.clone(),
            last: Until::last_day(now),
        }),
        None => Ok(()),
    }
}

/// Whether the daemon may start with what was found; none: Valkey does not say. An acceptance that is over matters unless it is known that it
/// is not needed any more: who has corrected the cause must not find the daemon refusing to start for a date.
fn judged(accepted: &[Acceptance], found: Option<&[Found]>, now: Timestamp) -> Result<(), NotAccepted> {
    let is_there = |finding: &str| found.is_none_or(|found| found.iter().any(|found| found.finding == finding));
    terms(accepted, now, |acceptance| is_there(&acceptance.finding))?;
    let is_accepted = |found: &Found| accepted.iter().any(|acceptance| acceptance.finding == found.finding);
    match found.unwrap_or_default().iter().find(|found| !is_accepted(found)) {
        Some(Found { finding, evidence }) => Err(NotAccepted::Found { finding, evidence: evidence.clone() }),
        None => Ok(()),
    }
}

/// What keeps a daemon from starting, and is there while this one runs. Its clones are one.
#[derive(Debug, Clone)]
pub(super) struct Findings(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    registry: Registry,
}

#[derive(Debug)]
struct State {
    accepted: Vec<Acceptance>,
    found: Vec<Found>,
    /// What the log was told of, and not to be told of again: the finding, whether it is accepted, and whether that ends soon.
    told: Vec<(String, Accepted, bool)>,
}

impl Findings {
    /// All of them.
    pub(super) fn now(&self) -> Vec<Finding> {
        let state = self.lock();
        standing(&state.accepted, &state.found, Timestamp::now())
    }

    /// Each primary that was asked has one of these policies.
    pub(super) fn saw_policies<'a>(&self, mut policies: impl Iterator<Item = &'a str>) {
        self.lock().found = policies.find_map(Found::of_policy).into_iter().collect();
        self.tell(Timestamp::now());
    }

    /// Tells when an acceptance runs out, for as long as it is polled.
    pub(super) async fn watch(&self) -> Infallible {
        loop {
            let now = Timestamp::now();
            self.tell(now);
            let next = self.lock().accepted.iter().filter_map(|acceptance| acceptance.until.left(now)).min();
            tokio::time::sleep(next.unwrap_or(LOOK_EVERY).min(LOOK_EVERY)).await;
        }
    }

    /// Whether a reload may be followed, as far as acceptances go: one that it brings must be in force. What was accepted before and has run
    /// out meanwhile, and what is found and no longer accepted, keeps nobody from reloading a password.
    pub(super) fn may_follow(before: &[Acceptance], after: &[Acceptance]) -> Result<(), NotAccepted> {
        in_term(&news(before, after), Timestamp::now())
    }

    /// A reload was followed.
    pub(super) fn follow(&self, before: &[Acceptance], after: &[Acceptance]) {
        let now = Timestamp::now();
        {
            let mut state = self.lock();
            state.accepted = after.to_vec();
            news(before, after).iter().for_each(|acceptance| tell_accepted(acceptance, &state.found, now));
        }
        self.tell(now);
    }

    /// Tells what is found and not accepted, or no longer: the metrics each time, the log once.
    fn tell(&self, now: Timestamp) {
        let mut state = self.lock();
        let findings = standing(&state.accepted, &state.found, now);
        let count = |accepted| findings.iter().filter(|finding| finding.accepted == accepted).count() as u64;
        let counts = [Accepted::InForce, Accepted::Expired, Accepted::No].map(count);
        self.0.registry.told_findings(counts, ends(&state.accepted, &state.found, now));
        let open = findings.iter().filter(|finding| finding.accepted != Accepted::InForce || finding.ends_soon);
        let open: Vec<_> = open.map(|open| (open, (open.finding.clone(), open.accepted, open.ends_soon))).collect();
        for (Finding { finding, evidence, accepted, until, reason, .. }, told) in &open {
            if state.told.contains(told) {
                continue;
            }
            match accepted {
                Accepted::InForce => warn!(
                    event = "acceptance_ends_soon",
                    finding,
                    until,
                    reason,
                    evidence,
                    "{finding} is accepted for 7 days more at the most: then this daemon goes on, and none starts with it; {REMEDY}, or write a \
                     later until in [[doctor.accept]]"
                ),
                Accepted::Expired => warn!(
                    event = "acceptance_expired",
                    finding,
                    until,
                    reason,
                    evidence,
                    "the time for which {finding} was accepted is over: this daemon goes on, and will not start again; {REMEDY}, or write a \
                     later until in [[doctor.accept]]"
                ),
                Accepted::No => warn!(
                    event = "not_accepted",
                    finding,
                    evidence,
                    "{finding} is there, and the configuration does not accept it: this daemon goes on, and will not start again; {REMEDY}"
                ),
            }
        }
        state.told = open.into_iter().map(|(_, told)| told).collect();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever held it did nothing but look and replace.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Each finding with how it is accepted at this moment.
fn standing(accepted: &[Acceptance], found: &[Found], now: Timestamp) -> Vec<Finding> {
    let finding = |Found { finding, evidence }: &Found| {
        let acceptance = accepted.iter().find(|acceptance| acceptance.finding == *finding);
        Finding {
            finding: (*finding).to_owned(),
            evidence: evidence.clone(),
            accepted: match acceptance.map(|acceptance| acceptance.until.term(now)) {
                None => Accepted::No,
                Some(Term::Expired) => Accepted::Expired,
                // It was not too long at the start: this machine's clock was set back since.
                Some(Term::InForce | Term::TooLong) => Accepted::InForce,
            },
            until: acceptance.map(|acceptance| acceptance.until.to_string()),
            reason: acceptance.map(|acceptance| acceptance.reason.clone()),
            ends_soon: acceptance.is_some_and(|acceptance| acceptance.until.ends_soon(now)),
        }
    };
    found.iter().map(finding).collect()
}

/// When the acceptance of each finding ends, as long as it holds.
fn ends(accepted: &[Acceptance], found: &[Found], now: Timestamp) -> Vec<(&'static str, Timestamp)> {
    let end = |Found { finding, .. }: &Found| {
        let acceptance = accepted.iter().find(|acceptance| acceptance.finding == *finding)?;
        Some((*finding, acceptance.until.end().filter(|end| *end > now)?))
    };
    found.iter().filter_map(end).collect()
}

/// What is accepted, or until when, or why, and was not so before.
fn news(before: &[Acceptance], after: &[Acceptance]) -> Vec<Acceptance> {
    after.iter().filter(|acceptance| !before.contains(acceptance)).cloned().collect()
}

/// Tells what is accepted, until when, and why.
fn tell_accepted(acceptance: &Acceptance, found: &[Found], now: Timestamp) {
    let Acceptance { finding, until, reason } = acceptance;
    let is_found = found.iter().any(|found| found.finding == finding);
    if until.term(now) == Term::Expired {
        warn!(%finding, %until, "{finding} was accepted until {until}, and is not there any more: remove the [[doctor.accept]]");
        return;
    }
    warn!(event = "accepted", %finding, %until, %reason, found = is_found, "{finding} is accepted until {until}: {reason}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-27T20:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().expect("a time")
    }

    fn until(text: &str) -> Vec<Acceptance> {
        let until = Until::parse(text).expect("a date or a time");
        vec![Acceptance { finding: EVICTION.into(), until, reason: "staging".into() }]
    }

    fn evicts() -> Vec<Found> {
        Found::of_policy("allkeys-lru").into_iter().collect()
    }

    #[test]
    fn what_is_found_is_refused_unless_it_is_accepted_now() {
        let judged = |accepted: &[Acceptance], found: Option<&[Found]>| judged(accepted, found, now()).err();
        assert!(matches!(judged(&[], Some(&evicts())), Some(NotAccepted::Found { finding: "D1", .. })));
        assert_eq!(judged(&until("2026-12-01"), Some(&evicts())), None);
        assert!(matches!(judged(&until(NOW), Some(&evicts())), Some(NotAccepted::Expired { .. })));
        assert!(matches!(judged(&until("2027-03-01"), Some(&evicts())), Some(NotAccepted::TooLong { .. })));
        assert!(matches!(judged(&until("2027-03-01"), Some(&[])), Some(NotAccepted::TooLong { .. })));
    }

    #[test]
    fn an_acceptance_that_is_over_matters_unless_it_is_known_that_nothing_needs_it() {
        assert!(matches!(judged(&until(NOW), None, now()), Err(NotAccepted::Expired { .. })));
        assert_eq!(judged(&until(NOW), Some(&[]), now()), Ok(()));
        assert_eq!(judged(&[], None, now()), Ok(()), "it is looked at later");
    }

    #[test]
    fn only_what_a_reload_brings_must_be_in_force() {
        let (old, new) = (until("2001-01-01"), until("2001-01-02"));
        assert_eq!(Findings::may_follow(&old, &old), Ok(()), "it ran out meanwhile, and a password must be read");
        assert_eq!(Findings::may_follow(&old, &[]), Ok(()));
        assert!(matches!(Findings::may_follow(&old, &new), Err(NotAccepted::Expired { .. })));
        assert!(matches!(Findings::may_follow(&old, &until("2999-01-01")), Err(NotAccepted::TooLong { .. })));
    }

    #[test]
    fn a_finding_is_accepted_until_its_time_is_over() {
        let accepted_at = |accepted: &[Acceptance], at: &str| {
            standing(accepted, &evicts(), at.parse().expect("a time")).swap_remove(0).accepted
        };
        let accepted = until("2026-12-01T00:00:00Z");
        assert_eq!(accepted_at(&accepted, "2026-11-30T23:59:59Z"), Accepted::InForce);
        assert_eq!(accepted_at(&accepted, "2026-12-01T00:00:00Z"), Accepted::Expired);
        assert_eq!(accepted_at(&accepted, "2025-12-01T00:00:00Z"), Accepted::InForce, "the clock was set back");
        assert_eq!(accepted_at(&[], NOW), Accepted::No);
        assert_eq!(standing(&accepted, &[], now()), []);
    }

    #[test]
    fn each_sentence_has_the_next_step() {
        let told = |accepted: &[Acceptance]| judged(accepted, Some(&evicts()), now()).expect_err("refused").to_string();
        assert!(told(&[]).contains("set maxmemory-policy to noeviction") && told(&[]).contains("[[doctor.accept]]"));
        let expired = told(&until("2026-11-26"));
        assert!(
            expired.contains("until 2026-11-26 (staging)") && expired.contains("2027-02-25 at the latest"),
            "{expired}"
        );
        let long = told(&until("2027-03-01"));
        assert!(long.contains("until 2027-03-01") && long.ends_with("write 2027-02-25 at the latest"), "{long}");
    }
}
