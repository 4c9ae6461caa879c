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
use jiff::{Timestamp, tz::TimeZone};
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
    /// Everything else, as PostgreSQL reads it. Days and moments are ordered as their texts.
    Text(Cow<'a, str>),
}

impl<'a> Datum<'a> {
    /// The number, if it is one.
    pub fn number(self) -> Option<i64> {
        match self {
            Datum::Number(number) => Some(number),
            Datum::Text(_) => None,
        }
    }

    /// As text.
    pub fn text(self) -> Option<Cow<'a, str>> {
        Some(match self {
            Datum::Number(number) => Cow::Owned(number.to_string()),
            Datum::Text(text) => text,
        })
    }

    /// As a decimal number, if it is one.
    pub fn decimal(&self) -> Option<BigDecimal> {
        match self {
            Datum::Number(number) => Some((*number).into()),
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
        Kind::Timestamptz => moment(text).and_then(|moment| owned(spell(moment))),
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
pub(crate) fn moment(text: &str) -> Result<Timestamp, String> {
    let refused = || {
        "is no moment of the years 1 to 9999: RFC 3339, such as 2026-11-27T08:00:00Z, or milliseconds since 1970"
            .to_owned()
    };
    let moment = match parse_amount(text.as_bytes()) {
        Ok(ms) => Timestamp::from_millisecond(ms).ok(),
        Err(_) => text.parse().ok(),
    };
    moment.filter(|moment| (1..=9999).contains(&moment.to_zoned(TimeZone::UTC).year())).ok_or_else(refused)
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

    /// The stretch that a moment lies in: how its beginning is spelled, and from when until when it lasts. None where the years end.
    pub(crate) fn stretch(&self, moment: Timestamp) -> Option<(String, std::ops::Range<Timestamp>)> {
        let local = moment.to_zoned(self.zone.clone());
        let round = |unit| {
            let rounding = jiff::ZonedRound::new().smallest(unit).mode(jiff::RoundMode::Trunc);
            local.round(rounding).ok()
        };
        let (first, next) = match self.unit {
            Unit::Minute | Unit::Hour => {
                let (unit, seconds) =
                    if self.unit == Unit::Hour { (jiff::Unit::Hour, 3600) } else { (jiff::Unit::Minute, 60) };
                let first = round(unit)?.timestamp();
                let next = first.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()?;
                return Some((spell(first), first..next));
            }
            Unit::Day => (local.date(), local.date().checked_add(jiff::Span::new().days(1)).ok()?),
            Unit::Week => {
                let back = i64::from(local.date().weekday().to_monday_zero_offset());
                let first = local.date().checked_sub(jiff::Span::new().days(back)).ok()?;
                (first, first.checked_add(jiff::Span::new().weeks(1)).ok()?)
            }
            Unit::Month => (local.date().first_of_month(), local.date().last_of_month().tomorrow().ok()?),
        };
        let begins = |day: civil::Date| day.to_zoned(self.zone.clone()).ok().map(|moment| moment.timestamp());
        Some((first.to_string(), begins(first)?..begins(next)?))
    }
}
