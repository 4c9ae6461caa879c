//! Actions: what somebody does in the console, one after another, and what came of it.
//!
//! Takes work; runs it to its end whether or not the browser waits for it, tells the log who did what with which outcome, and keeps the last ones.
//! Fails where too much is under way.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tracing::info;

use super::answer::{Refused, document};
use super::{Console, locked};
use crate::ops::{Exit, Failure};

/// An answer waits so long for the end; later the end is in the list.
const WAIT: Duration = Duration::from_secs(8);
/// No action lasts longer.
const LIMIT: Duration = Duration::from_secs(600);
/// So many run at once.
const AT_ONCE: usize = 2;
/// So many are kept.
const KEPT: usize = 30;

/// What somebody does.
#[derive(Debug, Clone, Serialize)]
pub(super) struct What {
    /// The verb.
    pub(super) action: &'static str,
    /// With what.
    pub(super) about: String,
    /// Who.
    pub(super) by: String,
    /// Whether nothing is changed by it.
    pub(super) is_trial: bool,
}

/// What was done, and what came of it.
#[derive(Debug, Clone, Serialize)]
struct Action {
    number: u64,
    #[serde(flatten)]
    what: What,
    began_at: String,
    /// `running`, `done` or `failed`.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Arc<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip)]
    status: StatusCode,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Actions {
    next: AtomicU64,
    kept: Arc<Mutex<VecDeque<Action>>>,
    places: Arc<Semaphore>,
}

impl Default for Actions {
    fn default() -> Actions {
        Actions { next: AtomicU64::new(1), kept: Arc::default(), places: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Actions {
    /// Does it; answers with what came of it, or that it is under way.
    pub(super) async fn perform(
        &self,
        what: What,
        work: impl Future<Output = Result<Value, Failure>> + Send + 'static,
    ) -> Result<Response, Refused> {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            let words = "other changes are under way: wait until they have ended";
            return Err(Refused::new(StatusCode::SERVICE_UNAVAILABLE, words));
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let began_at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let (state, status) = ("running", StatusCode::ACCEPTED);
        let action = Action { number, what, began_at, state, result: None, error: None, status };
        {
            let mut kept = locked(&self.kept);
            kept.push_front(action.clone());
            kept.truncate(KEPT);
        }
        let (kept, begun) = (self.kept.clone(), action.clone());
        let running = tokio::spawn(async move {
            let outcome = match tokio::time::timeout(LIMIT, work).await {
                Ok(outcome) => outcome,
                Err(_) => Err(Failure::new(Exit::Retry, "it was given up after ten minutes")),
            };
            let ended = begun.ended(outcome);
            if let Some(place) = locked(&kept).iter_mut().find(|action| action.number == ended.number) {
                *place = ended.clone();
            }
            drop(place);
            ended
        });
        Ok(match tokio::time::timeout(WAIT, running).await {
            Ok(Ok(ended)) => (ended.status, document(&ended)).into_response(),
            Ok(Err(_)) => {
                Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "it ended by a bug: see the log").into_response()
            }
            Err(_) => (action.status, document(&action)).into_response(),
        })
    }
}

impl Action {
    fn ended(self, outcome: Result<Value, Failure>) -> Action {
        let ended = match outcome {
            Ok(result) => Action { state: "done", result: Some(Arc::new(result)), status: StatusCode::OK, ..self },
            Err(failure) => {
                let refused = Refused::from(failure);
                Action { state: "failed", error: Some(refused.words), status: refused.status, ..self }
            }
        };
        let What { action, about, by, is_trial } = &ended.what;
        info!(
            event = "console_action",
            action,
            about,
            operator = by,
            dry_run = is_trial,
            outcome = ended.state,
            error = ended.error,
            "somebody has used the console"
        );
        ended
    }
}

/// What a verb gives, as JSON.
pub(super) fn result(given: Result<impl Serialize, Failure>) -> Result<Value, Failure> {
    serde_json::to_value(given?).map_err(|error| Failure::new(Exit::Error, error.to_string()))
}

/// `GET /api/actions`: the last ones, the latest first.
pub(super) async fn list(State(console): State<Console>) -> Response {
    let kept = locked(&console.0.actions.kept);
    document(&json!({ "actions": *kept }))
}
