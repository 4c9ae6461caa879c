//! Stopping in two phases: first read no more and settle what is held; then, on a second signal or at the deadline, leave
//! what is held pending.
//!
//! Either way nothing is lost: what is pending is delivered again, and the ledger recognises what was flushed (I7).

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tells every task that it is time to stop. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    asked: CancellationToken,
    forced: CancellationToken,
}

impl Stop {
    /// First phase: read no more, settle what is held.
    pub fn ask(&self) {
        self.asked.cancel();
    }

    /// Second phase: leave what is held pending.
    pub fn force(&self) {
        self.asked.cancel();
        self.forced.cancel();
    }

    /// Resolves in the first phase.
    pub async fn asked(&self) {
        self.asked.cancelled().await;
    }

    /// Resolves in the second phase.
    pub async fn forced(&self) {
        self.forced.cancelled().await;
    }

    /// Whether the first phase has begun.
    pub fn is_asked(&self) -> bool {
        self.asked.is_cancelled()
    }

    /// Whether the second phase has begun.
    pub fn is_forced(&self) -> bool {
        self.forced.is_cancelled()
    }
}

/// Resolves at each SIGHUP: the configuration is to be read again.
#[derive(Debug)]
pub struct Hangups(tokio::signal::unix::Signal);

impl Hangups {
    /// Listens from now on; from now on this signal no longer ends the process by itself.
    pub fn listen() -> std::io::Result<Hangups> {
        Ok(Hangups(signal(SignalKind::hangup())?))
    }

    /// The next one.
    pub async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// Resolves at each SIGTERM or SIGINT, with its name.
#[derive(Debug)]
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    /// Listens from now on; from now on these signals no longer end the process by themselves.
    pub fn listen() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next one.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
