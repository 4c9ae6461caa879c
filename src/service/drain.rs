//! Drain: when the daemon is to stop, and how its tasks end in two phases.

use std::time::Duration;

use tokio::task::JoinSet;
use tracing::warn;

use super::Ending;
use super::prepare::Flow;
use crate::flow::read;
use crate::retry::{Fault, backoff};
use crate::shutdown::{Signals, Stop};
use crate::valkey::{self, Link};

/// How often it is looked whether the stream is empty.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a daemon that was forced to stop waits for its tasks to notice.
const FORCED_GRACE: Duration = Duration::from_millis(200);

/// Waits for the tasks in two phases, and says which one ended it.
pub(super) async fn drain(
    grace: Duration,
    signals: &mut Signals,
    stop: &Stop,
    workers: &mut JoinSet<()>,
    caretakers: &mut JoinSet<()>,
) -> Ending {
    let settled = async {
        while workers.join_next().await.is_some() {}
        while caretakers.join_next().await.is_some() {}
    };
    let mut settled = std::pin::pin!(settled);
    tokio::select! {
        () = &mut settled => return Ending::Settled,
        signal = signals.next() => warn!(signal, "told again: leaving what is held pending"),
        () = tokio::time::sleep(grace) => warn!(grace_ms = grace.as_millis() as u64, "stop.grace is over: leaving what is held pending"),
    }
    stop.force();
    let _ = tokio::time::timeout(FORCED_GRACE, settled).await;
    Ending::LeftPending
}

/// Resolves when every pipeline's group has settled everything in its stream; never, unless that is asked for.
pub(super) async fn until_empty(valkey: &valkey::Endpoint, flows: &[Flow], asked: bool) {
    if !asked {
        std::future::pending::<()>().await;
    }
    let mut waits = backoff();
    loop {
        match Link::open(valkey, "tidegate:until-empty").await {
            Ok(link) => {
                waits = backoff();
                if watch_until_empty(&link, flows).await.is_ok() {
                    return;
                }
            }
            // The workers meet it too, and tell.
            Err(_) => tokio::time::sleep(waits.next().unwrap_or_default()).await,
        }
    }
}

async fn watch_until_empty(link: &Link, flows: &[Flow]) -> Result<(), Fault> {
    loop {
        let mut empty = true;
        for flow in flows {
            let pipeline = flow.lane.pipeline();
            empty &= read::backlog(link, &pipeline.stream, &pipeline.group()).await?.is_empty;
        }
        if empty {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
