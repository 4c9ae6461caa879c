//! Datum: a field's bytes, read as the kind that the pipeline says, in the one spelling that stands for each value. Pure.
//!
//! Two data are the same text or number exactly when PostgreSQL takes them for equal, so entries can be folded without asking it. What has no such
//! spelling here (text for a column of another type, another collation) PostgreSQL reads and groups itself. It fails only with a reason: no bytes make it
//! panic.

use std::borrow::Cow;
use std::net::IpAddr;
use std::str::FromStr;

use bigdecimal::BigDecimal;
use jiff::civil;
use jiff::{Timestamp, TimestampRound, tz::TimeZone};
use uuid::Uuid;

use super::json;
use super::row::parse_amount;
use super::target::{Kind, Unit};

/// The most digits of a decimal number, before and behind the point together.
const MAX_DIGITS: usize = 1000;

/// A value in its one spelling.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Datum<'a> {
    /// A whole number.
    Number(i64),
    /// A moment, to the microsecond. It is spelled only where it is sent or compared.
    Moment(Timestamp),
    /// Everything else, as PostgreSQL reads it. Days and moments are ordered as their texts.
    Text(Cow<'a, str>),
}

impl<'a> Datum<'a> {
    /// The number, if it is one.
    pub fn number(self) -> Option<i64> {
        match self {
            Datum::Number(number) => Some(number),
            Datum::Moment(_) | Datum::Text(_) => None,
        }
    }

    /// As text.
    pub fn text(self) -> Option<Cow<'a, str>> {
        Some(match self {
            Datum::Number(number) => Cow::Owned(number.to_string()),
            Datum::Moment(moment) => Cow::Owned(spell(moment)),
            Datum::Text(text) => text,
        })
    }

    /// As a decimal number, if it is one.
    pub fn decimal(&self) -> Option<BigDecimal> {
        match self {
            Datum::Number(number) => Some((*number).into()),
            Datum::Moment(_) => None,
            Datum::Text(text) => BigDecimal::from_str(text).ok(),
        }
    }
}

/// Reads a field's bytes. The error ends a sentence that begins with the field's name.
pub fn read<'a>(kind: Kind, bytes: &'a [u8]) -> Result<Datum<'a>, String> {
    match kind {
        Kind::Bytea => return Ok(Datum::Text(Cow::Owned(hex(bytes)))),
        Kind::Bigint => {
            return parse_amount(bytes).map(Datum::Number).map_err(|_| "is no whole number of 64 bits".into());
        }
        _ => {}
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8 text".to_owned())?;
    let owned = |text: String| Ok(Datum::Text(Cow::Owned(text)));
    let word = |text: &'static str| Ok(Datum::Text(Cow::Borrowed(text)));
    match kind {
        Kind::Text if text.contains('\0') => Err("has a NUL, which no text of PostgreSQL can hold".into()),
        Kind::Text => Ok(Datum::Text(Cow::Borrowed(text))),
        Kind::Jsonb => json::check_object(text).map(|()| Datum::Text(Cow::Borrowed(text))),
        Kind::Numeric(scale) => decimal(text, scale).map(|text| Datum::Text(Cow::Owned(text))),
        Kind::Uuid => match Uuid::try_parse(text) {
            Ok(uuid) => owned(uuid.hyphenated().to_string()),
            Err(_) => Err("is no uuid".into()),
        },
        Kind::Date => day(text).and_then(|day| owned(day.to_string())),
        Kind::Timestamptz => moment(text).map(Datum::Moment),
        Kind::Boolean => match text.to_ascii_lowercase().as_str() {
            "true" | "t" | "yes" | "y" | "on" | "1" => word("true"),
            "false" | "f" | "no" | "n" | "off" | "0" => word("false"),
            _ => Err("is neither true nor false".into()),
        },
        Kind::Inet => address(text).and_then(owned),
        Kind::Bytea | Kind::Bigint => Err("is read elsewhere".into()),
    }
}

/// As `\x…`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("\\x");
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// Digits with an optional minus and an optional point, without zeros that say nothing.
fn decimal(text: &str, scale: Option<u16>) -> Result<String, String> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() && fraction.is_empty() || !are_digits(whole) || !are_digits(fraction) {
        return Err("is no decimal number, such as -12.50".into());
    }
    if whole.len() + fraction.len() > MAX_DIGITS {
        return Err(format!("has more than {MAX_DIGITS} digits"));
    }
    let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
    if let Some(scale) = scale.filter(|scale| fraction.len() > usize::from(*scale)) {
        return Err(format!("has more than {scale} digits behind the point"));
    }
    Ok(match (whole, fraction) {
        ("", "") => "0".into(),
        (whole, "") => format!("{sign}{whole}"),
        ("", fraction) => format!("{sign}0.{fraction}"),
        (whole, fraction) => format!("{sign}{whole}.{fraction}"),
    })
}

fn day(text: &str) -> Result<civil::Date, String> {
    let is_plain = text.len() == 10 && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    let day = text.parse::<civil::Date>().ok().filter(|day| is_plain && day.year() > 0);
    day.ok_or_else(|| "is no day of the years 1 to 9999, such as 2026-11-27".into())
}

/// The moment that a field's text is: RFC 3339, or milliseconds since 1970. What is finer than a microsecond is cut off.
fn moment(text: &str) -> Result<Timestamp, String> {
    let refused = || {
        "is no moment of the years 1 to 9999: RFC 3339, such as 2026-11-27T08:00:00Z, or milliseconds since 1970"
            .to_owned()
    };
    let moment = match parse_amount(text.as_bytes()) {
        Ok(ms) => Timestamp::from_millisecond(ms).ok(),
        Err(_) => text.parse().ok(),
    };
    let moment = moment.filter(|moment| (1..=9999).contains(&moment.to_zoned(TimeZone::UTC).year()));
    let to_microseconds = TimestampRound::new().smallest(jiff::Unit::Microsecond).mode(jiff::RoundMode::Floor);
    moment.and_then(|moment| moment.round(to_microseconds).ok()).ok_or_else(refused)
}

/// A moment in UTC, to the microsecond, always as long.
pub(crate) fn spell(moment: Timestamp) -> String {
    moment.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

fn address(text: &str) -> Result<String, String> {
    let refused = || "is no address, such as 192.0.2.7 or 2001:db8::/32".to_owned();
    let (host, length) = text.split_once('/').map_or((text, None), |(host, length)| (host, Some(length)));
    let host: IpAddr = host.parse().map_err(|_| refused())?;
    let most = if host.is_ipv4() { 32 } else { 128 };
    let length = match length {
        Some(length) if !length.bytes().all(|byte| byte.is_ascii_digit()) => return Err(refused()),
        Some(length) => length.parse::<u8>().ok().filter(|length| *length <= most).ok_or_else(refused)?,
        None => most,
    };
    Ok(if length == most { host.to_string() } else { format!("{host}/{length}") })
}

/// The beginnings of stretches of time in one zone.
#[derive(Debug, Clone)]
pub struct Calendar {
    unit: Unit,
    zone: TimeZone,
}

impl Calendar {
    /// The stretches of this zone, by its IANA name. None: there is no such zone.
    pub fn of(unit: Unit, zone: &str) -> Option<Calendar> {
        Some(Calendar { unit, zone: TimeZone::get(zone).ok()? })
    }

    /// The stretch that a moment lies in: how its beginning is spelled, and for which moments around this one the answer is the same. None where the years
    /// end. An hour is one on the clock that the zone has at the moment, as `date_trunc(…, moment, zone)` sees it; a day is the date that its clock shows.
    pub fn stretch(&self, moment: Timestamp) -> Option<(String, std::ops::Range<Timestamp>)> {
        let offset = self.zone.to_offset(moment);
        let local = offset.to_datetime(moment);
        let (first, next) = match self.unit {
            Unit::Minute | Unit::Hour => {
                let minute = if self.unit == Unit::Hour { 0 } else { local.minute() };
                let first = local.date().at(local.hour(), minute, 0, 0);
                let seconds = if self.unit == Unit::Hour { 3600 } else { 60 };
                (first, first.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()?)
            }
            Unit::Day => (local.date().into(), local.date().tomorrow().ok()?.into()),
            Unit::Week => {
                let back = i64::from(local.date().weekday().to_monday_zero_offset());
                let first = local.date().checked_sub(jiff::Span::new().days(back)).ok()?;
                (first.into(), first.checked_add(jiff::Span::new().weeks(1)).ok()?.into())
            }
            Unit::Month => (local.date().first_of_month().into(), local.date().last_of_month().tomorrow().ok()?.into()),
        };
        let begins = |local: civil::DateTime| offset.to_timestamp(local).ok();
        let (spelled, mut within) = (begins(first)?, begins(first)?..begins(next)?);
        // Where the zone's clock is set, the answer may change, and back: a day may even begin twice.
        if let Some(change) = self.zone.preceding(moment.checked_add(jiff::SignedDuration::from_nanos(1)).ok()?).next()
        {
            within.start = within.start.max(change.timestamp());
        }
        if let Some(change) = self.zone.following(moment).next() {
            within.end = within.end.min(change.timestamp());
        }
        let text = match self.unit.kind() {
            Kind::Timestamptz => spell(spelled),
            _ => first.date().to_string(),
        };
        // PostgreSQL has no year 0, and spells those before it in another way.
        (first.year() > 0 && spelled.to_zoned(TimeZone::UTC).year() > 0).then_some((text, within))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [Kind; 10] = [
        Kind::Text,
        Kind::Bigint,
        Kind::Numeric(None),
        Kind::Uuid,
        Kind::Date,
        Kind::Timestamptz,
        Kind::Boolean,
        Kind::Bytea,
        Kind::Inet,
        Kind::Jsonb,
    ];

    fn spelled(kind: Kind, text: &str) -> String {
        match read(kind, text.as_bytes()) {
            Ok(datum) => datum.text().unwrap_or_default().into_owned(),
            Err(why) => format!("! {why}"),
        }
    }

    #[test]
    fn a_value_has_one_spelling() {
        for (kind, texts, one) in [
            (Kind::Bigint, &["7", "007"][..], "7"),
            (Kind::Bigint, &["0", "-0"], "0"),
            (Kind::Numeric(None), &["1.50", "01.5", "1.500"], "1.5"),
            (Kind::Numeric(Some(2)), &["-0", "0.000", ".0", "0."], "0"),
            (Kind::Uuid, &["6BA7B8109DAD11D180B400C04FD430C8"], "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
            (Kind::Timestamptz, &["2026-11-27T09:00:00+01:00", "1795766400000"], "2026-11-27T08:00:00.000000Z"),
            (Kind::Timestamptz, &["0001-01-01T00:00:00Z"], "0001-01-01T00:00:00.000000Z"),
            (Kind::Timestamptz, &["1969-12-31T23:59:59.9999999Z"], "1969-12-31T23:59:59.999999Z"),
            (Kind::Boolean, &["TRUE", "t", "1", "On"], "true"),
            (Kind::Bytea, &["a\\"], "\\x615c"),
            (Kind::Inet, &["192.0.2.7", "192.0.2.7/32"], "192.0.2.7"),
            (Kind::Inet, &["2001:DB8:0:0::1", "2001:db8::1/128"], "2001:db8::1"),
        ] {
            for text in texts {
                assert_eq!(spelled(kind, text), one, "{kind} {text}");
            }
        }
    }

    #[test]
    fn what_is_none_of_its_kind_has_a_reason() {
        for (kind, bad) in [
            (Kind::Text, "a\0"),
            (Kind::Bigint, "9223372036854775808"),
            (Kind::Numeric(None), "NaN"),
            (Kind::Numeric(None), "1e5"),
            (Kind::Numeric(None), "."),
            (Kind::Numeric(Some(2)), "1.001"),
            (Kind::Uuid, "6ba7b810"),
            (Kind::Date, "2026-02-29"),
            (Kind::Date, "0000-01-01"),
            (Kind::Date, "2026-1-01"),
            (Kind::Timestamptz, "infinity"),
            (Kind::Timestamptz, "2026-11-27T08:00:00"),
            (Kind::Timestamptz, "9223372036854775807"),
            (Kind::Boolean, "2"),
            (Kind::Inet, "192.0.2.7/33"),
            (Kind::Inet, "192.0.2.7/+8"),
            (Kind::Inet, "fe80::1%eth0"),
            (Kind::Inet, "192.0.2"),
            (Kind::Jsonb, "[]"),
        ] {
            assert!(spelled(kind, bad).starts_with("! "), "{kind} {bad}: {}", spelled(kind, bad));
        }
    }

    #[test]
    fn a_stretch_begins_when_the_clocks_of_its_zone_say_so() {
        for (unit, zone, moment, begins) in [
            // A day of 23 hours and one of 25.
            (Unit::Day, "Europe/Berlin", "2026-03-29T21:59:59Z", "2026-03-29"),
            (Unit::Day, "Europe/Berlin", "2026-10-24T22:00:00Z", "2026-10-25"),
            (Unit::Day, "Europe/Berlin", "2026-10-25T22:59:59Z", "2026-10-25"),
            // An hour that comes twice is two hours.
            (Unit::Hour, "Europe/Berlin", "2026-10-25T00:30:00Z", "2026-10-25T00:00:00.000000Z"),
            (Unit::Hour, "Europe/Berlin", "2026-10-25T01:30:00Z", "2026-10-25T01:00:00.000000Z"),
            // A day without a midnight, and a day that begins twice: one minute after midnight the clocks were set back.
            (Unit::Day, "America/Sao_Paulo", "2018-11-04T03:00:00Z", "2018-11-04"),
            (Unit::Day, "America/St_Johns", "2006-10-29T02:30:30Z", "2006-10-29"),
            (Unit::Day, "America/St_Johns", "2006-10-29T02:31:30Z", "2006-10-28"),
            (Unit::Day, "America/St_Johns", "2006-10-29T03:30:00Z", "2006-10-29"),
            // Half an hour beside UTC, and half an hour of summer time.
            (Unit::Hour, "Asia/Kolkata", "2026-01-01T00:29:59Z", "2025-12-31T23:30:00.000000Z"),
            (Unit::Hour, "Australia/Lord_Howe", "2026-04-04T14:45:00Z", "2026-04-04T14:00:00.000000Z"),
            (Unit::Hour, "Australia/Lord_Howe", "2026-04-04T15:10:00Z", "2026-04-04T14:30:00.000000Z"),
            (Unit::Minute, "UTC", "1969-12-31T23:59:59.999999Z", "1969-12-31T23:59:00.000000Z"),
            (Unit::Week, "UTC", "2026-01-01T00:00:00Z", "2025-12-29"),
            (Unit::Month, "UTC", "2024-02-29T23:59:59Z", "2024-02-01"),
            (Unit::Month, "Asia/Kolkata", "2026-12-31T18:30:00Z", "2027-01-01"),
        ] {
            let calendar = Calendar::of(unit, zone).expect("a zone");
            let moment: Timestamp = moment.parse().expect("a moment");
            let (text, within) = calendar.stretch(moment).expect("a stretch");
            assert_eq!((text.as_str(), within.contains(&moment)), (begins, true), "{unit} of {moment} in {zone}");
        }
        let west = Calendar::of(Unit::Day, "America/New_York").expect("a zone");
        assert_eq!(west.stretch("0001-01-01T00:00:00Z".parse().expect("a moment")), None, "PostgreSQL has no year 0");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), text in "[-+0-9.:TZe/{}a-f ]{0,30}") {
            for kind in KINDS.into_iter().chain([Kind::Numeric(Some(3))]) {
                let _ = read(kind, &bytes);
                let _ = read(kind, text.as_bytes());
            }
        }

        #[test]
        fn no_moment_makes_a_calendar_panic(ms in any::<i64>(), near in -62_200_000_000_000i64..253_500_000_000_000) {
            for ms in [ms, near] {
                let Ok(moment) = Timestamp::from_millisecond(ms) else { continue };
                for unit in [Unit::Minute, Unit::Hour, Unit::Day, Unit::Week, Unit::Month] {
                    for zone in ["UTC", "Pacific/Kiritimati", "America/St_Johns"] {
                        if let Some((_, within)) = Calendar::of(unit, zone).expect("a zone").stretch(moment) {
                            prop_assert!(within.contains(&moment));
                        }
                    }
                }
            }
        }

        #[test]
        fn the_one_spelling_is_read_as_itself(whole in -1_000i64..1_000, zeros in 0usize..3, ms in any::<i32>()) {
            for (kind, text) in [
                (Kind::Bigint, whole.to_string()),
                (Kind::Numeric(None), format!("{whole}.50{}", "0".repeat(zeros))),
                (Kind::Timestamptz, (i64::from(ms) * 1_000).to_string()),
            ] {
                let once = spelled(kind, &text);
                prop_assert_eq!(&spelled(kind, &once), &once);
            }
        }
    }
}
