//! The caretaker of a stream: trims it, compacts its ledger, and looks for what Valkey lost.
//!
//! One a stream in each process; several of them do each other no harm. It holds nothing and is never needed for a delta to
//! land: when it fails, the stream and the ledger grow, and it says so.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tracing::{error, info, warn};

use super::compact;
use super::trim::{self, Line};
use crate::failpoint;
use crate::flow::flush::Lane;
use crate::flow::judge;
use crate::flow::ledger::{self, Extent};
use crate::lanes;
use crate::model::entry::EntryId;
use crate::postgres::Database;
use crate::retry::{Fault, Incident, Verdict};
use crate::shutdown::Stop;
use crate::telemetry::contract::Metrics;
use crate::valkey::{self, Link};

/// Entries compared with the ledger, then cut, in one step: a few milliseconds of the server's time.
const STEP: usize = 1_000;
/// So many entries found where the ledger has them, newest first, and the rest is taken to be there too: what a failover
/// loses is the newest.
const INTACT_IS_ENOUGH: usize = 100_000;
/// How far ahead of the server's clock a stream's last id may be raised. At the highest id of all a stream refuses XADD
/// for good; a clock that is this wrong is a matter for people.
const AHEAD_OF_CLOCK: Duration = Duration::from_secs(10);
/// How often an alarm that lasts is repeated.
const REMIND_AFTER: Duration = Duration::from_secs(30);

/// What a caretaker is made of.
#[derive(Debug, Clone)]
pub struct CaretakerSetup {
    /// Where Valkey is.
    pub valkey: valkey::Endpoint,
    /// PostgreSQL.
    pub database: Database,
    /// The Valkey deployment's name.
    pub source: String,
    /// The stream.
    pub stream: String,
    /// All configured pipelines that read it, with their counters.
    pub lanes: Vec<(Lane, Arc<Metrics>)>,
    /// How long settled entries stay.
    pub retention: Duration,
    /// How often it trims.
    pub trim_every: Duration,
    /// How old ledger rows are when they are merged.
    pub compact_margin: Duration,
    /// How often it merges them.
    pub compact_every: Duration,
    /// Rung when a worker had to create the group.
    pub regrouped: Arc<Notify>,
}

/// See the module.
#[derive(Debug)]
pub struct Caretaker {
    setup: CaretakerSetup,
    groups: Vec<String>,
    incident: Incident,
    alarm: Option<Instant>,
}

impl Caretaker {
    /// For one stream.
    pub fn new(setup: CaretakerSetup) -> Caretaker {
        let groups = setup.lanes.iter().map(|(lane, _)| lane.pipeline().group()).collect();
        Caretaker { setup, groups, incident: Incident::default(), alarm: None }
    }

    /// Takes care until it is told to stop.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            let cared = match Link::open(&self.setup.valkey, "tidegate:caretaker").await {
                Ok(link) => self.care(&link, &stop).await,
                Err(fault) => Err(fault),
            };
            let Err(fault) = cared else { break };
            let response = self.incident.met(&fault, Instant::now());
            if response.tell && response.attempts > 1 {
                let (stream, advice) = (&self.setup.stream, response.judgement.advice);
                match response.judgement.verdict {
                    Verdict::Halt => error!(%stream, %fault, advice, "the stream is not trimmed"),
                    _ => warn!(%stream, %fault, advice, "the stream is not trimmed for now"),
                }
            }
            tokio::select! {
                () = tokio::time::sleep(response.wait) => {}
                () = stop.asked() => {}
            }
        }
    }

    /// One link's life. A new link may lead to another server: what is lost is looked for first.
    async fn care(&mut self, link: &Link, stop: &Stop) -> Result<(), Fault> {
        self.look_upstream(link, stop).await?;
        // Not at once: the workers have yet to create the groups.
        let later = |every| tokio::time::interval_at(tokio::time::Instant::now() + every, every);
        let (mut trim, mut compact) = (later(self.setup.trim_every), later(self.setup.compact_every));
        trim.set_missed_tick_behavior(MissedTickBehavior::Delay);
        compact.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let regrouped = self.setup.regrouped.clone();
        loop {
            tokio::select! {
                () = stop.asked() => return Ok(()),
                () = regrouped.notified() => self.look_upstream(link, stop).await?,
                _ = trim.tick() => self.trim(link, stop).await?,
                _ = compact.tick() => self.compact(link, stop).await?,
            }
            self.incident.over(Instant::now());
        }
    }

    /// Cuts what is settled by everybody and older than the retention, as far as the ledger vouches for it.
    async fn trim(&mut self, link: &Link, stop: &Stop) -> Result<(), Fault> {
        // An outage must not eat the retention that its repair may need.
        let fails = |(_, metrics): &(Lane, Arc<Metrics>)| metrics.is_failing();
        while !stop.is_asked() && !self.setup.lanes.iter().any(fails) {
            let (stream, groups) = (self.setup.stream.clone(), self.groups.clone());
            let at = match trim::line(link, &stream, &groups, self.setup.retention).await? {
                Line::Nothing => return Ok(()),
                Line::Missing(group) => {
                    self.raise_alarm(|| {
                        error!(%stream, %group, "a configured group is missing: the stream is not trimmed, for nobody knows what that group has read");
                    });
                    return Ok(());
                }
                Line::At { at, .. } => at,
            };
            let Some(below) = at.number().checked_sub(1).map(EntryId::from_number) else { return Ok(()) };
            let entries = trim::page(link, &stream, EntryId::MIN, below, STEP).await?;
            let (Some(first), Some(last)) = (entries.entries().first(), entries.entries().last()) else {
                self.alarm = None;
                return Ok(());
            };
            for (lane, _) in &self.setup.lanes {
                let id = lane.id();
                let rows =
                    self.setup.database.run(async |c| ledger::rows_within(c, id, first.id, last.id).await).await?;
                // What a row covers and can no longer judge was settled all the same: buried, or dropped.
                let unknown = judge::examine(&entries, &rows).new.len();
                if unknown > 0 {
                    let (pipeline, from) = (lane.pipeline().name.clone(), first.id);
                    self.raise_alarm(|| {
                        error!(%stream, %pipeline, entries = unknown, from = %from, to = %last.id, "entries that nobody has pending are not in the ledger: the stream is not trimmed (was a consumer deleted, or were entries acknowledged by hand?)");
                    });
                    return Ok(());
                }
            }
            let up_to = last.id.next().unwrap_or(EntryId::MAX);
            let source = self.setup.source.clone();
            self.setup.database.run(async |c| lanes::raise_trim_line(c, &source, &stream, up_to).await).await?;
            failpoint::reached("trim.raised");
            let cut = trim::cut(link, &stream, &groups, self.setup.retention, up_to);
            if let Line::At { cut, .. } = failpoint::during("trim.cut", cut).await? {
                self.setup.lanes.iter().for_each(|(_, metrics)| metrics.trimmed(cut));
            }
            if entries.len() < STEP {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Merges the ledger's rows of what the stream has no longer.
    async fn compact(&mut self, link: &Link, stop: &Stop) -> Result<(), Fault> {
        let Line::At { floor, .. } = trim::line(link, &self.setup.stream, &self.groups, self.setup.retention).await?
        else {
            return Ok(());
        };
        let margin = self.setup.compact_margin;
        for (lane, _) in &self.setup.lanes {
            let id = lane.id();
            while !stop.is_asked() {
                if self.setup.database.transact(async |c| compact::compact(c, id, floor, margin).await).await? == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Compares the ledger with the stream: what was flushed and is gone above the trim line, Valkey lost.
    ///
    /// The ledger is read first and the stream second, so that what is flushed meanwhile is not taken for lost; and the trim
    /// line last, so that neither is what is trimmed meanwhile. To compare only the highest ids would not do: they agree
    /// again as soon as traffic resumes.
    async fn look_upstream(&mut self, link: &Link, stop: &Stop) -> Result<(), Fault> {
        for (lane, metrics) in self.setup.lanes.clone() {
            let id = lane.id();
            let retained = self.setup.database.run(async |c| ledger::retained(c, id).await).await?;
            let (mut intact, mut lost) = (0, 0);
            let mut rest = &retained[..];
            while !rest.is_empty() && intact < INTACT_IS_ENOUGH && !stop.is_asked() {
                let (group, behind) = rest.split_at(group_length(rest));
                rest = behind;
                let (last, first) = (group[0].last, group[group.len() - 1].first);
                let rows = self.setup.database.run(async |c| ledger::rows_within(c, id, first, last).await).await?;
                let present = self.digests_between(link, first, last).await?;
                intact += present.len();
                for row in &rows {
                    let missing = row.digests.as_ref().map_or(0, |d| d.difference(&present).count());
                    if missing > row.lost.unsigned_abs() as usize {
                        lost += self.setup.database.run(async |c| ledger::mark_lost(c, id, row, missing).await).await?;
                    }
                }
            }
            if lost > 0 {
                metrics.lost_upstream(lost);
                error!(
                    event = "lost_upstream", stream = %self.setup.stream, pipeline = %lane.pipeline().name, entries = lost,
                    "entries that were flushed are gone from the stream: Valkey lost them (a failover or restart without its tail?); PostgreSQL keeps what was flushed"
                );
            }
            let highest = self.setup.database.run(async |c| ledger::highest(c, id).await).await?;
            if let Some(highest) = highest {
                self.keep_ids_ascending(link, highest).await?;
            }
        }
        Ok(())
    }

    async fn digests_between(&self, link: &Link, first: EntryId, last: EntryId) -> Result<HashSet<u64>, Fault> {
        let (mut digests, mut from) = (HashSet::new(), Some(first));
        while let Some(start) = from.filter(|start| *start <= last) {
            let page = trim::page(link, &self.setup.stream, start, last, STEP).await?;
            digests.extend(page.entries().iter().map(|e| e.digest));
            from = page.entries().last().filter(|_| page.len() == STEP).and_then(|e| e.id.next());
        }
        Ok(digests)
    }

    /// If the stream gives ids that the ledger has used already, it is told to start above them.
    async fn keep_ids_ascending(&mut self, link: &Link, highest: EntryId) -> Result<(), Fault> {
        let stream = &self.setup.stream;
        let Some((last, now_ms)) = trim::last_id(link, stream).await? else { return Ok(()) };
        if last >= highest {
            return Ok(());
        }
        if highest.ms > now_ms + AHEAD_OF_CLOCK.as_millis() as u64 {
            error!(%stream, %last, %highest, "the stream is behind the ledger by more than its clock allows: set right the server's clock; until then entries may come under used ids, which cost time and are told apart by their content");
            return Ok(());
        }
        match trim::raise_last_id(link, stream, highest).await {
            Ok(()) => info!(%stream, from = %last, to = %highest, "raised the stream's last id to the ledger's"),
            // An entry was added meanwhile; the next look sees it.
            Err(Fault::Valkey { code, .. }) if code == "ERR" => {}
            Err(fault) => return Err(fault),
        }
        Ok(())
    }

    fn raise_alarm(&mut self, tell: impl FnOnce()) {
        let now = Instant::now();
        if self.alarm.is_none_or(|told| now - told >= REMIND_AFTER) {
            self.alarm = Some(now);
            tell();
        }
    }
}

/// How many of these rows, one at least, make up about a [`STEP`] of entries.
fn group_length(rows: &[Extent]) -> usize {
    let mut entries = 0;
    rows.iter()
        .take_while(|row| {
            let before = entries;
            entries += row.entries.unsigned_abs() as usize;
            before == 0 || entries <= STEP
        })
        .count()
        .max(1)
}
