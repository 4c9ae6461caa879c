//! Parse: the texts `keys` and `values` of the configuration. Pure.
//!
//! Takes such a text; gives columns. Fails with the end of a sentence that begins with the key's name and says what to write. What is printed of a column is read
//! back as the same column.

use super::{Field, Identifier, KeyColumn, Kind, Part, Unit, ValueColumn};
use crate::merge::Merge;

/// Reads the key columns. The error ends a sentence that begins with the key's name.
pub fn parse_keys(text: &str) -> Result<Vec<KeyColumn>, String> {
    items(text)?.into_iter().map(parse_key).collect()
}

/// Reads the value columns. The error ends a sentence that begins with the key's name.
pub fn parse_values(text: &str) -> Result<Vec<ValueColumn>, String> {
    items(text)?.into_iter().map(parse_value).collect()
}

/// The parts between commas, those in parentheses left together.
fn items(text: &str) -> Result<Vec<&str>, String> {
    let (mut depth, mut start, mut found) = (0usize, 0, Vec::new());
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => {
                depth = depth.checked_sub(1).ok_or_else(|| format!("has a ) too many behind {:?}", &text[start..at]))?
            }
            ',' if depth == 0 => {
                found.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if depth > 0 {
        return Err(format!("lacks a ) in {:?}", &text[start..]));
    }
    found.push(&text[start..]);
    // A comma behind the last one is no mistake.
    let found: Vec<&str> = found.into_iter().map(str::trim).collect();
    let (last, rest) = found.split_last().unwrap_or((&"", &[]));
    let wanted = if last.is_empty() && !rest.is_empty() { rest } else { &found[..] };
    match wanted.iter().any(|item| item.is_empty()) {
        true => Err("has nothing between two commas".into()),
        false => Ok(wanted.to_vec()),
    }
}

/// `column`, `column: type`, `column = field: type` or `column = unit(field, zone)`.
fn parse_key(item: &str) -> Result<KeyColumn, String> {
    let (column, source) = match item.split_once('=') {
        Some((column, source)) => (column.trim(), source.trim()),
        None => (item.split(':').next().unwrap_or_default().trim(), item),
    };
    let column = identifier(column, item)?;
    let part = match call(source) {
        Some((word, arguments)) if !source.contains(':') => {
            let unit = Unit::ALL.into_iter().find(|(known, _)| *known == word);
            let (_, unit) = unit.ok_or_else(|| {
                format!("has {word}() in {item:?}, which is no stretch of time: write minute, hour, day, week or month")
            })?;
            let mut arguments = arguments.split(',').map(str::trim);
            let field = arguments.next().filter(|field| !field.is_empty());
            let zone = arguments.next().filter(|zone| !zone.is_empty()).unwrap_or("UTC").to_owned();
            if arguments.next().is_some() {
                return Err(format!("has more than a field and a time zone in {item:?}"));
            }
            Part::Bucket { unit, field: field.map(|field| field_name(field, item)).transpose()?, zone }
        }
        _ => {
            let (name, kind) = typed(source, Kind::Text)?;
            if kind == Kind::Jsonb {
                return Err(format!("has a jsonb in {item:?}, which cannot be a key: write text"));
            }
            Part::Field(field_name(name, item)?, kind)
        }
    };
    Ok(KeyColumn { column, part })
}

/// `column = operator(field?: type) by version`.
fn parse_value(item: &str) -> Result<ValueColumn, String> {
    let shape =
        || format!("has {item:?}, which is no value: write column = operator(field), such as bytes = sum(bytes)");
    let (column, rest) = item.split_once('=').ok_or_else(shape)?;
    let column = identifier(column.trim(), item)?;
    let close = rest.rfind(')').ok_or_else(shape)?;
    let (source, by) = (rest[..=close].trim(), rest[close + 1..].trim());
    let by = match by.strip_prefix("by ") {
        Some(by) => Some(identifier(by.trim(), item)?),
        None if by.is_empty() => None,
        None => {
            return Err(format!(
                "has {by:?} behind the operator in {item:?}: write by and the column of the version, or nothing"
            ));
        }
    };
    let (word, argument) = call(source).ok_or_else(shape)?;
    let merge = Merge::parse(word).ok_or_else(|| {
        format!("has {word}() in {item:?}, which is no operator: write one of {}", Merge::words().join(", "))
    })?;
    let field = if argument.trim().is_empty() {
        None
    } else {
        let (name, kind) = typed(argument, merge.usual_kind())?;
        let (name, is_optional) = name.strip_suffix('?').map_or((name, false), |name| (name.trim(), true));
        // Entries that lack it are not counted.
        let is_optional = is_optional || merge == Merge::Count;
        Some(Field { name: field_name(name, item)?, kind, is_optional })
    };
    match (&field, merge) {
        (None, Merge::Count) => {}
        (None, _) => return Err(format!("has no field in {item:?}: write {word}(field)")),
        (Some(field), _) => merge.accepts(field.kind).map_err(|why| format!("has {item:?}: {why}"))?,
    }
    match (&by, merge.needs_version()) {
        (None, Some(holds)) => {
            return Err(format!("lacks a version in {item:?}: write {word}(…) by and a column of type {holds}"));
        }
        (Some(_), None) => return Err(format!("has a version in {item:?}, which {word} does not need: leave it out")),
        _ => {}
    }
    Ok(ValueColumn { column, merge, field, by })
}

/// `word(arguments)`.
fn call(source: &str) -> Option<(&str, &str)> {
    let (word, rest) = source.split_once('(')?;
    Some((word.trim(), rest.strip_suffix(')')?))
}

/// `name: type`, or `name` of the usual one.
fn typed(source: &str, usual: Kind) -> Result<(&str, Kind), String> {
    match source.split_once(':') {
        Some((name, word)) => Ok((name.trim(), Kind::parse(word.trim())?)),
        None => Ok((source.trim(), usual)),
    }
}

fn identifier(name: &str, item: &str) -> Result<Identifier, String> {
    Identifier::parse(name).map_err(|bad| format!("has no column in {item:?}: {bad}"))
}

/// Whether `keys` and `values` can name a field so.
pub(crate) fn is_field_name(name: &str) -> bool {
    let is_sound = !name.is_empty() && name.len() <= 512 && !name.contains(['(', ')', ',', '?', '=', ':']);
    is_sound && !name.contains(|c: char| c.is_control() || c.is_whitespace())
}

fn field_name(name: &str, item: &str) -> Result<String, String> {
    match is_field_name(name) {
        true => Ok(name.to_owned()),
        false => Err(format!(
            "has no field in {item:?}: write the name of the entry's field, without blanks, ( ) , ? = or :"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::listed;
    use super::*;
    use proptest::prelude::*;

    fn keys(text: &str) -> String {
        parse_keys(text).map_or_else(|why| format!("! {why}"), |keys| listed(&keys))
    }

    fn values(text: &str) -> String {
        parse_values(text).map_or_else(|why| format!("! {why}"), |values| listed(&values))
    }

    #[test]
    fn keys_are_fields_of_a_type_or_stretches_of_time() {
        assert_eq!(keys("id"), "id = id: text");
        assert_eq!(
            keys("tenant: uuid,\n day = day(at, Europe/Berlin),"),
            "tenant = tenant: uuid, day = day(at, Europe/Berlin)"
        );
        assert_eq!(keys("h=hour(), price = p: numeric(2)"), "h = hour(, UTC), price = p: numeric(2)");
        for (bad, why) in [
            ("", "nothing between"),
            ("a,,b", "nothing between"),
            ("a b", "no column"),
            ("a = fortnight(x)", "no stretch of time"),
            ("a: money", "no type of a field"),
            ("a: jsonb", "cannot be a key"),
            ("a = day(x, UTC, y)", "more than a field"),
            ("a = day(x", "lacks a )"),
            ("a)", "too many"),
            ("a: numeric(x)", "no number of digits"),
            ("a = x y", "no field"),
        ] {
            assert!(keys(bad).starts_with("! ") && keys(bad).contains(why), "{bad}: {}", keys(bad));
        }
    }

    #[test]
    fn values_are_operators_over_fields() {
        assert_eq!(
            values("n = count(), b = sum(bytes), m = max(at?: timestamptz), p = last(path) by pv"),
            "n = count(), b = sum(bytes: bigint), m = max(at?: timestamptz), p = last(path: text) by pv"
        );
        for (bad, why) in [
            ("b", "no value"),
            ("b = sum", "no value"),
            ("b = avg(x)", "no operator"),
            ("b = sum()", "no field"),
            ("b = sum(x: uuid)", "sum"),
            ("b = last(x)", "lacks a version"),
            ("b = sum(x) by v", "does not need"),
            ("b = sum(x) as v", "behind the operator"),
        ] {
            assert!(values(bad).starts_with("! ") && values(bad).contains(why), "{bad}: {}", values(bad));
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in "[a-z(),:=? 0-9]{0,60}|.{0,40}") {
            let _ = (parse_keys(&text), parse_values(&text));
        }

        #[test]
        fn what_is_printed_is_read_back(column in "[a-z_]{1,8}", field in "[a-z.-]{1,8}", kind in 0usize..9, unit in 0usize..5) {
            let typed = KeyColumn { column: Identifier::parse(&column).expect("valid"), part: Part::Field(field.clone(), Kind::ALL[kind].1) };
            let part = Part::Bucket { unit: Unit::ALL[unit].1, field: Some(field), zone: "UTC".into() };
            let bucket = KeyColumn { part, ..typed.clone() };
            let all = vec![typed, bucket];
            prop_assert_eq!(parse_keys(&listed(&all)), Ok(all));
        }
    }
}
