//! Write: pause and resume pipelines, and have an audit made.
//!
//! Takes requests; does what `tidegate pause`, `resume` and `audit` do. An audit changes nothing; it is asked for by whoever has the token, because it
//! burdens both servers.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Bytes as Body;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;

use super::actions::{What, result};
use super::answer::Refused;
use super::ask::{body, operator, reason};
use super::{Console, Settings};
use crate::ops::audit;
use crate::ops::context::one;
use crate::ops::observe::Servers;
use crate::ops::pause::Change;

/// The daemons have so long to obey before the answer says how many do.
const OBEYED_WITHIN: Duration = Duration::from_secs(5);
/// So many counters an audit of the console takes at the most, and so many it names.
const MAX_SAMPLE: u32 = 100_000;
const MAX_KEYS: usize = 1_000;
/// So many differences are shown.
const DIFFERENCES: usize = 100;

type Configured = Extension<Arc<Settings>>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pausing {
    pipeline: String,
    /// For how long, such as `10m`.
    #[serde(default)]
    duration: Option<String>,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    operator: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Auditing {
    pipeline: String,
    #[serde(default)]
    sample: Option<u32>,
    #[serde(default)]
    keys: Vec<String>,
    #[serde(default)]
    operator: Option<String>,
}

/// `POST /api/pause`
pub(super) async fn pause(
    State(console): State<Console>,
    Extension(settings): Configured,
    bytes: Body,
) -> Result<Response, Refused> {
    let Pausing { pipeline, duration, reason: why, operator: name } = body(&bytes)?;
    let duration = duration.as_deref().map(str::trim).filter(|text| !text.is_empty());
    let duration = duration.map(humantime::parse_duration).transpose();
    let duration =
        duration.map_err(|error| Refused::bad(format!("the duration cannot be read ({error}): write 10m or 2h")))?;
    let (why, by) = (reason(why.as_deref()), operator(name.as_deref()));
    one(settings.config(), Some(&pipeline))?;
    let what = What { action: "pause", about: pipeline.clone(), by: by.clone(), is_trial: false };
    let work = async move {
        let change = Change::Pause { duration, reason: why.as_deref(), operator: Some(&by) };
        make(change, &settings, &pipeline).await
    };
    console.0.actions.perform(what, work).await
}

/// `POST /api/resume`
pub(super) async fn resume(
    State(console): State<Console>,
    Extension(settings): Configured,
    bytes: Body,
) -> Result<Response, Refused> {
    let Pausing { pipeline, operator: name, .. } = body(&bytes)?;
    one(settings.config(), Some(&pipeline))?;
    let what = What { action: "resume", about: pipeline.clone(), by: operator(name.as_deref()), is_trial: false };
    console.0.actions.perform(what, async move { make(Change::Resume, &settings, &pipeline).await }).await
}

async fn make(
    change: Change<'_>,
    settings: &Settings,
    pipeline: &str,
) -> Result<serde_json::Value, crate::ops::Failure> {
    let config = settings.config();
    let mut servers = Servers::of(config, "tidegate:console")?;
    let pipeline = one(config, Some(pipeline))?;
    result(change.make(config, &[pipeline], &mut servers, OBEYED_WITHIN).await)
}

/// `POST /api/audit`
pub(super) async fn audit(
    State(console): State<Console>,
    Extension(settings): Configured,
    bytes: Body,
) -> Result<Response, Refused> {
    let Auditing { pipeline, sample, keys, operator: name } = body(&bytes)?;
    one(settings.config(), Some(&pipeline))?;
    let sample = sample.unwrap_or(1_000);
    if !(1..=MAX_SAMPLE).contains(&sample) || keys.len() > MAX_KEYS {
        let words = format!(
            "an audit of the console takes a sample of 1 to {MAX_SAMPLE} counters, or {MAX_KEYS} keys; `tidegate audit --full` takes all"
        );
        return Err(Refused::bad(words));
    }
    let what = What { action: "audit", about: pipeline.clone(), by: operator(name.as_deref()), is_trial: true };
    let work = async move {
        let config = settings.config();
        let mut servers = Servers::of(config, "tidegate:audit")?;
        let opts = audit::Opts {
            pipeline: Some(pipeline.clone()),
            full: false,
            sample,
            keys,
            repair: false,
            dry_run: false,
            yes: false,
            limit: DIFFERENCES,
        };
        result(audit::look(&opts, &|_| {}, one(config, Some(&pipeline))?, &mut servers).await)
    };
    console.0.actions.perform(what, work).await
}
