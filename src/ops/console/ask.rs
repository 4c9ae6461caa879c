//! Ask: what a request asks for: the words behind `?`, and the body of a change.
//!
//! Takes text from outside; gives typed values within limits. Fails with a sentence for whoever wrote the request; an unknown name is refused, so
//! that no misspelt filter means everything.

use std::str::FromStr;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::answer::Refused;
use crate::ops::columns::{cut, printable};
use crate::ops::dead::select::{Filter, Moment, Piece, State, Which};

/// How many rows an answer has where nothing is said, and at the most.
const ROWS: (u32, u32) = (50, 500);
/// The farthest row that can be asked for.
const MAX_SKIP: u32 = 1_000_000;
/// So many letters can be named at once.
const MAX_NAMED: usize = 1_000;

/// The words behind `?`, each used once.
pub(super) struct Words(Vec<(String, String)>);

impl Words {
    pub(super) fn of(query: Option<&str>) -> Words {
        Words(url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect())
    }

    /// All values of this name; empty ones are none.
    pub(super) fn all(&mut self, name: &str) -> Vec<String> {
        let (found, others) = std::mem::take(&mut self.0).into_iter().partition(|(is, _)| is == name);
        self.0 = others;
        let found: Vec<(String, String)> = found;
        found.into_iter().map(|(_, value)| value).filter(|value| !value.is_empty()).collect()
    }

    /// The value of this name, where there is one.
    pub(super) fn one(&mut self, name: &str) -> Result<Option<String>, Refused> {
        let mut all = self.all(name);
        match all.len() {
            0 | 1 => Ok(all.pop()),
            _ => Err(Refused::bad(format!("{name} is there more than once"))),
        }
    }

    /// The same, as something that can be read.
    pub(super) fn parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> Result<Option<T>, Refused> {
        let value = self.one(name)?;
        value.map(|value| value.parse().map_err(|why| Refused::bad(format!("{name}: {why}")))).transpose()
    }

    /// Which rows.
    pub(super) fn piece(&mut self) -> Result<Piece, Refused> {
        let skip = self.parsed("skip")?.unwrap_or(0);
        let limit = self.parsed("limit")?.unwrap_or(ROWS.0);
        if skip > MAX_SKIP || !(1..=ROWS.1).contains(&limit) {
            return Err(Refused::bad(format!("limit is from 1 to {}, skip at most {MAX_SKIP}", ROWS.1)));
        }
        Ok(Piece { skip, limit })
    }

    /// Which letters, in which state.
    pub(super) fn letters(&mut self) -> Result<(Filter, State), Refused> {
        let state = self.one("state")?;
        let state = state.map(|word| clap::ValueEnum::from_str(&word, false).map_err(Refused::bad)).transpose()?;
        let named = Named {
            ids: self.all("id"),
            pipelines: self.all("pipeline"),
            streams: self.all("stream"),
            reasons: self.all("reason"),
            key: self.one("key")?,
            since: self.one("since")?,
            until: self.one("until")?,
        };
        Ok((named.filter()?, state.unwrap_or_default()))
    }

    /// Nothing else was asked for.
    pub(super) fn end(self) -> Result<(), Refused> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(Refused::bad(format!("{:?} cannot be asked for here", cut(name, 40)))),
        }
    }
}

/// Letters, as a request names them.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Named {
    ids: Vec<String>,
    pipelines: Vec<String>,
    streams: Vec<String>,
    reasons: Vec<String>,
    key: Option<String>,
    since: Option<String>,
    until: Option<String>,
}

impl Named {
    pub(super) fn filter(self) -> Result<Filter, Refused> {
        if self.ids.len() > MAX_NAMED {
            return Err(Refused::bad(format!("{MAX_NAMED} letters can be named at once")));
        }
        let ids: Result<Vec<Which>, String> = self.ids.iter().map(|id| id.parse()).collect();
        let moment = |text: Option<String>| text.map(|text| text.parse::<Moment>()).transpose().map_err(Refused::bad);
        Ok(Filter {
            ids: ids.map_err(Refused::bad)?,
            pipelines: self.pipelines,
            streams: self.streams,
            reasons: self.reasons,
            key: self.key,
            since: moment(self.since)?,
            until: moment(self.until)?,
        })
    }
}

/// The body of a change.
pub(super) fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refused> {
    serde_json::from_slice(bytes).map_err(|error| Refused::bad(format!("the body cannot be read: {error}")))
}

/// Who makes a change, as it is noted: the token is shared, so the name is what somebody says.
pub(super) fn operator(name: Option<&str>) -> String {
    match name.map(str::trim) {
        None | Some("") => "console".into(),
        Some(name) => format!("{} (console)", cut(&printable(name), 60)),
    }
}

/// Text that somebody gives as a reason, within a limit.
pub(super) fn reason(text: Option<&str>) -> Option<String> {
    text.map(str::trim).filter(|text| !text.is_empty()).map(|text| cut(text, 500))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_asked_is_read_within_limits_and_an_unknown_name_is_refused() {
        let mut words = Words::of(Some(
            "id=1-1&id=2-2/00000000000000ff&reason=bad_amount&key=a%26b&since=1h&state=all&skip=7&limit=9",
        ));
        assert_eq!(words.piece(), Ok(Piece { skip: 7, limit: 9 }));
        let (filter, state) = words.letters().expect("letters");
        assert_eq!((filter.ids.len(), filter.key.as_deref(), state), (2, Some("a&b"), State::All));
        assert_eq!(words.end(), Ok(()));
        for bad in ["limit=0", "limit=501", "skip=1000001", "skip=-1", "limit=1&limit=2"] {
            assert!(Words::of(Some(bad)).piece().is_err(), "{bad}");
        }
        for bad in ["id=x", "since=soon", "state=some"] {
            assert!(Words::of(Some(bad)).letters().is_err(), "{bad}");
        }
        assert!(Words::of(Some("resaon=x")).end().is_err());
        assert!(body::<Named>(br#"{"reason": ["x"]}"#).is_err(), "a misspelt name means nothing, and not everything");
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(query in ".{0,200}") {
            let mut words = Words::of(Some(&query));
            let _ = (words.piece(), words.letters(), words.end());
        }

        #[test]
        fn no_name_breaks_a_line(name in ".{0,200}") {
            prop_assert!(!operator(Some(&name)).chars().any(char::is_control));
        }
    }
}
