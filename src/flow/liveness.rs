//! Liveness: whether a consumer that holds entries, or only a name, is still at work.
//!
//! Takes a consumer as the group knows it; gives whether it lives, has gone, or is silent. Gone: its connection no longer exists
//! in the same life of the server, which the server knows at once. Silent: nothing was heard of it for `reclaim.dead_after`;
//! this decides where the server may not be asked, for consumers of another life of the server, and for connections that
//! linger. To take a living one's entries would be harmless and only waste work.

use std::time::Duration;

use crate::model::names;
use crate::retry::Fault;
use crate::valkey::info::{self, Consumer};
use crate::valkey::{Command, Link};

/// A consumer that holds nothing and has been silent this many times `dead_after` is removed.
const REMOVE_AFTER: u32 = 10;

/// Checks and deletes in one step, so that nothing can be delivered to the consumer in between.
const REMOVE_IF_EMPTY: &str = "
local consumers = redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
for _, c in ipairs(consumers) do
    local held = {}
    for i = 1, #c, 2 do held[c[i]] = c[i + 1] end
    if held['name'] == ARGV[2] and held['pending'] == 0 and held['idle'] >= tonumber(ARGV[3]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
        return 1
    end
end
return 0";

/// Whether a consumer is still at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It is connected, or was heard of lately.
    Alive,
    /// Its connection no longer exists.
    Gone,
    /// Nothing was heard of it for so long that it is taken for dead.
    Silent,
}

/// Whether silence says anything yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// This server was met too lately: idle times on a promoted replica are stale, and nobody had the time to speak.
    SaysNothing,
    /// Whoever lives has had the time to speak.
    Tells,
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
        self.remove_if_empty(link, &consumer.name, self.min_idle(liveness)).await
    }

    /// Takes a consumer out of the group, if it holds nothing and has been idle for so long.
    pub async fn remove_if_empty(&self, link: &Link, consumer: &str, idle: Duration) -> Result<(), Fault> {
        let command = Command::new("EVAL").arg(REMOVE_IF_EMPTY).arg(1).arg(&*self.stream);
        let command = command.arg(&*self.group).arg(consumer).arg(idle.as_millis());
        link.commands().call(command).await.map(|_| ())
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
