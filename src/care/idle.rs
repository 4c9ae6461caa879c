//! Idle: the lanes of producers that are gone are forgotten, so that they do not add up.
//!
//! Takes a shard's state; forgets each lane whose number has stood still for long. Fails with what a server says.
//!
//! A lane may not be forgotten while it is used: an increment that is sent again in that moment would count twice. Its name tells by the producer's clock when it
//! was made, and that clock may be wrong by days. So the name only says which lanes need no look (those of the last day), and what counts is what
//! this look and those before have seen: a note beside the lane holds its number, and in how many hours it was found unchanged. Hours are counted
//! and not subtracted: a server whose clock jumps makes them one more, whichever way it jumps, and however many daemons look in one hour.

use std::collections::BTreeSet;

use crate::client::lane_hour;
use crate::retry::Fault;
use crate::valkey::{Command, Link, info, unexpected};

/// A producer gives a lane up when it is so old: a younger one is not looked at.
const YOUNG_HOURS: u64 = 24;
/// A lane whose number was found unchanged in so many hours is forgotten. No producer sends the same increment for so long.
const IDLE_HOURS: u64 = 48;
/// Fields read in one step.
const STEP: usize = 1_000;
/// What a lane's field begins with, and what its note's does.
const PREFIXES: [&str; 2] = ["lane:", "idle:"];

/// Looks at some lanes; forgets those that are idle. Of each, the number and the note are read and written in one step: nobody uses it in between. A server whose
/// memory is full would refuse the notes, and forgetting makes room: hence the flag.
const LOOK: &str = "#!lua flags=allow-oom
local state, hour, idle = KEYS[1], ARGV[1], tonumber(ARGV[2])
for n = 3, #ARGV do
    local lane, note = 'lane:' .. ARGV[n], 'idle:' .. ARGV[n]
    local number = redis.call('HGET', state, lane)
    local known, hours, at = string.match(redis.call('HGET', state, note) or '', '^(%S*) (%d+) (%d+)$')
    if not number then
        redis.call('HDEL', state, note)
    elseif known ~= number then
        redis.call('HSET', state, note, number .. ' 0 ' .. hour)
    elseif at ~= hour then
        if hours + 1 >= idle then
            redis.call('HDEL', state, lane, note)
        else
            redis.call('HSET', state, note, number .. ' ' .. string.format('%.0f', hours + 1) .. ' ' .. hour)
        end
    end
end";

/// Looks at all lanes of a shard's state, once.
pub(super) async fn look(link: &Link, state: &str) -> Result<(), Fault> {
    let hour = info::time_ms(link.commands()).await? / 3_600_000;
    let mut cursor = "0".to_owned();
    loop {
        let scan = Command::new("HSCAN").arg(state).arg(&cursor).arg("COUNT").arg(STEP);
        let mut parts = link.commands().call(scan).await?.into_array().ok_or_else(|| unexpected("HSCAN"))?;
        let (next, pairs) = parts.next().zip(parts.next()).ok_or_else(|| unexpected("HSCAN"))?;
        let lane = |field: &'_ [u8]| {
            let field = std::str::from_utf8(field).ok()?;
            let name = PREFIXES.iter().find_map(|prefix| field.strip_prefix(prefix))?;
            is_to_be_looked_at(name, hour).then(|| name.to_owned())
        };
        let lanes: BTreeSet<String> = pairs.strings().step_by(2).filter_map(lane).collect();
        if !lanes.is_empty() {
            let look = Command::new("EVAL").arg(LOOK).arg(1).arg(state).arg(hour).arg(IDLE_HOURS);
            link.commands().call(look.args(&lanes)).await?;
        }
        cursor = next.as_text().ok_or_else(|| unexpected("HSCAN"))?.to_owned();
        if cursor == "0" {
            return Ok(());
        }
    }
}

/// Whether a lane of this name may be idle: by its producer's clock it is older than a day, or it will be made in the future. A name that tells no hour is
/// another program's, which is to use it for ever.
fn is_to_be_looked_at(name: &str, now: u64) -> bool {
    lane_hour(name).is_some_and(|made| !(now.saturating_sub(YOUNG_HOURS)..=now).contains(&made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_of_the_last_day_and_those_without_an_hour_are_not_looked_at() {
        let now = 500_000;
        let is = |made: u64| is_to_be_looked_at(&format!("{made:x}-0123456789abcdef"), now);
        assert!(
            !is(now) && !is(now - YOUNG_HOURS) && is(now - YOUNG_HOURS - 1) && is(now + 1) && is(0) && is(u64::MAX)
        );
        assert!(
            !is_to_be_looked_at("lane", now) && !is_to_be_looked_at("my-lane", now) && !is_to_be_looked_at("", now)
        );
    }
}
