//! Admin: what the admin port serves: metrics and health, and the pages that somebody adds beside them.
//!
//! Takes the registry, the scrape and those pages; gives a router. A request is refused whose `Host` is a foreign name: a web page that makes a
//! browser ask this port under a name of its own (DNS rebinding) gets nothing. Metrics and health ask no server and can only be read.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HOST, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::health::Question;
use super::prometheus::{CONTENT_TYPE as PROMETHEUS, Scrape};
use super::registry::Registry;
use crate::config::Loaded;

/// The paths that are served.
pub const PATHS: &str = "/metrics, /live, /ready, /startup";

/// What the admin port shows.
#[derive(Debug, Clone)]
pub struct Pages {
    /// How the daemon stands.
    pub registry: Registry,
    /// Its metrics.
    pub scrape: Scrape,
    /// Pages beside these.
    pub beside: Option<Arc<dyn Beside>>,
}

/// Pages beside metrics and health, under paths of their own.
pub trait Beside: std::fmt::Debug + Send + Sync {
    /// What is served.
    fn router(&self) -> Router;
    /// This configuration is in force from now on.
    fn follow(&self, loaded: &Loaded);
}

/// The names, beside `localhost` and addresses, under which the port may be asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosts(Arc<BTreeSet<String>>);

impl Hosts {
    /// As `admin.hosts` lists them.
    pub fn of(listed: Option<&str>) -> Hosts {
        let names = listed.unwrap_or_default().split(',').map(plain).filter(|name| !name.is_empty());
        Hosts(Arc::new(names.collect()))
    }

    /// Whether a request with this `Host` is answered.
    pub fn allow(&self, host: &str) -> bool {
        let name = without_port(host);
        let is_address =
            name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name).parse::<IpAddr>().is_ok();
        is_address || plain(name) == "localhost" || self.0.contains(&plain(name))
    }
}

/// A name in one form: lower case, without the dot at its end.
fn plain(name: &str) -> String {
    let name = name.trim();
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // The colons of a bare IPv6 address belong to it.
        Some((name, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (!name.contains(':') || name.ends_with(']')) =>
        {
            name
        }
        _ => host,
    }
}

/// What is served.
pub fn router(pages: Pages, hosts: Hosts) -> Router {
    let beside = pages.beside.as_ref().map(|beside| beside.router()).unwrap_or_default();
    let mut router = Router::new().route("/metrics", get(metrics));
    for question in Question::ALL {
        let answer = move |State(pages): State<Pages>| async move { health(question, &pages.registry) };
        router = router.route(question.path(), get(answer));
    }
    router.with_state(pages).merge(beside).fallback(nothing).layer(from_fn_with_state(hosts, refuse_foreign_hosts))
}

async fn refuse_foreign_hosts(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let mut told = request.headers().get_all(HOST).iter();
    let (first, second) = (told.next().and_then(|host| host.to_str().ok()), told.next());
    // A request line may name the host, too, and then that is the one.
    let host = request.uri().authority().map(|authority| authority.as_str()).or(first);
    match host {
        Some(host) if second.is_none() && hosts.allow(host) => next.run(request).await,
        _ => {
            let why = "this Host is not served here; list it in admin.hosts, or ask by address\n";
            (StatusCode::MISDIRECTED_REQUEST, why).into_response()
        }
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    pages.registry.look_again();
    // With very many series this takes a while: not on a thread that flushes.
    let text = tokio::task::spawn_blocking(move || pages.scrape.text()).await;
    match text {
        Ok(Ok(text)) => (headers(PROMETHEUS), text).into_response(),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be shown\n").into_response(),
    }
}

fn health(question: Question, registry: &Registry) -> Response {
    let answer = question.answer(registry, Instant::now());
    let status = if answer.is_yes { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, headers("application/json"), format!("{}\n", answer.body)).into_response()
}

pub(crate) async fn nothing() -> Response {
    (StatusCode::NOT_FOUND, format!("nothing is here; there are {PATHS}\n")).into_response()
}

fn headers(content: &'static str) -> [(axum::http::HeaderName, HeaderValue); 3] {
    [
        (CONTENT_TYPE, HeaderValue::from_static(content)),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_localhost_and_listed_names_are_served_and_foreign_names_are_not() {
        let hosts = Hosts::of(Some("tidegate.prod.svc, Metrics.example."));
        for allowed in [
            "127.0.0.1",
            "127.0.0.1:9464",
            "10.1.2.3:9464",
            "[::1]:9464",
            "[::1]",
            "::1",
            "localhost",
            "LOCALHOST:1",
            "localhost.",
            "tidegate.prod.svc:9464",
            "metrics.example",
            "metrics.example.:80",
        ] {
            assert!(hosts.allow(allowed), "{allowed}");
        }
        for foreign in [
            "",
            "evil.example",
            "evil.example:9464",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "prod.svc",
            "127.0.0.1@evil",
            "[::1].evil:80",
        ] {
            assert!(!hosts.allow(foreign), "{foreign}");
        }
        assert!(!Hosts::of(None).allow(""));
    }

    proptest! {
        #[test]
        fn any_host_is_judged(host in ".{0,60}") {
            let _ = Hosts::of(Some("a.b")).allow(&host);
        }
    }
}
