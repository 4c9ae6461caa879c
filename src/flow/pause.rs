//! Pause: whether a pipeline is to read nothing for now, as its workers see it.
//!
//! Takes what the service has learnt of `tidegate.pauses`; gives takers a wait that ends when the pause does, at its end by this
//! process's clock although PostgreSQL may be away by then. It cannot fail.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

/// Whether one pipeline is paused. Its clones are one.
#[derive(Debug, Clone)]
pub struct Pause(Arc<watch::Sender<State>>);

/// What is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// It flows.
    #[default]
    Flows,
    /// It is paused, until then or until somebody resumes it.
    Paused(Option<Instant>),
}

impl State {
    fn holds(self) -> bool {
        match self {
            State::Flows => false,
            State::Paused(until) => until.is_none_or(|until| Instant::now() < until),
        }
    }
}

impl Default for Pause {
    fn default() -> Pause {
        Pause(Arc::new(watch::Sender::new(State::Flows)))
    }
}

impl Pause {
    /// Tells what holds from now on. Says whether that is another thing than before.
    pub fn set(&self, state: State) -> bool {
        let was = self.is_on();
        self.0.send_replace(state);
        was != state.holds()
    }

    /// Whether nothing is to be read.
    pub fn is_on(&self) -> bool {
        self.0.borrow().holds()
    }

    /// Resolves when the pipeline flows.
    pub async fn over(&self) {
        let mut told = self.0.subscribe();
        loop {
            let state = *told.borrow_and_update();
            let end = match state {
                State::Paused(until) if state.holds() => until,
                _ => return,
            };
            tokio::select! {
                // The sender is beside it: it cannot be gone.
                _ = told.changed() => {}
                () = tokio::time::sleep_until(end.unwrap_or_else(Instant::now).into()), if end.is_some() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_pause_ends_when_it_is_lifted_and_by_itself_at_its_end() {
        let pause = Pause::default();
        pause.over().await;
        assert!(pause.set(State::Paused(None)) && pause.is_on());
        assert!(!pause.set(State::Paused(Some(Instant::now() + Duration::from_secs(3600)))), "no news");
        let waiter = pause.clone();
        let lifted = tokio::spawn(async move { waiter.over().await });
        assert!(pause.set(State::Flows));
        lifted.await.expect("it ended");
        pause.set(State::Paused(Some(Instant::now() + Duration::from_millis(5))));
        pause.over().await;
        assert!(!pause.is_on());
    }
}
