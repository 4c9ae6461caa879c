//! Admin: serves the admin port for as long as the daemon lives, over reloads.
//!
//! Takes where to listen and the pages; gives nothing back. It cannot fail: while another process has the port the daemon does its work
//! without, says so, and tries again. At a stop it is served to the end, so that a supervisor sees the stop.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::config::AdminSection;
use crate::telemetry::admin::{Hosts, PATHS, Pages, router};

/// How soon it is tried again to get a port that another process has.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// The admin port.
pub(super) struct Admin {
    pages: Pages,
    asked: Option<(SocketAddr, Hosts)>,
    /// One at the most; dropped, it is ended.
    tasks: JoinSet<()>,
}

impl Admin {
    /// Begins to serve, if that is asked for.
    pub(super) fn start(section: &AdminSection, pages: Pages) -> Admin {
        let mut admin = Admin { pages, asked: None, tasks: JoinSet::new() };
        admin.follow(section);
        admin
    }

    /// Serves as this section says from now on.
    pub(super) fn follow(&mut self, section: &AdminSection) {
        let asked = section.listen.map(|listen| (listen, Hosts::of(section.hosts.as_deref())));
        if asked == self.asked {
            return;
        }
        // The port is free as soon as the task is dropped, and before that it is tried again.
        self.tasks.abort_all();
        if let Some((listen, hosts)) = asked.clone() {
            self.tasks.spawn(serve(listen, hosts, self.pages.clone()));
        }
        self.asked = asked;
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
                let _ = axum::serve(listener, router).await;
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
