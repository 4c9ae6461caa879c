//! Library: every primary of a cluster knows the functions, also one that joins later.
//!
//! Takes where the cluster is; loads the function library on each primary that has slots, and again after a connection to it was lost. It fails with what a
//! server says, and goes on with the next look. Nothing depends on it but the time until the functions are there: whoever calls one that is missing, and
//! may load the library, does so; applications without that right wait for this.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::info;

use crate::functions;
use crate::retry::{Fault, Incident};
use crate::shutdown::Stop;
use crate::valkey::{self, Connection, Home};

/// The name of its connections.
const NAME: &str = "tidegate:library";
/// How often it looks who the primaries are.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub struct Library {
    valkey: valkey::Endpoint,
    /// Where it is loaded, for as long as the connection lasts: a server that was started anew may have forgotten it.
    loaded: BTreeMap<Home, Connection>,
}

impl Library {
    /// Of this cluster.
    pub fn of(valkey: &valkey::Endpoint) -> Library {
        Library { valkey: valkey.clone(), loaded: BTreeMap::new() }
    }

    /// Looks until it is told to stop.
    pub async fn run(mut self, stop: Stop) {
        let mut incident = Incident::default();
        while !stop.is_asked() {
            let wait = match self.look().await {
                Ok(()) => {
                    incident.over(Instant::now());
                    LOOK_EVERY
                }
                Err(fault) => {
                    let response = incident.met(&fault, Instant::now());
                    if incident.is_news(response.judgement.verdict, Instant::now()) {
                        info!(%fault, advice = response.judgement.advice, "the functions are not loaded on every primary for now");
                    }
                    response.wait
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.asked() => {}
            }
        }
    }

    /// Loads it where it is not known to be. One primary that refuses keeps no other one from it.
    async fn look(&mut self) -> Result<(), Fault> {
        let homes = self.valkey.homes().await?;
        self.loaded.retain(|home, connection| homes.contains(home) && !connection.is_lost());
        let mut refused = None;
        for home in homes {
            if self.loaded.contains_key(&home) {
                continue;
            }
            match self.load(&home).await {
                Ok(connection) => drop(self.loaded.insert(home, connection)),
                Err(fault) => refused = Some(fault),
            }
        }
        refused.map_or(Ok(()), Err)
    }

    async fn load(&self, home: &Home) -> Result<Connection, Fault> {
        let connection = Connection::open(&self.valkey.at(home), NAME).await?;
        functions::load(&connection).await?;
        Ok(connection)
    }
}
