//! Accept: findings of the doctor with which the daemon may start for a while, by name.
//!
//! Takes `[[doctor.accept]]`; gives each [`Acceptance`], and its [`Term`] at a moment. Fails with a problem for a key that is missing, and
//! for a finding that is accepted twice. Pure: the moment is an argument, and whether the daemon starts is the service's to say.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::key::Section;
use super::pipelines::Named;
use super::problem::Problem;
use super::sections::Acceptance;
use super::settings::{Effective, Settings};

/// The findings that can be accepted: `tidegate run` refuses to start on them because data may be lost, although all of it would work.
pub const ACCEPTABLE: [&str; 1] = ["D1"];
/// The findings that keep `tidegate run` from starting in any case: nothing could be flushed, or not rightly.
pub const NEVER_ACCEPTED: [&str; 3] = ["D17", "D19", "D26"];
/// How far ahead of the start an acceptance may end.
pub const LONGEST_ACCEPTED: Duration = Duration::from_secs(90 * 86_400);
/// So long before an acceptance ends that is told: a weekend lies in it, and time to correct the cause on a working day.
pub const TOLD_BEFORE: Duration = Duration::from_secs(7 * 86_400);

/// Until when something is accepted: a moment, or the end of a day in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The end of this day, in UTC.
    Day(Date),
    /// This moment.
    Moment(Timestamp),
}

/// How an acceptance stands at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Term {
    /// It holds.
    InForce,
    /// It is over.
    Expired,
    /// It would hold for longer than anything is accepted.
    TooLong,
}

impl Until {
    /// Reads a date, or a time with its distance from UTC. None if the text is neither.
    pub fn parse(text: &str) -> Option<Until> {
        let day = || text.parse().ok().filter(|day: &Date| day.to_string() == text).map(Until::Day);
        let until = text.parse().ok().map(Until::Moment).or_else(day)?;
        // The end of the last day of all cannot be told.
        until.end().map(|_| until)
    }

    /// The first moment at which it is over.
    pub fn end(self) -> Option<Timestamp> {
        match self {
            Until::Day(day) => Some(day.tomorrow().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp()),
            Until::Moment(moment) => Some(moment),
        }
    }

    /// How long it still is until then; none if that is over.
    pub fn left(self, now: Timestamp) -> Option<Duration> {
        let left = self.end()?.duration_since(now);
        Duration::try_from(left).ok().filter(|left| !left.is_zero())
    }

    /// Whether it is soon over, and is not over yet.
    pub fn ends_soon(self, now: Timestamp) -> bool {
        self.left(now).is_some_and(|left| left <= TOLD_BEFORE)
    }

    /// How it stands. A day may be the ninetieth from now, whatever the hour.
    pub fn term(self, now: Timestamp) -> Term {
        let grace = if matches!(self, Until::Day(_)) { Duration::from_secs(86_400) } else { Duration::ZERO };
        match self.left(now) {
            None => Term::Expired,
            Some(left) if left > LONGEST_ACCEPTED + grace => Term::TooLong,
            Some(_) => Term::InForce,
        }
    }

    /// The last day that may be written now.
    pub fn last_day(now: Timestamp) -> Date {
        let last = now.checked_add(LONGEST_ACCEPTED).unwrap_or(now);
        last.to_zoned(TimeZone::UTC).date()
    }
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Until::Day(day) => day.fmt(f),
            Until::Moment(moment) => moment.fmt(f),
        }
    }
}

/// Whether this finding can be accepted. The error says what can, and why others cannot.
pub(super) fn check_finding(text: &str) -> Result<(), String> {
    if ACCEPTABLE.contains(&text) {
        return Ok(());
    }
    let meant = ACCEPTABLE.iter().find(|finding| finding.eq_ignore_ascii_case(text.trim()));
    let hint = meant.map(|finding| format!("did you mean {finding}? ")).unwrap_or_default();
    Err(format!(
        "{hint}write {}, the finding that can be accepted. {} keep `tidegate run` from starting in any case, for nothing could be flushed, or not \
         rightly: correct what they name. All others do not keep it from starting",
        ACCEPTABLE.join(" or "),
        NEVER_ACCEPTED.join(", "),
    ))
}

/// All acceptances. None if one of their values was refused or is missing.
pub(super) fn build_all(settings: &Settings, numbered: &Named) -> Option<Vec<Acceptance>> {
    numbered.keys().map(|number| build(settings, number)).collect()
}

fn build(settings: &Settings, number: &str) -> Option<Acceptance> {
    Acceptance::from_settings(settings, &Acceptance::PATH.replace("<n>", number))
}

/// A problem for each key that is missing, and for each finding that is accepted a second time.
pub(super) fn check(settings: &Settings, numbered: &Named) -> Vec<Problem> {
    let place = |number: &str| numbered.get(number).cloned().unwrap_or_default();
    let missing = |effective: &Effective| {
        let number = effective.path.split('.').nth(2).unwrap_or_default();
        Problem::invalid(place(number), format!("{} is missing; {}", effective.path, effective.key.kind.advice()))
    };
    let lacking = settings.missing().filter(|effective| effective.key.is_of_acceptances());
    let mut problems: Vec<Problem> = lacking.map(missing).collect();
    let mut met = Vec::new();
    for number in numbered.keys() {
        let Some(Acceptance { finding, .. }) = build(settings, number) else { continue };
        if met.contains(&finding) {
            let sentence = format!("doctor.accept.{number} accepts {finding} a second time; remove one of them");
            problems.push(Problem::invalid(place(number), sentence));
        }
        met.push(finding);
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn term(until: &str, now: &str) -> Term {
        Until::parse(until).expect("a date or a time").term(at(now))
    }

    #[test]
    fn a_day_lasts_to_its_end_in_utc_and_a_time_to_its_second() {
        assert_eq!(term("2027-01-31", "2027-01-31T23:59:59Z"), Term::InForce);
        assert_eq!(term("2027-01-31", "2027-02-01T00:00:00Z"), Term::Expired);
        assert_eq!(term("2027-01-31T18:00:00Z", "2027-01-31T17:59:59Z"), Term::InForce);
        assert_eq!(term("2027-01-31T18:00:00Z", "2027-01-31T18:00:00Z"), Term::Expired);
        assert_eq!(term("2027-01-31T18:00:00+02:00", "2027-01-31T16:00:00Z"), Term::Expired);
        let until = Until::parse("2027-01-31").expect("a date");
        assert_eq!(until.left(at("2027-01-31T23:00:00Z")), Some(Duration::from_secs(3600)));
    }

    #[test]
    fn nothing_is_accepted_for_more_than_ninety_days() {
        let now = "2026-11-27T20:00:00Z";
        assert_eq!(term("2027-02-25", now), Term::InForce);
        assert_eq!(term("2027-02-26", now), Term::TooLong);
        assert_eq!(term("2027-02-25T20:00:00Z", now), Term::InForce);
        assert_eq!(term("2027-02-25T20:00:01Z", now), Term::TooLong);
        assert_eq!(Until::last_day(at(now)).to_string(), "2027-02-25");
    }

    #[test]
    fn the_end_is_told_seven_days_before_by_the_clock_of_utc() {
        let soon = |until: &str, now: &str| Until::parse(until).expect("a date or a time").ends_soon(at(now));
        // A day ends at its end.
        assert!(!soon("2027-01-31", "2027-01-24T23:59:59Z"));
        assert!(soon("2027-01-31", "2027-01-25T00:00:00Z") && soon("2027-01-31", "2027-01-31T23:59:59Z"));
        assert!(!soon("2027-01-31", "2027-02-01T00:00:00Z"), "it is over");
        // Wherever the clock says it: 01:00 in Berlin is midnight in UTC, and 23:59 in New York is the next day there.
        assert!(soon("2027-01-31", "2027-01-25T01:00:00+01:00") && !soon("2027-01-31", "2027-01-25T00:59:59+01:00"));
        assert!(!soon("2027-01-31", "2027-01-31T23:59:59-05:00"), "it is over in UTC");
        assert!(soon("2027-01-31T18:00:00+02:00", "2027-01-24T16:00:00Z"));
        assert!(!soon("2027-01-31T18:00:00+02:00", "2027-01-24T15:59:59Z"));
    }

    #[test]
    fn a_time_without_its_distance_from_utc_is_refused_and_so_is_what_is_no_date() {
        for bad in
            ["", "soon", "2027-13-01", "2027-01-31T18:00:00", "31.01.2027", "2027-1-31", "20270131", "9999-12-31"]
        {
            assert_eq!(Until::parse(bad), None, "{bad}");
        }
        for (written, shown) in [("2027-01-31", "2027-01-31"), ("2027-01-31T18:00:00+02:00", "2027-01-31T16:00:00Z")] {
            assert_eq!(Until::parse(written).map(|until| until.to_string()).as_deref(), Some(shown));
        }
    }

    #[test]
    fn what_cannot_be_accepted_is_told_with_what_can_and_why() {
        assert_eq!(check_finding("D1"), Ok(()));
        for bad in ["D2", "D17", "D99", "", "eviction"] {
            let sentence = check_finding(bad).expect_err("refused");
            let tells = ["write D1, the finding", "D17, D19, D26 keep", "All others do not keep it from starting"];
            assert!(tells.iter().all(|words| sentence.contains(words)) && !sentence.contains("did you"), "{sentence}");
        }
        assert!(check_finding("d1").expect_err("refused").contains("did you mean D1?"));
    }

    proptest! {
        #[test]
        fn what_is_shown_of_an_end_reads_back_as_the_same(seconds in -60_000_000_000i64..200_000_000_000, is_day: bool) {
            let moment = Timestamp::from_second(seconds).expect("within its range");
            let until = match is_day {
                true => Until::Day(moment.to_zoned(TimeZone::UTC).date()),
                false => Until::Moment(moment),
            };
            prop_assert_eq!(Until::parse(&until.to_string()), Some(until));
        }
    }
}
