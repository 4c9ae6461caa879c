//! Notify: tells the service manager (systemd) how the daemon stands, where there is one that wants to know.
//!
//! Takes the registry; sends READY, RELOADING, STOPPING, and again and again STATUS and WATCHDOG. The watchdog is fed only while no actor is
//! stuck: it goes on through outages and long drains, and not through a flush loop that stands still. It cannot fail: where nobody listens
//! nothing is sent.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::task::JoinSet;

use crate::telemetry::health::{Phase, Question, in_one_line};
use crate::telemetry::registry::Registry;

/// How often the state is told, and whether it has changed is looked at, where the watchdog does not ask for more.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// It is fed so many times in the time that the service manager allows.
const FEEDINGS: u32 = 3;

/// Feeds the watchdog and tells the state, until it is dropped.
pub(super) struct Notifier {
    _tasks: JoinSet<()>,
}

impl Notifier {
    pub(super) fn start(registry: &Registry) -> Notifier {
        let mut tasks = JoinSet::new();
        if std::env::var_os("NOTIFY_SOCKET").is_some() {
            tasks.spawn(tell_again_and_again(registry.clone()));
        }
        Notifier { _tasks: tasks }
    }
}

async fn tell_again_and_again(registry: Registry) {
    let watchdog = sd_notify::watchdog_enabled();
    let every = watchdog.map_or(TELL_EVERY, |limit| (limit / FEEDINGS).clamp(Duration::from_millis(1), TELL_EVERY));
    let mut told = String::new();
    loop {
        let is_live = Question::Live.answer(&registry, Instant::now()).is_yes;
        // Before it is ready no watchdog waits, but a limit for the start: waiting for a server is no reason to give up.
        if registry.phase() == Phase::Starting {
            send(&[NotifyState::ExtendTimeoutUsec(
                (every * (FEEDINGS + 1)).as_micros().try_into().unwrap_or(u32::MAX),
            )]);
        }
        if watchdog.is_some() && is_live {
            send(&[NotifyState::Watchdog]);
        }
        let line = if is_live { in_one_line(&registry) } else { "an actor is stuck".into() };
        if line != told {
            send(&[NotifyState::Status(&line)]);
            told = line;
        }
        tokio::time::sleep(every).await;
    }
}

/// The workers are at work: at the start, and at the end of a reload.
pub(super) fn ready(registry: &Registry) {
    send(&[NotifyState::Ready, NotifyState::Status(&in_one_line(registry))]);
}

/// The configuration is read again; [`ready`] is the end of it.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now, NotifyState::Status("reading the configuration again")]),
        Err(_) => send(&[NotifyState::Reloading]),
    }
}

/// A stop has begun.
pub(super) fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("stopping: settling what is held")]);
}

fn send(states: &[NotifyState<'_>]) {
    // Nobody to tell where it fails.
    let _ = sd_notify::notify(states);
}
