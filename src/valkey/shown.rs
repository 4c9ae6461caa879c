//! Shown: the certificates on both ends of connections with TLS, for who looks until when they are good.
//!
//! Takes the endpoint; gives what each server shows, whatever that is worth, and what connections show to servers. A server that cannot be
//! reached shows nothing. Fails with a file that cannot be read.

use std::path::PathBuf;

use rustls::pki_types::CertificateDer;

use super::address::Form;
use super::certificates::Certificates;
use super::endpoint::Endpoint;
use super::place::{Place, dial};
use super::plain;
use super::route::primary_by_sentinel;
use crate::certificate::{Shown, Watcher};
use crate::retry::Fault;

impl Endpoint {
    /// What servers show where the url asks for TLS, each by its name for people: those that the url names, and the primaries that these lead to.
    /// None for one that cannot be reached; empty without TLS.
    ///
    /// # Errors
    /// That the authorities cannot be read that are trusted.
    pub(crate) async fn certificates(&self) -> Result<Vec<(String, Option<Shown>)>, Fault> {
        let address = self.address()?;
        let Some(certificates) = &address.tls else { return Ok(Vec::new()) };
        let mut nodes = address.nodes.clone();
        // Who leads there may be out of reach for its certificate: then that is what there is to be seen.
        match &address.form {
            Form::Primary => {}
            Form::Sentinel { service, .. } => nodes.extend(primary_by_sentinel(address, service, self).await),
            Form::Cluster => {
                nodes.extend(self.homes().await.unwrap_or_default().iter().filter_map(|home| home.node().cloned()));
            }
        }
        nodes.sort();
        nodes.dedup();
        let mut seen = Vec::new();
        for node in nodes {
            let watcher = Watcher::default();
            let connector = watcher.connector().map_err(|error| plain::tls_words("Valkey", &error.to_string()))?;
            let tls = Some((connector, node.host.clone()));
            let place = Place { node, tls, username: None, password: None, database: 0 };
            let handshake = async {
                if let Ok(socket) = dial(&place).await {
                    Watcher::leave(socket).await;
                }
            };
            // One that fails in the end, or takes too long, may have shown what there is.
            let _ = tokio::time::timeout(self.connect_timeout, handshake).await;
            seen.push((place.name(), watcher.shown(Some(certificates.trusted()?))));
        }
        Ok(seen)
    }

    /// The certificates that connections show, and the file that they are in; none where the url names none.
    ///
    /// # Errors
    /// That the file cannot be read.
    pub(crate) fn own_certificates(&self) -> Result<Option<(PathBuf, Vec<CertificateDer<'static>>)>, Fault> {
        self.address()?.tls.as_ref().map_or(Ok(None), Certificates::own)
    }
}
