//! Health: whether the process lives, is ready, and has started, for supervisors and load balancers.
//!
//! Takes the registry; gives an [`Answer`] for each question. It cannot fail, and asks no server: an outage of PostgreSQL or Valkey changes
//! neither liveness nor readiness, because a restart would mend nothing; it is told as `degraded`, here and as a metric.
//!
//! | question | yes while |
//! | --- | --- |
//! | live | no actor is stuck at one step far beyond its time-outs |
//! | ready | the workers are at work and no stop has begun |
//! | startup | the workers were started once |

use std::time::Instant;

use serde_json::{Value, json};

use super::registry::{Group, Registry};

/// What the process is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It makes sure of what it needs; it may wait for a server.
    Starting,
    /// Its workers are at work.
    Running,
    /// It settles what it holds.
    Stopping,
}

/// A question that supervisors ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Should it be left alone, and not be killed and started again?
    Live,
    /// Does it do its work?
    Ready,
    /// Has it started?
    Startup,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Yes or no.
    pub is_yes: bool,
    /// Why, as JSON, without a secret.
    pub body: Value,
}

impl Question {
    /// All of them.
    pub const ALL: [Question; 3] = [Question::Live, Question::Ready, Question::Startup];

    /// The path under which it is asked.
    pub fn path(self) -> &'static str {
        match self {
            Question::Live => "/live",
            Question::Ready => "/ready",
            Question::Startup => "/startup",
        }
    }

    /// Answers it.
    pub fn answer(self, registry: &Registry, now: Instant) -> Answer {
        match self {
            Question::Live => live(registry, now),
            Question::Ready => ready(registry),
            Question::Startup => startup(registry),
        }
    }
}

fn live(registry: &Registry, now: Instant) -> Answer {
    match registry.stuck(now) {
        None => Answer { is_yes: true, body: json!({ "status": "live" }) },
        Some((step, lasted)) => Answer {
            is_yes: false,
            body: json!({ "status": "stuck", "step": step, "lasted_seconds": lasted.as_secs() }),
        },
    }
}

fn ready(registry: &Registry) -> Answer {
    let (is_yes, status) = match registry.phase() {
        Phase::Starting => (false, "starting"),
        Phase::Running => (true, "ready"),
        Phase::Stopping => (false, "stopping"),
    };
    let groups = registry.groups();
    let at_work = || groups.iter().filter(|group| group.is_at_work);
    let is_degraded = at_work().any(|group| group.now.is_degraded());
    let pipelines: Vec<Value> = at_work().map(pipeline).collect();
    Answer { is_yes, body: json!({ "status": status, "degraded": is_degraded, "pipelines": pipelines }) }
}

fn pipeline(group: &Group) -> Value {
    let now = &group.now;
    let mut told = json!({
        "pipeline": group.labels.pipeline,
        "degraded": now.is_degraded(),
        "halted": now.halted == Some(1),
        "failing_workers": now.failing_workers.unwrap_or(0),
        "backlog_entries": now.backlog(),
        "oldest_unsettled_age_seconds": now.age_ms.map(|ms| ms as f64 / 1000.0),
        "backlog_read_age_seconds": now.backlog_read_ms_ago.map(|ms| ms as f64 / 1000.0),
        "dead_letters_open": now.dead_letters_open,
    });
    if group.labels.per_stream {
        told["stream"] = group.labels.stream.clone().into();
    }
    told
}

fn startup(registry: &Registry) -> Answer {
    let has_started = registry.has_started();
    Answer { is_yes: has_started, body: json!({ "status": if has_started { "started" } else { "starting" } }) }
}

/// One line for people, such as a service manager shows.
pub fn in_one_line(registry: &Registry) -> String {
    match registry.phase() {
        Phase::Starting => return "starting".into(),
        Phase::Stopping => return "stopping: settling what is held".into(),
        Phase::Running => {}
    }
    let groups = registry.groups();
    let at_work: Vec<&Group> = groups.iter().filter(|group| group.is_at_work).collect();
    let sum = |of: fn(&Group) -> u64| at_work.iter().map(|group| of(group)).sum::<u64>();
    let named = |fits: fn(&Group) -> bool| {
        at_work
            .iter()
            .filter(|group| fits(group))
            .map(|group| group.labels.pipeline.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let backlog = sum(|group| group.now.backlog().unwrap_or(0));
    let settled = sum(|group| group.now.applied + group.now.recognised + group.now.buried);
    let halted = named(|group| group.now.halted == Some(1));
    let degraded = named(|group| group.now.is_degraded());
    let how = match (halted.as_str(), degraded.as_str()) {
        ("", "") => "running".into(),
        ("", degraded) => format!("degraded ({degraded})"),
        (halted, _) => format!("halted ({halted})"),
    };
    format!("{how}: {backlog} entries to settle, {settled} settled")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use secrecy::SecretString;

    use super::super::contract::{Metrics, Side, Unsettled};
    use super::super::recorder::Labels;
    use super::super::registry::Shard;
    use super::*;
    use crate::postgres::{Database, Endpoint};

    fn at_work() -> (Registry, Arc<Metrics>) {
        let labels = Labels { pipeline: "p".into(), ..Labels::default() };
        let metrics = Arc::new(Metrics::of(labels.clone()));
        let second = Duration::from_secs(1);
        let endpoint = Endpoint {
            url: SecretString::from("postgres://u:hunter2@db/app".to_owned()),
            connect_timeout: second,
            statement_timeout: second,
            lock_timeout: second,
            idle_in_transaction_timeout: second,
        };
        let registry = Registry::default();
        registry.at_work(
            vec![Shard { labels, metrics: metrics.clone() }],
            Vec::new(),
            Database::new(endpoint, 1),
            60 * second,
        );
        (registry, metrics)
    }

    fn is_yes(question: Question, registry: &Registry) -> bool {
        question.answer(registry, Instant::now()).is_yes
    }

    #[test]
    fn it_is_ready_between_its_start_and_its_stop_and_has_started_for_good() {
        let registry = Registry::default();
        assert!(is_yes(Question::Live, &registry), "waiting for a server is no reason to be killed");
        assert!(!is_yes(Question::Ready, &registry) && !is_yes(Question::Startup, &registry));
        let (registry, _) = at_work();
        assert!(is_yes(Question::Ready, &registry) && is_yes(Question::Startup, &registry));
        registry.enter(Phase::Stopping);
        assert!(!is_yes(Question::Ready, &registry) && is_yes(Question::Startup, &registry));
        assert!(is_yes(Question::Live, &registry));
    }

    #[test]
    fn an_outage_is_degraded_and_neither_dead_nor_unready() {
        let (registry, metrics) = at_work();
        metrics.told_backlog(Unsettled { undelivered: Some(7), pending: 1, age_ms: 1_500 });
        metrics.begins_to_fail();
        metrics.is_halted(Side::Flushing, true);
        let answer = Question::Ready.answer(&registry, Instant::now());
        assert!(answer.is_yes && is_yes(Question::Live, &registry));
        assert_eq!(answer.body["degraded"], true);
        let pipeline = &answer.body["pipelines"][0];
        assert_eq!((&pipeline["halted"], &pipeline["backlog_entries"]), (&json!(true), &json!(8)));
        assert_eq!(pipeline["oldest_unsettled_age_seconds"], 1.5);
        assert_eq!(in_one_line(&registry), "halted (p): 8 entries to settle, 0 settled");
    }

    #[test]
    fn an_actor_that_is_stuck_at_one_step_makes_it_dead_until_it_goes_on() {
        let (registry, metrics) = at_work();
        let start = Instant::now();
        let step = metrics.steps.begin("flush", start);
        let live = |seconds| Question::Live.answer(&registry, start + Duration::from_secs(seconds));
        assert!(live(60).is_yes);
        assert_eq!(live(61).body, json!({ "status": "stuck", "step": "flush", "lasted_seconds": 61 }));
        assert!(!live(61).is_yes);
        drop(step);
        assert!(live(61).is_yes);
    }
}
