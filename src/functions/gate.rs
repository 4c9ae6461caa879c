//! Gate: whether values of a managed shard may be put in place, and on whose word.
//!
//! Takes a link and the shard's keys; opens, closes, or tells. Fails with what a server says. The gate is a fact in Valkey, in the shard's state: it opens
//! when a daemon has said which PostgreSQL the shard is flushed into; whoever finds that values may be wrong closes it, and it opens again when all of
//! them were dropped. By itself it is closed while the group stands before where it once stood.

use super::{Call, Function, NO_FUNCTION, Status, load};
use crate::client::invalidate::{literal, scan, unlink};
use crate::model::entry::EntryId;
use crate::model::pipeline::ShardKeys;
use crate::retry::Fault;
use crate::valkey::{Command, Connection, Link, unexpected};

/// On whose word a shard begins to be managed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Nobody's: only a stream that never had an entry, or a shard that is managed already.
    Nobodys,
    /// An operator's: its stream has entries, and what its counters held before is dropped.
    Adopt,
    /// An operator's: it is another PostgreSQL than before, or there is another number of shards.
    Accept,
}

/// What opening came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// The shard is managed.
    Managed,
    /// Its stream has had entries while it was not: an operator must say that it is to be adopted.
    Unadopted,
    /// It is managed for this other lineage.
    Other(String),
}

/// Where a shard stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Whether values may be put in place.
    pub is_open: bool,
    /// Every entry below it is settled; none where there is no group.
    pub frontier: Option<EntryId>,
    /// How far it was settled when counters were last made clean.
    pub settled: Option<EntryId>,
    /// How many counters have entries that are not settled.
    pub dirty: u64,
    /// Why all values are to be dropped, if they are.
    pub closed: Option<String>,
    /// What it is managed for; none if it is not managed.
    pub lineage: Option<String>,
}

/// Begins to manage a shard.
pub async fn open(connection: &Connection, keys: &ShardKeys, lineage: &str, word: Word) -> Result<Opened, Fault> {
    let word = match word {
        Word::Nobodys => "open",
        Word::Adopt => "adopt",
        Word::Accept => "accept",
    };
    let call = Call::new(Function::Open, [&keys.stream, &keys.state]).arg(lineage).arg(word);
    let answer = call.send(connection).await?;
    match answer.status {
        Status::Done => Ok(Opened::Managed),
        Status::Miss => Ok(Opened::Unadopted),
        Status::Refused => Ok(Opened::Other(answer.text(0).unwrap_or_default().to_owned())),
        _ => Err(unexpected("FCALL")),
    }
}

/// All values are in doubt: none is put in place until all of them were dropped.
pub async fn close(connection: &Connection, keys: &ShardKeys, why: &str) -> Result<(), Fault> {
    Call::new(Function::Close, [&keys.state]).arg(why).send(connection).await.map(drop)
}

/// The same, where the library may be missing: then it is loaded first.
pub async fn close_surely(connection: &Connection, keys: &ShardKeys, why: &str) -> Result<(), Fault> {
    match close(connection, keys, why).await {
        Err(Fault::Valkey { code, .. }) if code == NO_FUNCTION => {
            load(connection).await?;
            close(connection, keys, why).await
        }
        closed => closed,
    }
}

/// Drops all values of the shard on this server; then the gate opens, unless it was closed for another reason meanwhile. Gives how many there were.
///
/// In a cluster it fails while the shard's slot is on its way, for then some of its values are on another server.
pub async fn drop_all(link: &Link, keys: &ShardKeys, why: &str) -> Result<u64, Fault> {
    let (pattern, mut cursor, mut count) = (counters(keys), "0".to_owned(), 0);
    let connection = link.commands();
    are_together(link, keys).await?;
    loop {
        let step = scan(connection, &cursor, &pattern).await?;
        count += unlink(connection, &step.keys).await?;
        match step.next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    are_together(link, keys).await?;
    // A slot that left and came back meanwhile has brought values along: they may lie behind the cursor.
    if !link.is_same_server().await? {
        return Err(Fault::ValkeyLost("another server has the shard by now, or it was elsewhere meanwhile".into()));
    }
    Call::new(Function::Reopen, [&keys.state]).arg(why).send(connection).await?;
    Ok(count)
}

/// Fails while the shard's slot is moved key by key: a server then refuses a command about a key that it has and one that it has not (TRYAGAIN), and sends
/// on where it has neither.
async fn are_together(link: &Link, keys: &ShardKeys) -> Result<(), Fault> {
    let is_cluster = link.config_epoch().is_some();
    let (state, absent) = (&keys.state, format!("{}:absent", keys.state));
    match is_cluster {
        true => link.commands().call(Command::new("EXISTS").arg(state).arg(absent)).await.map(drop),
        false => Ok(()),
    }
}

/// Whether the shard has a value that nobody manages: without a TTL, and unknown to the index.
pub async fn has_plain_values(connection: &Connection, keys: &ShardKeys) -> Result<bool, Fault> {
    let (pattern, mut cursor) = (counters(keys), "0".to_owned());
    loop {
        let step = scan(connection, &cursor, &pattern).await?;
        for key in &step.keys {
            let Some(id) = std::str::from_utf8(key).ok().and_then(|key| keys.id_of(key)) else { continue };
            let left = connection.call(Command::new("PTTL").bytes(key)).await?.as_int();
            let is_known = connection.call(Command::new("HEXISTS").arg(&keys.index).arg(id)).await?.as_int() == Some(1);
            if left == Some(-1) && !is_known {
                return Ok(true);
            }
        }
        match step.next {
            Some(next) => cursor = next,
            None => return Ok(false),
        }
    }
}

/// The pattern of the shard's counters.
pub fn counters(keys: &ShardKeys) -> String {
    format!("{}:*", literal(&keys.counters))
}

/// Where the shard stands.
pub async fn standing(connection: &Connection, keys: &ShardKeys) -> Result<Standing, Fault> {
    let call = Call::new(Function::Status, [&keys.stream, &keys.index, &keys.state]).arg(&keys.group);
    let answer = call.send(connection).await?;
    let text = |n| answer.text(n).filter(|text| !text.is_empty()).map(str::to_owned);
    let id = |n| answer.text(n).and_then(|text| text.parse().ok());
    Ok(Standing {
        is_open: answer.status == Status::Done,
        frontier: id(0),
        settled: id(1),
        dirty: answer.int(2).unwrap_or(0).unsigned_abs(),
        closed: text(3),
        lineage: text(4),
    })
}
