//! Connector: one connection to Valkey, opened again by whoever needs it after it broke.

use std::sync::Arc;

use tokio::sync::Mutex;

use crate::retry::Fault;
use crate::valkey::{Command, Connection, Endpoint};

/// See the module. Its users share the connection; what they send together is pipelined.
#[derive(Debug)]
pub(super) struct Connector {
    address: Endpoint,
    /// What CLIENT LIST shows.
    name: &'static str,
    connection: Mutex<Option<Arc<Connection>>>,
}

impl Connector {
    pub(super) fn new(address: &Endpoint, name: &'static str) -> Connector {
        Connector { address: address.clone(), name, connection: Mutex::new(None) }
    }

    /// The connection. Whoever comes while it is opened waits for the same one.
    pub(super) async fn connection(&self) -> Result<Arc<Connection>, Fault> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.is_lost()) {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(Connection::open_unnamed(&self.address).await?);
        // The name helps whoever reads CLIENT LIST; a user without the right to set one works all the same.
        let _ = connection.call(Command::new("CLIENT").arg("SETNAME").arg(self.name)).await;
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// Uses this connection from now on, until it is lost.
    #[cfg(feature = "near")]
    pub(super) async fn replace(&self, connection: &Arc<Connection>) {
        *self.connection.lock().await = Some(Arc::clone(connection));
    }
}
