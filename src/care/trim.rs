//! Trim: entries leave the stream when every group has settled them and the retention is over (I5).
//!
//! Takes a link and the groups that must exist; gives the line below which nothing is needed, and cuts there. The line is
//! drawn, and drawn again at the cut, by one script on the server: a group that was rewound or created in between counts.
//! What is about to be cut is compared with the ledger first, by [`super::caretaker`].

use std::ops::ControlFlow;
use std::time::Duration;

use super::session::Session;
use crate::flow::batch::{Batch, Filling, Origin};
use crate::model::entry::{EntryId, digest, write_canonical};
use crate::retry::Fault;
use crate::telemetry::trace::Trace;
use crate::valkey::{Command, Delivered, Link, info, unexpected};

/// Ids are compared as texts, by length and then by digits: they are larger than the numbers of the script's language.
///
/// Answers `missing GROUP`, `nothing`, or `LINE FLOOR CUT GROUP`: the line with and without the retention, how many entries were
/// removed, and the group that holds the line back below the retention, if one does.
const LINE_AND_CUT: &str = "
local key, retention_ms, cut_at = KEYS[1], tonumber(ARGV[1]), ARGV[2]
if redis.call('EXISTS', key) == 0 then return 'nothing' end
local function lower(a, b)
    local a_ms, a_seq = string.match(a, '(%d+)-(%d+)')
    local b_ms, b_seq = string.match(b, '(%d+)-(%d+)')
    local function less(x, y) return #x < #y or (#x == #y and x < y) end
    if a_ms == b_ms then return less(a_seq, b_seq) end
    return less(a_ms, b_ms)
end
local function least(a, b) if a == nil or lower(b, a) then return b end return a end
local seen, floor, holder = {}, nil, ''
for _, g in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local group = {}
    for i = 1, #g, 2 do group[g[i]] = g[i + 1] end
    seen[group['name']] = true
    local own = group['last-delivered-id']
    local pending = redis.call('XPENDING', key, group['name'])
    if pending[1] > 0 then own = least(own, pending[2]) end
    if floor == nil or lower(own, floor) then floor, holder = own, group['name'] end
end
for i = 3, #ARGV do
    if not seen[ARGV[i]] then return 'missing ' .. ARGV[i] end
end
local time = redis.call('TIME')
local young = time[1] * 1000 + math.floor(time[2] / 1000) - retention_ms
local old = string.format('%.0f-0', math.max(young, 0))
local line = least(floor, old)
-- Its next entry, and not only its last one, is older than the retention.
local waiting = redis.call('XRANGE', key, '(' .. floor, '+', 'COUNT', 1)
if not (waiting[1] and lower(waiting[1][1], old)) then holder = '' end
local cut = 0
if cut_at ~= '' then cut = redis.call('XTRIM', key, 'MINID', '=', least(line, cut_at)) end
local first = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)
if first[1] then floor = least(floor, first[1][1]) end
return line .. ' ' .. floor .. ' ' .. string.format('%.0f', cut) .. ' ' .. holder";

/// What the server says of a stream's past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// There is no stream, or no group on it.
    Nothing,
    /// A configured pipeline's group is missing: what it has not read is unknown, so nothing may go.
    Missing(String),
    /// Nothing below `at` is needed by anybody any more.
    At {
        /// Settled by every group, and older than the retention.
        at: EntryId,
        /// Nothing below this is in the stream or can come back into it.
        floor: EntryId,
        /// How many entries were cut.
        cut: u64,
        /// The group that has left entries unsettled for longer than the retention, if one has.
        held_by: Option<String>,
    },
}

/// Asks where the line is.
pub async fn line(link: &Link, stream: &str, groups: &[String], retention: Duration) -> Result<Line, Fault> {
    script(link, stream, groups, retention, String::new()).await
}

/// Cuts below `at`, or below the line if that is lower by now.
pub async fn cut(
    link: &Link,
    stream: &str,
    groups: &[String],
    retention: Duration,
    at: EntryId,
) -> Result<Line, Fault> {
    script(link, stream, groups, retention, at.to_string()).await
}

/// What the first entries of the stream within `first..=last` are recognised by, of `count` at the most.
pub async fn page(
    session: &mut Session,
    stream: &str,
    first: EntryId,
    last: EntryId,
    count: usize,
) -> Result<Batch, Fault> {
    let generation = session.link.generation().clone();
    let origin = Origin { generation, consumer: "caretaker".into(), trace: Trace::default() };
    let (mut filling, mut canonical) = (Filling::new(origin, usize::MAX), Vec::new());
    session.wire.send(&Command::new("XRANGE").arg(stream).arg(first).arg(last).arg("COUNT").arg(count));
    let read = session.wire.run(Duration::ZERO, |delivered| {
        match delivered {
            Delivered::Whole(id, strings) => {
                canonical.clear();
                write_canonical(&mut canonical, id, strings);
                filling.push_identity(id, digest(&canonical));
            }
            Delivered::Shortened(entry) => filling.push_identity(entry.id, entry.digest),
        }
        ControlFlow::Continue(())
    });
    read.await?;
    filling.close_run();
    Ok(filling.seal(true))
}

/// The highest id the stream ever gave, and the server's time in milliseconds; none if there is no stream.
pub async fn last_id(link: &Link, stream: &str) -> Result<Option<(EntryId, u64)>, Fault> {
    let Some(told) = info::stream(link.commands(), stream).await? else { return Ok(None) };
    Ok(Some((told.last_generated, info::time_ms(link.commands()).await?)))
}

/// Makes the stream give ids above this one only.
pub async fn raise_last_id(link: &Link, stream: &str, to: EntryId) -> Result<(), Fault> {
    link.commands().call(Command::new("XSETID").arg(stream).arg(to.to_string())).await.map(|_| ())
}

async fn script(
    link: &Link,
    stream: &str,
    groups: &[String],
    retention: Duration,
    cut_at: String,
) -> Result<Line, Fault> {
    let command = Command::new("EVAL").arg(LINE_AND_CUT).arg(1).arg(stream);
    let command = command.arg(retention.as_millis() as i64).arg(cut_at).args(groups.iter().map(String::as_str));
    let reply = link.commands().call(command).await?;
    let text = reply.as_text().ok_or_else(|| unexpected("EVAL"))?;
    if text == "nothing" {
        return Ok(Line::Nothing);
    }
    if let Some(group) = text.strip_prefix("missing ") {
        return Ok(Line::Missing(group.to_owned()));
    }
    let mut words = text.splitn(4, ' ');
    let parse = |words: &mut std::str::SplitN<'_, char>| {
        Some(Line::At {
            at: words.next()?.parse().ok()?,
            floor: words.next()?.parse().ok()?,
            cut: words.next()?.parse().ok()?,
            held_by: words.next().filter(|group| !group.is_empty()).map(str::to_owned),
        })
    };
    parse(&mut words).ok_or_else(|| unexpected("EVAL"))
}
