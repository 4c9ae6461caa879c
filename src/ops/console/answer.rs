//! Answer: what a request gets: a document, or why there is none.
//!
//! Takes what a verb gives; gives JSON with the status that fits. It cannot fail.

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::ops::{Exit, Failure};

/// Why there is no document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) status: StatusCode,
    pub(super) words: String,
}

impl Refused {
    pub(super) fn new(status: StatusCode, words: impl Into<String>) -> Refused {
        Refused { status, words: words.into() }
    }

    /// The request makes no sense.
    pub(super) fn bad(words: impl Into<String>) -> Refused {
        Refused::new(StatusCode::BAD_REQUEST, words)
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Refused {
        let status = match failure.exit() {
            Exit::Usage => StatusCode::BAD_REQUEST,
            Exit::BadInput => StatusCode::NOT_FOUND,
            Exit::Config => StatusCode::UNPROCESSABLE_ENTITY,
            Exit::Unavailable | Exit::Retry => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_GATEWAY,
        };
        Refused { status, words: failure.to_string() }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.status, document(&json!({ "error": self.words }))).into_response()
    }
}

/// A document.
pub(super) fn document(content: &impl Serialize) -> Response {
    match serde_json::to_vec(content) {
        Ok(text) => ([(CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
