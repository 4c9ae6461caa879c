//! Guard: who may read, who may change, and what every answer carries.
//!
//! Takes a request; lets it pass, or answers why not. There are no cookies, so no foreign page can act in somebody's name: whoever changes
//! something sends the token in a header, which a foreign page cannot. The token is compared in constant time.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::http::header::{HeaderMap, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use secrecy::ExposeSecret;
use serde_json::json;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use tracing::warn;

use super::answer::{Refused, document};
use super::{Console, Settings, locked};
use crate::config::ConsoleAccess;
use crate::telemetry::admin;

/// Only files of this port run, style, and are shown; only this port is asked; nobody frames the page, and text never becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";
/// What is answered from memory: it waits for no server, so it needs no place.
const FROM_MEMORY: [&str; 4] = ["/api/session", "/api/history", "/api/actions", "/api/config"];
/// Refused tokens are told once in so long.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Tokens that were refused and not told yet.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<(u64, Option<Instant>)>);

impl Refusals {
    fn count(&self) {
        let mut state = locked(&self.0);
        state.0 += 1;
        if state.1.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
            warn!(event = "console_refused", attempts = state.0, "a wrong token was sent to the console");
            *state = (0, Some(Instant::now()));
        }
    }
}

/// Whether the token is there, and right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Nothing,
    Wrong,
    Right,
}

/// Stands before every route.
pub(super) async fn check(State(console): State<Console>, mut request: Request, next: Next) -> Response {
    let Some(settings) = console.settings() else { return admin::nothing().await };
    let path = request.uri().path();
    let asks_servers = path.starts_with("/api/") && !FROM_MEMORY.contains(&path);
    let passed = pass(&console, &settings, &request);
    request.extensions_mut().insert(settings);
    let answer = match passed {
        Err(refused) => refused.into_response(),
        Ok(()) if !asks_servers => next.run(request).await,
        Ok(()) => match console.0.places.try_acquire() {
            Ok(_place) => next.run(request).await,
            Err(_) => {
                let words = "too much is asked at once: ask again in a second";
                let again = [(RETRY_AFTER, HeaderValue::from_static("1"))];
                (again, Refused::new(StatusCode::SERVICE_UNAVAILABLE, words)).into_response()
            }
        },
    };
    with_headers(answer)
}

fn pass(console: &Console, settings: &Settings, request: &Request) -> Result<(), Refused> {
    let path = request.uri().path();
    if !path.starts_with("/api/") {
        return Ok(());
    }
    let headers = request.headers();
    // A browser says who asks. A foreign page could not read an answer, and it is not to burden the servers either.
    let site = headers.get("sec-fetch-site").and_then(|site| site.to_str().ok());
    if site.is_some_and(|site| !matches!(site, "same-origin" | "none")) {
        return Err(Refused::new(StatusCode::FORBIDDEN, "another site's page asks: that is not served"));
    }
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    let needs_token = changes || (settings.access == ConsoleAccess::Locked && path != "/api/session");
    if needs_token {
        match (&settings.token, sent(settings, headers)) {
            (None, _) => {
                let words = "nothing can be changed here: no admin.token is configured (docs/console.md)";
                return Err(Refused::new(StatusCode::FORBIDDEN, words));
            }
            (Some(_), Sent::Right) => {}
            (Some(_), Sent::Nothing) => {
                return Err(Refused::new(StatusCode::UNAUTHORIZED, "the token is needed for this"));
            }
            (Some(_), Sent::Wrong) => {
                console.0.refusals.count();
                return Err(Refused::new(StatusCode::UNAUTHORIZED, "this is not the token"));
            }
        }
    }
    let is_json = headers.get(CONTENT_TYPE).is_some_and(|is| is.as_bytes().starts_with(b"application/json"));
    if changes && !is_json {
        return Err(Refused::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "send application/json"));
    }
    Ok(())
}

fn sent(settings: &Settings, headers: &HeaderMap) -> Sent {
    let mut told = headers.get_all(AUTHORIZATION).iter();
    let (Some(first), None) = (told.next(), told.next()) else { return Sent::Nothing };
    let bearer = first.as_bytes().strip_prefix(b"Bearer ").unwrap_or_default();
    let is_right = settings.token.as_ref().is_some_and(|token| token.expose_secret().as_bytes().ct_eq(bearer).into());
    if is_right { Sent::Right } else { Sent::Wrong }
}

/// `GET /api/session`: what whoever asks may do.
pub(super) async fn session(
    State(console): State<Console>,
    Extension(settings): Extension<Arc<Settings>>,
    headers: HeaderMap,
) -> Response {
    let sent = sent(&settings, &headers);
    if sent == Sent::Wrong {
        console.0.refusals.count();
    }
    let is_right = sent == Sent::Right;
    document(&json!({
        "may_read": settings.access == ConsoleAccess::Open || is_right,
        "may_change": is_right,
        "has_token": settings.token.is_some(),
        "version": env!("CARGO_PKG_VERSION"),
        "source": settings.config().valkey.source,
    }))
}

fn with_headers(mut answer: Response) -> Response {
    let every: [(HeaderName, &str); 7] = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-store"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    let is_unauthorized = answer.status() == StatusCode::UNAUTHORIZED;
    let headers = answer.headers_mut();
    for (name, value) in every {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if is_unauthorized {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"tidegate\""));
    }
    answer
}
