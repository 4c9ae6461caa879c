//! Console: a page on the admin port, and the JSON that it is made of.
//!
//! Takes the configuration in force and the registry; gives the routes `/console` and `/api/…`. What they tell and do is what the verbs `status`,
//! `dead`, `pause`, `audit` and `config show` tell and do: nothing is computed twice. It fails with an answer, never the daemon. It has
//! connections of its own, so a server that is slow keeps no flush, no scrape and no probe waiting.

mod actions;
mod answer;
mod ask;
mod guard;
mod history;
mod letters;
mod look;
mod page;
mod read;
mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use secrecy::SecretString;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{error, info};

use self::actions::Actions;
use self::guard::Refusals;
use self::history::History;
use self::look::Watcher;
use crate::config::{Config, ConsoleAccess, Loaded, Problems};
use crate::postgres::Database;
use crate::telemetry::admin::Beside;
use crate::telemetry::registry::Registry;

/// So many answers are worked on at once; whoever asks beyond that is told to come again.
const MAX_AT_ONCE: usize = 16;
/// Connections to PostgreSQL for whoever reads, beside those of the flow.
const CONNECTIONS: usize = 2;
/// The largest request.
const MAX_BODY: usize = 128 << 10;

/// See the module. Its clones are one.
#[derive(Debug, Clone)]
pub struct Console(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    /// None while it is off.
    settings: Mutex<Option<Arc<Settings>>>,
    history: Mutex<History>,
    /// Keeps the history; dropped, it is ended.
    sampler: Mutex<JoinSet<()>>,
    actions: Actions,
    refusals: Refusals,
    places: Semaphore,
}

/// What one configuration means for the console.
#[derive(Debug)]
struct Settings {
    loaded: Loaded,
    access: ConsoleAccess,
    token: Option<SecretString>,
    watcher: Watcher,
    database: Database,
}

impl Settings {
    fn of(loaded: &Loaded) -> Result<Settings, Problems> {
        let config = &loaded.config;
        Ok(Settings {
            access: config.admin.console,
            token: config.admin.token.clone(),
            watcher: Watcher::of(config),
            database: Database::new(config.postgres.address()?, CONNECTIONS),
            loaded: loaded.clone(),
        })
    }

    fn config(&self) -> &Config {
        &self.loaded.config
    }
}

impl Console {
    /// Of the process whose registry this is; off until it follows a configuration.
    pub fn new(registry: Registry) -> Console {
        Console(Arc::new(Inner {
            registry,
            settings: Mutex::default(),
            history: Mutex::default(),
            sampler: Mutex::default(),
            actions: Actions::default(),
            refusals: Refusals::default(),
            places: Semaphore::new(MAX_AT_ONCE),
        }))
    }

    fn settings(&self) -> Option<Arc<Settings>> {
        locked(&self.0.settings).clone()
    }
}

impl Beside for Console {
    fn router(&self) -> Router {
        let routes = Router::new()
            .route("/api/session", get(guard::session))
            .route("/api/status", get(read::status))
            .route("/api/streams", get(read::streams))
            .route("/api/workers", get(read::workers))
            .route("/api/consumers", get(read::consumers))
            .route("/api/history", get(read::history))
            .route("/api/config", get(read::config))
            .route("/api/dead", get(letters::list))
            .route("/api/dead/letter", get(letters::show))
            .route("/api/dead/redrive", post(letters::redrive))
            .route("/api/dead/discard", post(letters::discard))
            .route("/api/dead/reopen", post(letters::reopen))
            .route("/api/pause", post(write::pause))
            .route("/api/resume", post(write::resume))
            .route("/api/audit", post(write::audit))
            .route("/api/actions", get(actions::list));
        let routes =
            page::FILES.iter().fold(routes, |routes, file| routes.route(file.path, get(|| page::answer(file))));
        routes
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .route_layer(from_fn_with_state(self.clone(), guard::check))
            .with_state(self.clone())
    }

    fn follow(&self, loaded: &Loaded) {
        let access = loaded.config.admin.console;
        let before = self.settings().map_or(ConsoleAccess::Off, |settings| settings.access);
        let settings = match access {
            ConsoleAccess::Off => None,
            _ => match Settings::of(loaded) {
                Ok(settings) => Some(Arc::new(settings)),
                // The daemon needs the urls, too, and is refused before this.
                Err(problems) => return error!(%problems, "the console cannot be served"),
            },
        };
        let mut sampler = locked(&self.0.sampler);
        match settings {
            None => sampler.abort_all(),
            Some(_) if before == ConsoleAccess::Off => {
                sampler.abort_all();
                let console = self.clone();
                sampler.spawn(async move { history::keep(&console).await });
            }
            Some(_) => {}
        }
        if before != access {
            info!(path = page::PATH, ?access, "the console follows admin.console");
        }
        *locked(&self.0.settings) = settings;
    }
}

/// Whoever held it did nothing but look and replace.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
