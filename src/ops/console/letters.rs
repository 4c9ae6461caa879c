//! Letters: dead letters in the console: found, shown, redriven, given up.
//!
//! Takes requests; does what `tidegate dead` does, with the same statements. The bytes of a letter are shown up to a limit.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Bytes as Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use super::actions::{What, result};
use super::answer::{Refused, document};
use super::ask::{Named, Words, body, operator, reason};
use super::{Console, Settings};
use crate::ops::Failure;
use crate::ops::dead::discard::{Change, To};
use crate::ops::dead::redrive::Again;
use crate::ops::dead::select::Filter;
use crate::ops::dead::show::{Bytes, LetterDetail};
use crate::ops::dead::{list as listed, show as shown};

/// PostgreSQL has so long for an answer.
const WITHIN: Duration = Duration::from_secs(8);
/// So many fields of a letter are shown, and so many bytes of each name and value.
const FIELDS: usize = 100;
const BYTES: usize = 8 << 10;

type Configured = Extension<Arc<Settings>>;

/// A change of letters, as a request describes it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Wanted {
    letters: Named,
    /// A filter that names none means all.
    all: bool,
    dry_run: bool,
    accept_doubt: bool,
    because: Option<String>,
    operator: Option<String>,
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    letter: &'a LetterDetail,
    /// Bytes and fields that are there and not shown; `tidegate dead show` has them all.
    left_out_bytes: usize,
    left_out_fields: usize,
}

/// `GET /api/dead`: letters, counted and listed.
pub(super) async fn list(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let (piece, (filter, state)) = (words.piece()?, words.letters()?);
    words.end()?;
    let found = listed::find(settings.config(), &settings.database, &filter, state, piece);
    Ok(document(&in_time(found).await?))
}

/// `GET /api/dead/letter?id=…`: one letter with its bytes.
pub(super) async fn show(Extension(settings): Configured, RawQuery(query): RawQuery) -> Result<Response, Refused> {
    let mut words = Words::of(query.as_deref());
    let (filter, _) = words.letters()?;
    words.end()?;
    if filter.ids.len() != 1 {
        return Err(Refused::bad("name one letter: id=ID or id=ID/DIGEST"));
    }
    let mut found = in_time(shown::find(settings.config(), &settings.database, &filter)).await?;
    let letters: Vec<Shown<'_>> = found.letters.iter_mut().map(shorten).collect();
    Ok(document(&serde_json::json!({ "letters": letters })))
}

fn shorten(letter: &mut LetterDetail) -> Shown<'_> {
    let left_out_fields = letter.fields.len().saturating_sub(FIELDS);
    letter.fields.truncate(FIELDS);
    let left_out_bytes = letter.fields.iter_mut().map(|field| cut(&mut field.name) + cut(&mut field.value)).sum();
    Shown { letter, left_out_bytes, left_out_fields }
}

fn cut(bytes: &mut Bytes) -> usize {
    let (text, each) = match bytes {
        Bytes::Text(text) => (text, 1),
        Bytes::Hex(text) => (text, 2),
    };
    let (before, end) = (text.len(), text.floor_char_boundary(BYTES * each));
    text.truncate(end);
    (before - text.len()) / each
}

async fn in_time<T>(found: impl Future<Output = Result<T, Failure>>) -> Result<T, Refused> {
    match tokio::time::timeout(WITHIN, found).await {
        Ok(found) => Ok(found?),
        Err(_) => Err(Refused::new(StatusCode::GATEWAY_TIMEOUT, "PostgreSQL has not answered in time")),
    }
}

/// `POST /api/dead/redrive`
pub(super) async fn redrive(
    State(console): State<Console>,
    Extension(settings): Configured,
    bytes: Body,
) -> Result<Response, Refused> {
    let Wanted { letters, all, dry_run, accept_doubt, operator: name, .. } = body(&bytes)?;
    let (filter, by) = (meant(all, letters)?, operator(name.as_deref()));
    if accept_doubt && filter.ids.is_empty() {
        return Err(Refused::bad("doubt can be accepted only of letters that are named"));
    }
    let what = What { action: "redrive", about: about(&filter), by: by.clone(), is_trial: dry_run };
    let work = async move {
        let again = Again { filter: &filter, all, dry_run, accept_doubt, by: &by };
        result(again.redrive(settings.config(), &settings.database, |_| Ok(())).await)
    };
    console.0.actions.perform(what, work).await
}

/// `POST /api/dead/discard`
pub(super) async fn discard(
    State(console): State<Console>,
    Extension(settings): Configured,
    bytes: Body,
) -> Result<Response, Refused> {
    change(console, settings, &bytes, true).await
}

/// `POST /api/dead/reopen`
pub(super) async fn reopen(
    State(console): State<Console>,
    Extension(settings): Configured,
    bytes: Body,
) -> Result<Response, Refused> {
    change(console, settings, &bytes, false).await
}

async fn change(
    console: Console,
    settings: Arc<Settings>,
    bytes: &Body,
    is_discard: bool,
) -> Result<Response, Refused> {
    let Wanted { letters, all, dry_run, because, operator: name, .. } = body(bytes)?;
    let filter = meant(all, letters)?;
    let (by, because) = (operator(name.as_deref()), reason(because.as_deref()).unwrap_or_default());
    let action = if is_discard { "discard" } else { "reopen" };
    let what = What { action, about: about(&filter), by: by.clone(), is_trial: dry_run };
    let work = async move {
        let to = if is_discard { To::Discarded { by: &by, because: &because } } else { To::Open };
        let change = Change { filter: &filter, all, dry_run, to };
        result(change.make(settings.config(), &settings.database, |_| Ok(())).await)
    };
    console.0.actions.perform(what, work).await
}

fn meant(all: bool, letters: Named) -> Result<Filter, Refused> {
    let filter = letters.filter()?;
    if filter.is_everything() && !all {
        return Err(Refused::bad("say which letters: ids, a filter, or all"));
    }
    Ok(filter)
}

/// Which letters, for the log.
fn about(filter: &Filter) -> String {
    match (filter.ids.len(), filter.is_everything()) {
        (0, true) => "all dead letters".into(),
        (0, false) => "the dead letters of a filter".into(),
        (1, _) => "1 dead letter".into(),
        (number, _) => format!("{number} dead letters"),
    }
}
