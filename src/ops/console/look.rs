//! Look: how everything stands, looked at when somebody asks, once for all who ask.
//!
//! Takes the configuration; gives a [`Status`], a second old at the most where the servers answer in time, and else the last one with its age.
//! A look that takes long goes on while nobody waits for it any more, and is there for whoever asks next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::config::Config;
use crate::ops::observe::{Look, Servers};
use crate::ops::status::report::Status;
use crate::ops::status::{APART, limits};

/// A status is fresh for so long.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// It is waited for so long.
const WAIT: Duration = Duration::from_secs(8);
/// A look that is older is not compared with the next one: a rate would be one of long ago.
const COMPARED_FOR: Duration = Duration::from_secs(30);
/// An older entry is a degraded service, as for `tidegate status`.
const MAX_AGE: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub(super) struct Watcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: Config,
    latest: watch::Sender<Option<Arc<Taken>>>,
    is_looking: AtomicBool,
    /// The connections, and the last look. One looks at a time.
    kept: tokio::sync::Mutex<Option<(Servers, Look)>>,
}

/// A status, and when it was taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) at: Instant,
    pub(super) status: Status,
}

impl Watcher {
    pub(super) fn of(config: &Config) -> Watcher {
        let (config, latest) = (config.clone(), watch::Sender::new(None));
        Watcher(Arc::new(Shared {
            config,
            latest,
            is_looking: AtomicBool::new(false),
            kept: tokio::sync::Mutex::new(None),
        }))
    }

    /// How everything stands; none if that could not be found out in time, ever.
    pub(super) async fn status(&self) -> Option<Arc<Taken>> {
        let mut latest = self.0.latest.subscribe();
        let known = latest.borrow_and_update().clone();
        if known.as_ref().is_some_and(|taken| taken.at.elapsed() < FRESH_FOR) {
            return known;
        }
        if !self.0.is_looking.swap(true, Ordering::AcqRel) {
            let shared = self.0.clone();
            tokio::spawn(async move {
                let looking = Looking(&shared);
                if let Some(status) = looking.0.look().await {
                    looking.0.latest.send_replace(Some(Arc::new(Taken { at: Instant::now(), status })));
                }
            });
        }
        let _ = tokio::time::timeout(WAIT, latest.changed()).await;
        latest.borrow().clone()
    }
}

/// Whoever looks; dropped, even by a panic, the next one may.
struct Looking<'a>(&'a Shared);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.0.is_looking.store(false, Ordering::Release);
    }
}

impl Shared {
    /// None where the configuration names no servers, which the daemon refuses before this.
    async fn look(&self) -> Option<Status> {
        let config = &self.config;
        let pipelines: Vec<_> = config.pipelines.iter().collect();
        let take = async |servers: &mut Servers| Look::take(servers, &pipelines, config.reclaim.dead_after).await;
        let mut kept = self.kept.lock().await;
        let (mut servers, before) = match kept.take() {
            Some((servers, look)) if look.at.elapsed() < COMPARED_FOR => (servers, look),
            other => {
                let mut servers = match other {
                    Some((servers, _)) => servers,
                    None => Servers::of(config, "tidegate:console").ok()?,
                };
                let look = take(&mut servers).await;
                tokio::time::sleep(APART).await;
                (servers, look)
            }
        };
        let now = take(&mut servers).await;
        let status = Status::of(&before, &now, &limits(config, MAX_AGE));
        *kept = Some((servers, now));
        Some(status)
    }
}
