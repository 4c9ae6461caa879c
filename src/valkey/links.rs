//! Links: those of one purpose, one to each server that has any of the streams.
//!
//! Takes streams; gives for each a link to the server that has it. Where there is one primary that is one link, in a cluster one for each
//! primary, however many streams there are.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::endpoint::{Endpoint, Home};
use super::link::Link;
use crate::retry::Fault;

/// See the module.
#[derive(Debug)]
pub struct Links {
    endpoint: Endpoint,
    name: &'static str,
    open: BTreeMap<Home, Arc<Link>>,
    /// To where a stream is on its way: good for that stream alone.
    ahead: Option<Arc<Link>>,
}

impl Links {
    /// None yet. `name`: that of their connections.
    pub fn to(endpoint: &Endpoint, name: &'static str) -> Links {
        Links { endpoint: endpoint.clone(), name, open: BTreeMap::new(), ahead: None }
    }

    /// Looks at a stream on the link to the server that has it; once more where that server says that the stream is elsewhere.
    ///
    /// # Errors
    /// What the look, or the server, or those who were asked for the way to it, said last.
    pub async fn look<T>(&mut self, stream: &str, look: impl AsyncFn(&Link) -> Result<T, Fault>) -> Result<T, Fault> {
        match look(self.of_stream(stream).await?).await {
            Err(fault) if fault.is_redirection() => look(self.ahead_of(stream).await?).await,
            found => found,
        }
    }

    /// A link to the server that has this stream now: in a cluster that server is asked first, and followed.
    ///
    /// # Errors
    /// As [`Links::of_stream`].
    pub async fn to_stream(&mut self, stream: &str) -> Result<Arc<Link>, Fault> {
        let link = self.of_stream(stream).await?.clone();
        if link.is_asking() || link.has(stream).await? {
            return Ok(link);
        }
        self.ahead_of(stream).await.cloned()
    }

    /// A link to this server, whatever it has.
    ///
    /// # Errors
    /// What the server says, or that it is out of reach.
    pub async fn at(&mut self, home: &Home) -> Result<Arc<Link>, Fault> {
        self.open.retain(|_, link| !link.is_lost());
        if !self.open.contains_key(home) {
            let link = Link::open(&self.endpoint.at(home), self.name).await?;
            self.open.insert(home.clone(), Arc::new(link));
        }
        Ok(Arc::clone(&self.open[home]))
    }

    /// Whether any that was open is lost, or none is open yet.
    pub fn have_changed(&self) -> bool {
        self.open.is_empty() || self.open.values().any(|link| link.is_lost())
    }

    /// A link to the server that has a stream, or any other key, as far as is known. Where the server says that it is elsewhere the link is
    /// lost, and the next one leads there.
    ///
    /// # Errors
    /// What those said who were asked for the way to it, or the server.
    pub async fn of_stream(&mut self, stream: &str) -> Result<&Arc<Link>, Fault> {
        let home = self.endpoint.home_of(stream).await?;
        self.open.retain(|_, link| !link.is_lost());
        if !self.open.contains_key(&home) {
            return self.ahead_of(stream).await;
        }
        Ok(&self.open[&home])
    }

    /// A new link, to wherever the stream is.
    async fn ahead_of(&mut self, stream: &str) -> Result<&Arc<Link>, Fault> {
        let link = Arc::new(Link::open(&self.endpoint.of_stream(stream), self.name).await?);
        if link.is_asking() {
            return Ok(self.ahead.insert(link));
        }
        Ok(self.open.entry(link.commands().home()).insert_entry(link).into_mut())
    }
}
