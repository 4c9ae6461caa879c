//! Liveness: whether a consumer that holds entries, or only a name, is still at work.
//!
//! Takes a consumer as the group knows it; gives whether it lives, has gone, or is silent. Gone: its connection no longer exists
//! in the same life of the server, which the server knows at once; or it was a connection to another server, or to another life of this
//! one, on which nobody reads this stream any more, and whoever had it has had the time to come here. Silent: nothing was heard of it for
//! `reclaim.dead_after`; this decides where the server may not be asked, and for connections that linger. To take a living one's
//! entries would be harmless and only waste work.

use std::time::{Duration, Instant};

use crate::model::entry::Generation;
use crate::model::names;
use crate::retry::{BACKOFF_MAX, Fault};
use crate::valkey::info::{self, Consumer};
use crate::valkey::{Command, Link};

/// A consumer that holds nothing and has been silent this many times `dead_after` is removed.
const REMOVE_AFTER: u32 = 10;

/// Checks and deletes in one step, so that nothing can be delivered to the consumer in between.
const REMOVE_IF_EMPTY: &str = "
local consumers = server.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
for _, c in ipairs(consumers) do
    local held = {}
    for i = 1, #c, 2 do held[c[i]] = c[i + 1] end
    if held['name'] == ARGV[2] and held['pending'] == 0 and held['idle'] >= tonumber(ARGV[3]) then
        server.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
        return 1
    end
end
return 0";

/// Whether a consumer is still at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It is connected, or was heard of lately.
    Alive,
    /// Its connection no longer exists, or leads to where the stream is not.
    Gone,
    /// Nothing was heard of it for so long that it is taken for dead.
    Silent,
}

/// Whether silence says anything yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// This server was met too lately: idle times on a promoted replica are stale, and nobody had the time to speak.
    SaysNothing,
    /// Who came from another server, and lives, has had the time to speak: it tries again after [`BACKOFF_MAX`] at the latest.
    TellsOfNewcomers,
    /// Whoever lives has had the time to speak.
    Tells,
}

impl Silence {
    /// What silence says so long after this server was met.
    pub fn after(met_for: Duration, gone_after: Duration, dead_after: Duration) -> Silence {
        match met_for {
            _ if met_for >= dead_after => Silence::Tells,
            _ if met_for >= gone_after + BACKOFF_MAX => Silence::TellsOfNewcomers,
            _ => Silence::SaysNothing,
        }
    }
}

/// The consumers of one pipeline's group: who lives, who may be removed.
#[derive(Debug)]
pub struct Roster {
    stream: String,
    group: String,
    /// What the names of the pipeline's connections begin with.
    connections: String,
    gone_after: Duration,
    dead_after: Duration,
    /// Whether this user may ask for the server's connections; found out by asking.
    may_ask: bool,
}

impl Roster {
    /// For the group of one pipeline.
    pub fn new(
        stream: String,
        group: String,
        connections: String,
        gone_after: Duration,
        dead_after: Duration,
    ) -> Roster {
        Roster { stream, group, connections, gone_after, dead_after, may_ask: true }
    }

    /// How long an entry must have been held before it may be taken from a consumer in this state.
    pub fn min_idle(&self, liveness: Liveness) -> Duration {
        match liveness {
            Liveness::Gone => self.gone_after,
            Liveness::Alive | Liveness::Silent => self.dead_after,
        }
    }

    /// Looks at one consumer. The server is asked only about one that has been quiet for `reclaim.gone_after`.
    pub async fn look(&mut self, link: &Link, consumer: &Consumer, silence: Silence) -> Result<Liveness, Fault> {
        if consumer.idle < self.gone_after {
            return Ok(Liveness::Alive);
        }
        if let Some(number) = names::connection_of(&consumer.name, &link.generation().run_id)
            && self.may_ask
        {
            match info::peers(link.commands(), Some(number)).await {
                Ok(peers) if !peers.iter().any(|peer| self.is_named(&peer.name, &consumer.name)) => {
                    return Ok(Liveness::Gone);
                }
                Ok(_) => {}
                // Not permitted, or too old a server: asked no more.
                Err(Fault::Valkey { .. }) => self.may_ask = false,
                Err(fault) => return Err(fault),
            }
        }
        // A worker that lives speaks for the consumers that it was before, too.
        if silence != Silence::SaysNothing && names::is_of_another_life(&consumer.name, &link.generation().run_id) {
            return Ok(Liveness::Gone);
        }
        let is_silent = silence == Silence::Tells && consumer.idle >= self.dead_after;
        Ok(if is_silent { Liveness::Silent } else { Liveness::Alive })
    }

    /// Takes a dead consumer that holds nothing out of the group; a silent one after a longer while, and its connection with it:
    /// if it wakes up, what it then says must not reach the group.
    pub async fn remove(&self, link: &Link, consumer: &Consumer, liveness: Liveness) -> Result<(), Fault> {
        match liveness {
            Liveness::Alive => return Ok(()),
            Liveness::Silent if consumer.idle < self.dead_after * REMOVE_AFTER => return Ok(()),
            Liveness::Silent => self.disconnect(link, &consumer.name).await?,
            Liveness::Gone => {}
        }
        remove_if_empty(link, (&self.stream, &self.group), &consumer.name, self.min_idle(liveness)).await
    }

    /// Ends the connection of a consumer. Where that is not permitted it stays: a replay ends it before it matters.
    pub async fn disconnect(&self, link: &Link, consumer: &str) -> Result<(), Fault> {
        let number = names::connection_of(consumer, &link.generation().run_id);
        let peers = match info::peers(link.commands(), number).await {
            Err(Fault::Valkey { .. }) => return Ok(()),
            peers => peers?,
        };
        for peer in peers.iter().filter(|peer| self.is_named(&peer.name, consumer)) {
            let killed = link.commands().call(Command::new("CLIENT").arg("KILL").arg("ID").arg(peer.id)).await;
            match killed {
                // It is gone by now, or it is not permitted.
                Ok(_) | Err(Fault::Valkey { .. }) => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }

    /// Whether a connection of this name belongs to this consumer, by the names of this version or of those before.
    fn is_named(&self, connection: &str, consumer: &str) -> bool {
        connection.strip_prefix(&self.connections) == Some(consumer) || connection == names::former_connection(consumer)
    }
}

/// Removes a consumer from a group unless it holds entries, or did anything within this time.
pub async fn remove_if_empty(
    link: &Link,
    (stream, group): (&str, &str),
    consumer: &str,
    idle: Duration,
) -> Result<(), Fault> {
    let command = Command::new("EVAL").arg(REMOVE_IF_EMPTY).arg(1).arg(stream);
    link.commands().call(command.arg(group).arg(consumer).arg(idle.as_millis())).await.map(|_| ())
}

/// One life of one server, with one history of writes, and when it was first met. It outlasts sessions: whatever closes
/// connections sooner than after `reclaim.dead_after` must not keep the dead from being found.
#[derive(Debug)]
pub struct Met {
    run_id: String,
    replication_id: String,
    at: Instant,
}

impl Met {
    /// Meets a server, which may be the one that was met before.
    pub fn meet(met: &mut Option<Met>, server: &Generation) {
        let is_the_same = |met: &Met| met.run_id == server.run_id && met.replication_id == server.replication_id;
        if !met.as_ref().is_some_and(is_the_same) {
            let (run_id, replication_id) = (server.run_id.clone(), server.replication_id.clone());
            *met = Some(Met { run_id, replication_id, at: Instant::now() });
        }
    }

    /// What silence tells by now, on this server.
    pub fn silence(met: &Option<Met>, gone_after: Duration, dead_after: Duration) -> Silence {
        let after = |met: &Met| Silence::after(met.at.elapsed(), gone_after, dead_after);
        met.as_ref().map_or(Silence::SaysNothing, after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_tells_of_those_who_came_from_elsewhere_sooner_than_of_others() {
        let [gone, dead] = [2, 30].map(Duration::from_secs);
        let after = |seconds| Silence::after(Duration::from_secs(seconds), gone, dead);
        assert_eq!(
            [0, 6, 7, 29, 30].map(after),
            [
                Silence::SaysNothing,
                Silence::SaysNothing,
                Silence::TellsOfNewcomers,
                Silence::TellsOfNewcomers,
                Silence::Tells
            ]
        );
        assert_eq!(Silence::after(gone, gone, gone), Silence::Tells, "a short time of death holds for all");
    }
}
