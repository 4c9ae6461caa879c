//! Lease: the leave to do what others wait for, given back when whoever holds it ends before the work does.
//!
//! Takes the call that ends a lease; sends it when the holder is dropped: its request was cancelled, or its loader has panicked. Then the next one begins
//! at once, and not when the lease has run out. It is made before the lease is asked for: whoever is cancelled while the answer is on its way may have
//! the lease without having heard of it. It cannot fail: a lease that cannot be given back runs out.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::connector::{Connector, Unanswered};
use crate::functions::Call;
use crate::retry::Fault;

/// How often it is tried to give one back of which nobody knows whether it was.
const TRIES: usize = 3;

/// See the module.
#[derive(Debug)]
pub(super) struct Lease {
    connector: Arc<Connector>,
    /// What gives it back; none if it is over.
    end: Option<Call>,
}

impl Lease {
    /// One that is about to be asked for, and that this call ends.
    pub(super) fn new(connector: &Arc<Connector>, end: Call) -> Lease {
        Lease { connector: Arc::clone(connector), end: Some(end) }
    }

    /// The lease, if the answer says that it was granted; there is nothing to give back where it was not.
    pub(super) fn granted(self, is_granted: bool) -> Option<Lease> {
        if is_granted {
            return Some(self);
        }
        self.over();
        None
    }

    /// The work is done, and the lease ended with it.
    pub(super) fn over(mut self) {
        self.end = None;
    }

    /// The work has failed: whoever comes next may begin when this returns.
    pub(super) async fn give_back(mut self) {
        if let Some(end) = self.end.take() {
            let _ = self.connector.send(end).await;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Without a runtime nothing can be sent, and nobody waits in this process.
        if let (Some(end), Ok(runtime)) = (self.end.take(), Handle::try_current()) {
            let connector = Arc::clone(&self.connector);
            runtime.spawn(async move {
                for _ in 0..TRIES {
                    match connector.send(end.clone()).await {
                        // What made the holder fail may have cost the connection.
                        Err(Unanswered::Failed(fault)) if !matches!(fault, Fault::Valkey { .. }) => {}
                        _ => return,
                    }
                }
            });
        }
    }
}
