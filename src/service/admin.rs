//! Admin: serves the admin port for as long as the daemon lives, over reloads.
//!
//! Takes where to listen and the pages; gives nothing back. It cannot fail: while another process has the port the daemon does its work
//! without, says so, and tries again. At a stop it is served to the end, so that a supervisor sees the stop. Connections have a limit, and
//! idle ones an end: whoever holds many of them takes no files from the flow, and none from a probe for long.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep};
use tracing::{info, warn};

use super::supervise::keep;
use crate::config::Loaded;
use crate::shutdown::Stop;
use crate::telemetry::admin::{Hosts, PATHS, Pages, router};

/// How soon it is tried again to get a port that another process has.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// So many connections are served at once; others wait.
const MAX_CONNECTIONS: usize = 256;
/// A connection on which nothing comes for so long is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(15);

/// The admin port.
pub(super) struct Admin {
    pages: Pages,
    asked: Option<(SocketAddr, Hosts)>,
    /// One at the most; dropped, it is ended.
    tasks: JoinSet<()>,
}

impl Admin {
    /// Begins to serve, if that is asked for.
    pub(super) fn start(loaded: &Loaded, pages: Pages) -> Admin {
        let mut admin = Admin { pages, asked: None, tasks: JoinSet::new() };
        admin.follow(loaded);
        admin
    }

    /// Serves as this configuration says from now on.
    pub(super) fn follow(&mut self, loaded: &Loaded) {
        if let Some(beside) = &self.pages.beside {
            beside.follow(loaded);
        }
        let section = &loaded.config.admin;
        let asked = section.listen.map(|listen| (listen, Hosts::of(section.hosts.as_deref())));
        if asked == self.asked {
            return;
        }
        // The port is free as soon as the task is dropped, and before that it is tried again.
        self.tasks.abort_all();
        if let Some((listen, hosts)) = asked.clone() {
            let pages = self.pages.clone();
            let serve = move || serve(listen, hosts.clone(), pages.clone());
            self.tasks.spawn(keep("admin port".into(), serve, Stop::default()));
        }
        self.asked = asked;
    }

    /// Resolves when serving has died too often to be begun again.
    pub(super) async fn died(&mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            // What was ended for another one was not given up.
            if ended.is_ok() {
                return;
            }
        }
        std::future::pending().await
    }
}

async fn serve(listen: SocketAddr, hosts: Hosts, pages: Pages) {
    let mut is_told = false;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => {
                let address = listener.local_addr().unwrap_or(listen);
                info!(event = "listening", %address, paths = PATHS, "metrics and health are served");
                is_told = false;
                let router = router(pages.clone(), hosts.clone());
                // Ends only if the port is lost.
                let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
                let _ = axum::serve(Limited { listener, places }, router).await;
            }
            Err(error) if !is_told => {
                is_told = true;
                warn!(
                    event = "not_listening", address = %listen, %error,
                    "metrics and health are not served: the port is taken or not allowed; choose another one as admin.listen, or none (\"\")"
                );
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

/// Accepts so many connections and no more.
struct Limited {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Listener for Limited {
    type Io = Held;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Held, SocketAddr) {
        let place = self.places.clone().acquire_owned().await.ok();
        // The listener's own way waits where files are short.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Held { stream, idle: Box::pin(sleep(IDLE_LIMIT)), _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection with its place, closed where nothing comes.
struct Held {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    /// The semaphore is never closed: it is always there.
    _place: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Held {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, into);
        if read.is_ready() {
            self.idle.as_mut().reset(Instant::now() + IDLE_LIMIT);
            return read;
        }
        self.idle.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Held {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
