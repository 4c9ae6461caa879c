//! JSON: an object's members, and whether PostgreSQL takes it as a `jsonb`. Pure.
//!
//! Takes the text of a field; gives its members with each value as it was written, so that no digit of a number is lost. Fails with the end of a sentence
//! that begins with the field's name. What is accepted here PostgreSQL reads too: it refuses NUL and halves of surrogate pairs, and numbers beyond the
//! range of a `numeric`, which JSON's grammar allows.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The most objects and arrays inside each other.
const MAX_DEPTH: usize = 100;
/// The most digits of a number, and the highest exponent.
const MAX_DIGITS: usize = 1000;

/// An object's members in the order in which they stand: names decoded, values as they were written.
pub(crate) fn members(text: &str) -> Result<Vec<(String, &str)>, String> {
    struct Members;
    impl<'t> Visitor<'t> for Members {
        type Value = Vec<(String, &'t str)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'t>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut members = Vec::new();
            while let Some((name, value)) = map.next_entry::<String, &'t RawValue>()? {
                members.push((name, value.get()));
            }
            Ok(members)
        }
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let members = deserializer.deserialize_map(Members).and_then(|members| deserializer.end().map(|()| members));
    members.map_err(|_| "is no JSON object".into())
}

/// Makes sure that PostgreSQL can hold this as a `jsonb`, and that no name stands in it twice on the first level.
pub(crate) fn check_object(text: &str) -> Result<(), String> {
    let members = members(text)?;
    scan(text)?;
    let mut names = HashSet::with_capacity(members.len());
    match members.into_iter().all(|(name, _)| names.insert(name)) {
        true => Ok(()),
        false => Err("is a JSON object that has one name twice".into()),
    }
}

/// Looks at the strings, the numbers and the depth of what is JSON.
fn scan(text: &str) -> Result<(), String> {
    let (bytes, mut at, mut depth) = (text.as_bytes(), 0, 0);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = string(bytes, at + 1)?,
            b'-' | b'0'..=b'9' => at = number(bytes, at)?,
            b'{' | b'[' if depth == MAX_DEPTH => {
                return Err(format!("is JSON with more than {MAX_DEPTH} levels"));
            }
            b'{' | b'[' => (depth, at) = (depth + 1, at + 1),
            b'}' | b']' => (depth, at) = (usize::saturating_sub(depth, 1), at + 1),
            _ => at += 1,
        }
    }
    Ok(())
}

/// Where a string ends whose first character stands here.
fn string(bytes: &[u8], mut at: usize) -> Result<usize, String> {
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    loop {
        match bytes.get(at) {
            None => return Ok(at),
            Some(b'"') => return Ok(at + 1),
            Some(b'\\') => match (unit(at), unit(at + 6)) {
                (Some(0), _) => return Err("is JSON with a NUL, which no jsonb can hold".into()),
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => at += 12,
                (Some(0xd800..=0xdfff), _) => return Err("is JSON with half of a surrogate pair".into()),
                (Some(_), _) => at += 6,
                (None, _) => at += 2,
            },
            Some(_) => at += 1,
        }
    }
}

/// Where a number ends that begins here.
fn number(bytes: &[u8], start: usize) -> Result<usize, String> {
    let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
    let length = bytes[start..].iter().take_while(|byte| is_part(byte)).count();
    let text = std::str::from_utf8(&bytes[start..start + length]).unwrap_or_default();
    let (digits, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let is_small = exponent.parse::<i64>().is_ok_and(|exponent| exponent.unsigned_abs() <= MAX_DIGITS as u64);
    match digits.len() <= MAX_DIGITS && is_small {
        true => Ok(start + length),
        false => Err(format!("is JSON with a number of more than {MAX_DIGITS} digits")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_object_keeps_its_values_as_they_were_written() {
        let text = r#" {"a": 1.10, "\u0062": {"x": [1e3, null]}, "": "é\n"} "#;
        let got = members(text).expect("an object");
        let want = [("a", "1.10"), ("b", r#"{"x": [1e3, null]}"#), ("", r#""é\n""#)];
        assert_eq!(got.iter().map(|(name, value)| (name.as_str(), *value)).collect::<Vec<_>>(), want);
    }

    #[test]
    fn what_no_jsonb_can_hold_has_a_reason() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(100), "]".repeat(100));
        for (bad, why) in [
            ("", "no JSON object"),
            ("[1]", "no JSON object"),
            ("null", "no JSON object"),
            ("{} {}", "no JSON object"),
            ("{\"a\":1,}", "no JSON object"),
            ("{\"a\":NaN}", "no JSON object"),
            ("{\"a\":01}", "no JSON object"),
            ("{\"a\":\"\t\"}", "no JSON object"),
            (r#"{"a":1,"\u0061":2}"#, "twice"),
            (r#"{"a":["\u0000"]}"#, "NUL"),
            (r#"{"\u0000":1}"#, "NUL"),
            (r#"{"a":"\ud83d"}"#, "surrogate"),
            (r#"{"a":"\ud83dx\ude00"}"#, "surrogate"),
            (r#"{"a":"\ude00"}"#, "surrogate"),
            (r#"{"a":1e1001}"#, "digits"),
            (r#"{"a":[-1e-99999999999999999999]}"#, "digits"),
            (&format!("{{\"a\":{}}}", "9".repeat(1001)), "digits"),
            (&deep, "levels"),
        ] {
            let said = check_object(bad);
            assert!(said.as_ref().is_err_and(|said| said.contains(why)), "{bad}: {said:?}");
        }
        for good in
            ["{}", r#"{"a":"\\u0000"}"#, r#"{"a":"\ud83d\ude00"}"#, r#"{"a":{"b":1,"b":2}}"#, r#"{"a":-1.5E+1000}"#]
        {
            assert_eq!(check_object(good), Ok(()), "{good}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r#"(\{|\}|\[|\]|"|\\|\\u|d83d|0|1e|-|,|:|a|é| ){0,40}"#) {
            let _ = check_object(&text);
            let _ = scan(&text);
        }
    }
}
