//! The writing side: an increment of a counter and its delta in the stream, as one atomic step.
//!
//! Takes ids and amounts; gives the counter's new value and the entry's id. Any language can do the same with `INCRBY` and
//! `XADD` in one MULTI. This is what Rust programs, and `tidegate produce`, use: a script, because inside a MULTI a refused
//! INCRBY (another type, an overflow) does not stop the XADD behind it.
//!
//! Every entry gets a field `op`, unique for each increment, so that equal increments differ even where two primaries mint
//! the same ids. Nothing is ever sent twice: after a lost connection an increment may have happened, and is [`Unknown`].
//!
//! [`Unknown`]: ProduceError::Unknown

use std::sync::atomic::{AtomicU64, Ordering};

use crate::entry::EntryId;
use crate::keys;
use crate::pipeline::Pipeline;
use crate::retry::Fault;
use crate::valkey::{Address, Command, Connection, unexpected};

/// Increments in one call of the script: a fraction of a millisecond of the server's time, and few round trips.
pub const CHUNK: usize = 100;

/// For each counter: both or neither. Numbers stay texts, for the script's own have 53 bits. Gives a line for each, in one
/// string: a list of strings could be mistaken for something else on its way.
const ADD: &str = "
local stream, key_field, value_field, op = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local kind = redis.call('TYPE', stream)['ok']
local lines = {}
for i = 2, #KEYS do
    local counter, id, amount = KEYS[i], ARGV[2 * i], ARGV[2 * i + 1]
    local before = redis.pcall('GET', counter)
    local done = before
    if kind ~= 'none' and kind ~= 'stream' then
        done = { err = 'WRONGTYPE the stream\\'s key holds a ' .. kind }
    elseif type(before) ~= 'table' then
        done = redis.pcall('INCRBY', counter, amount)
    end
    if type(done) ~= 'table' then
        done = redis.pcall('XADD', stream, '*', key_field, id, value_field, amount, 'op', op .. '-' .. i)
        if type(done) == 'table' then
            if before then redis.call('SET', counter, before, 'KEEPTTL') else redis.call('DEL', counter) end
        end
    end
    if type(done) == 'table' then
        lines[i - 1] = '-' .. string.gsub(done['err'], '[\\r\\n]', ' ')
    else
        lines[i - 1] = redis.call('GET', counter) .. ' ' .. done
    end
end
return table.concat(lines, '\\n')";

/// Writes increments for one pipeline, on one connection. Cheap to share behind a reference: calls are pipelined.
#[derive(Debug)]
pub struct Producer {
    connection: Connection,
    pipeline: Pipeline,
    /// Names this producer in `op`.
    name: String,
    calls: AtomicU64,
    script: String,
}

/// An increment that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// The counter's value right after it.
    pub value: i64,
    /// The entry that carries the delta.
    pub entry: EntryId,
}

/// An increment that did not happen, or may not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProduceError {
    /// The server refused: neither the counter nor the stream was changed. Says why.
    #[error("refused: {0}")]
    Refused(String),
    /// The connection was lost: it may have happened. It is not tried again, which might count it twice.
    #[error("unknown whether it happened: {0}")]
    Unknown(Fault),
}

impl Producer {
    /// Connects. Fails if the server cannot be reached or refuses the credentials.
    pub async fn connect(address: &Address, pipeline: Pipeline) -> Result<Producer, Fault> {
        let connection = Connection::open(address, "tidegate:producer").await?;
        let loaded = connection.call(Command::new("SCRIPT").arg("LOAD").arg(ADD)).await?;
        let script = loaded.as_text().ok_or_else(|| unexpected("SCRIPT LOAD"))?.to_owned();
        let name = format!("{:016x}", rand::random::<u64>());
        Ok(Producer { connection, pipeline, name, calls: AtomicU64::new(0), script })
    }

    /// Adds `amount` to the counter of `id` and its delta to the stream.
    pub async fn add(&self, id: &str, amount: i64) -> Result<Added, ProduceError> {
        let mut outcomes = self.add_many(&[(id, amount)]).await;
        outcomes.pop().unwrap_or_else(|| Err(ProduceError::Unknown(unexpected("EVALSHA"))))
    }

    /// The same for many, [`CHUNK`] to a call; each for itself is atomic. Gives one outcome for each, in order.
    pub async fn add_many(&self, increments: &[(&str, i64)]) -> Vec<Result<Added, ProduceError>> {
        let mut outcomes = Vec::with_capacity(increments.len());
        for chunk in increments.chunks(CHUNK) {
            match self.call(chunk).await {
                Ok(lines) => outcomes.extend(lines),
                // The server said no to the whole script, before its first line.
                Err(Fault::Valkey { message, .. }) => {
                    outcomes.extend(chunk.iter().map(|_| Err(ProduceError::Refused(message.clone()))));
                }
                Err(fault) => outcomes.extend(chunk.iter().map(|_| Err(ProduceError::Unknown(fault.clone())))),
            }
        }
        outcomes
    }

    async fn call(&self, chunk: &[(&str, i64)]) -> Result<Vec<Result<Added, ProduceError>>, Fault> {
        let op = format!("{}-{}", self.name, self.calls.fetch_add(1, Ordering::Relaxed));
        let command = |verb: &'static str, script: &str| {
            let command = Command::new(verb).arg(script).arg(chunk.len() as i64 + 1).arg(&*self.pipeline.stream);
            let command = command.args(chunk.iter().map(|(id, _)| keys::counter(id)));
            let command = command.arg(&*self.pipeline.key_field).arg(&*self.pipeline.value_field).arg(&*op);
            chunk.iter().fold(command, |command, (id, amount)| command.arg(*id).arg(amount.to_string()))
        };
        let reply = match self.connection.call(command("EVALSHA", &self.script)).await {
            Err(Fault::Valkey { code, .. }) if code == "NOSCRIPT" => self.connection.call(command("EVAL", ADD)).await?,
            reply => reply?,
        };
        let lines: Vec<_> =
            reply.as_text().ok_or_else(|| unexpected("EVALSHA"))?.split('\n').filter_map(outcome).collect();
        if lines.len() == chunk.len() { Ok(lines) } else { Err(unexpected("EVALSHA")) }
    }
}

/// `value id`, or `-` and a reason.
fn outcome(line: &str) -> Option<Result<Added, ProduceError>> {
    if let Some(reason) = line.strip_prefix('-')
        && reason.starts_with(|c: char| !c.is_ascii_digit())
    {
        return Some(Err(ProduceError::Refused(reason.to_owned())));
    }
    let (value, entry) = line.split_once(' ')?;
    Some(Ok(Added { value: value.parse().ok()?, entry: entry.parse().ok()? }))
}
