//! News: which of many streams have been written to, as the server says unasked.
//!
//! Takes a link and the streams; gives those that were written since it was asked last. A read that waits costs the server time for each stream that it
//! names, and it must be sent again whenever one of them gets an entry. So where there are many streams no read waits: the server broadcasts which keys
//! are written (`CLIENT TRACKING`), on a connection of its own, and only those streams are read.
//!
//! It is a hint and no more. What is not heard of is found by the next look at all streams. Where the server refuses, says too much, or cannot be
//! heard, nobody listens: then streams are read as if there were no news. It cannot fail.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::retry::Fault;
use crate::valkey::{Command, Link, Pushed};

/// From so many streams on: fewer are named by a read that waits at less cost than by a connection more.
const WORTH_IT_FROM: usize = 64;
/// How long a silent connection is trusted, and how long it may then be silent when asked for a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// How soon it is tried again after the connection was lost, was refused, or said too much.
const AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Told of more writes in a second, looking at all streams ten times a second is cheaper for everybody.
const MOST_IN_A_SECOND: usize = 20_000;
/// The name of its connections.
const NAME: &str = "tidegate:news";

/// See the module.
#[derive(Debug)]
pub struct News {
    /// The lane of each stream. Empty where there are too few of them.
    lanes: HashMap<Box<[u8]>, usize>,
    /// What their names have in common.
    prefix: String,
    heard: Mutex<Heard>,
    /// Rung when there is something to be read.
    rung: Notify,
}

#[derive(Debug, Default)]
struct Heard {
    listens: bool,
    /// Any of them may have been written.
    all: bool,
    lanes: BTreeSet<usize>,
}

/// What there is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Nobody listens, so nobody knows.
    Unknown,
    /// Any stream may have something.
    Any,
    /// These may, of all that were not looked at since.
    Of(BTreeSet<usize>),
}

impl News {
    /// Of these streams, in the order of their lanes.
    pub fn of<'a>(streams: impl ExactSizeIterator<Item = &'a str> + Clone) -> News {
        let prefix = common_prefix(streams.clone()).to_owned();
        let is_worth_it = streams.len() >= WORTH_IT_FROM && !prefix.is_empty();
        let lanes = streams.filter(|_| is_worth_it).enumerate().map(|(lane, stream)| (stream.as_bytes().into(), lane));
        News { lanes: lanes.collect(), prefix, heard: Mutex::default(), rung: Notify::new() }
    }

    /// What was heard since this was asked last.
    pub fn take(&self) -> Told {
        let mut heard = self.heard();
        let lanes = std::mem::take(&mut heard.lanes);
        match (heard.listens, std::mem::take(&mut heard.all)) {
            (false, _) => Told::Unknown,
            (true, true) => Told::Any,
            (true, false) => Told::Of(lanes),
        }
    }

    /// Resolves when there is something to be taken.
    pub async fn rung(&self) {
        self.rung.notified().await;
    }

    /// Nobody listens any more.
    pub fn is_over(&self) {
        *self.heard() = Heard::default();
        self.rung.notify_one();
    }

    /// Listens for as long as it is polled, on connections to this link's server.
    pub async fn listen(&self, link: &Link) -> Infallible {
        if self.lanes.is_empty() {
            return std::future::pending().await;
        }
        loop {
            match self.hear(link).await {
                Ok(()) => debug!(prefix = %self.prefix, "too many streams are written to: all of them are read"),
                Err(fault) => {
                    debug!(prefix = %self.prefix, %fault, "nobody says which streams are written to: all of them are read")
                }
            }
            self.is_over();
            sleep(AGAIN_AFTER).await;
        }
    }

    /// One connection's life: until it is lost, or more is said than is worth hearing.
    async fn hear(&self, link: &Link) -> Result<(), Fault> {
        let mut listener = link.commands().open_listener(NAME, HEARTBEAT).await?;
        let tracking = Command::new("CLIENT").arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX");
        listener.call(&tracking.arg(&self.prefix)).await?;
        // What was written before is not said.
        *self.heard() = Heard { listens: true, all: true, lanes: BTreeSet::new() };
        self.rung.notify_one();
        let (mut is_asked, mut since, mut said) = (false, Instant::now(), 0);
        loop {
            let pushed = match timeout(HEARTBEAT, listener.next()).await {
                Ok(pushed) => pushed?,
                Err(_) if is_asked => {
                    return Err(Fault::ValkeyLost("the server says nothing on this connection".into()));
                }
                Err(_) => {
                    is_asked = true;
                    listener.ping().await?;
                    continue;
                }
            };
            is_asked = false;
            if since.elapsed() > Duration::from_secs(1) {
                (since, said) = (Instant::now(), 0);
            }
            if let Pushed::Keys(keys) = &pushed {
                said += keys.len();
            }
            if said > MOST_IN_A_SECOND {
                return Ok(());
            }
            self.note(&pushed);
        }
    }

    fn note(&self, pushed: &Pushed) {
        let mut heard = self.heard();
        match pushed {
            Pushed::Keys(keys) => heard.lanes.extend(keys.iter().filter_map(|key| self.lanes.get(key.as_ref()))),
            Pushed::All => heard.all = true,
            Pushed::Pong => return,
        }
        drop(heard);
        self.rung.notify_one();
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        // Whoever held it did nothing but note.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all of these begin with.
fn common_prefix<'a>(mut names: impl Iterator<Item = &'a str>) -> &'a str {
    let Some(first) = names.next() else { return "" };
    names.fold(first, |prefix, name| {
        let same = prefix.char_indices().zip(name.chars()).take_while(|((_, a), b)| a == b);
        &prefix[..same.last().map_or(0, |((at, a), _)| at + a.len_utf8())]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn streams(count: usize) -> Vec<String> {
        (0..count).map(|shard| format!("flush:zähler:{{{shard}}}")).collect()
    }

    fn news(count: usize) -> News {
        News::of(streams(count).iter().map(String::as_str).collect::<Vec<_>>().into_iter())
    }

    #[test]
    fn what_is_heard_is_given_once_and_what_is_strange_is_not() {
        let news = news(64);
        assert_eq!(news.take(), Told::Unknown);
        news.heard().listens = true;
        let keys = ["flush:zähler:{7}", "flush:zähler:{63}", "flush:zähler:{64}", "flush:zähler:{7}"];
        news.note(&Pushed::Keys(keys.map(|key| Bytes::from_static(key.as_bytes())).into()));
        assert_eq!(news.take(), Told::Of([7, 63].into()));
        assert_eq!(news.take(), Told::Of(BTreeSet::new()));
        news.note(&Pushed::All);
        assert_eq!(news.take(), Told::Any);
        news.is_over();
        assert_eq!(news.take(), Told::Unknown);
    }

    #[test]
    fn few_streams_are_not_listened_to() {
        assert!(news(63).lanes.is_empty() && news(0).lanes.is_empty());
        assert_eq!((news(64).lanes.len(), &*news(64).prefix), (64, "flush:zähler:{"));
        // The stream of a single shard from before is one of them.
        let mut with_former = streams(64);
        with_former.push("flush:zähler".into());
        let news = News::of(with_former.iter().map(String::as_str).collect::<Vec<_>>().into_iter());
        assert_eq!((news.lanes.len(), &*news.prefix), (65, "flush:zähler"));
    }

    #[test]
    fn a_prefix_ends_between_characters() {
        assert_eq!(common_prefix(["flush:ä1", "flush:ö1"].into_iter()), "flush:");
        assert_eq!(common_prefix(["a", "b"].into_iter()), "");
        assert_eq!(common_prefix(["same", "same"].into_iter()), "same");
        assert_eq!(common_prefix(std::iter::empty()), "");
    }
}
