//! The caretaker of a stream: trims it, keeps its ledger small, and looks for what Valkey lost.
//!
//! One a stream in each process; several of them do each other no harm. It holds nothing and is never needed for a delta to
//! land. Each of its duties has its own incidents: one that fails keeps no other one from its turn, which [`super::schedule`] gives.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::merge::{self, Merged};
use super::session::Session;
use super::setup::CaretakerSetup;
use super::trim::{self, Line};
use super::{compact, upstream};
use crate::failpoint;
use crate::flow::flush::Lane;
use crate::flow::{judge, ledger, read};
use crate::lanes;
use crate::model::entry::EntryId;
use crate::retry::{Fault, Incident, Verdict};
use crate::shutdown::Stop;
use crate::telemetry::contract::Metrics;
use crate::telemetry::trace;
use crate::valkey::Link;

/// Entries compared with the ledger, then cut, in one step: a few milliseconds of the server's time.
const STEP: usize = 1_000;
/// How often an alarm that lasts is repeated.
const REMIND_AFTER: Duration = Duration::from_secs(30);
/// How often it is repeated that another program's group holds back trimming.
const REMIND_OF_GROUP_AFTER: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Debug)]
pub struct Caretaker {
    pub(super) setup: CaretakerSetup,
    groups: Vec<String>,
    /// Where merging goes on, for each lane.
    merged_to: Vec<EntryId>,
    incidents: Incidents,
    /// When an alarm was told last.
    alarm: Option<Instant>,
    group_alarm: Option<Instant>,
}

/// One for each duty.
#[derive(Debug, Default)]
struct Incidents {
    upstream: Incident,
    trim: Incident,
    merge: Incident,
}

impl Caretaker {
    /// For one stream.
    pub fn new(setup: CaretakerSetup) -> Caretaker {
        let groups = setup.lanes.iter().map(|(lane, _)| lane.pipeline().group()).collect();
        let merged_to = vec![EntryId::MIN; setup.lanes.len()];
        Caretaker { setup, groups, merged_to, incidents: Incidents::default(), alarm: None, group_alarm: None }
    }

    /// How much of the stream this process has settled.
    pub(super) fn settled(&self) -> u64 {
        self.setup.lanes.iter().map(|(lane, _)| lane.settled()).sum()
    }

    /// Looks for what Valkey lost. Gives how long to wait before the next try, where it could not.
    pub(super) async fn look_upstream(&mut self, session: &mut Session, stop: &Stop) -> Option<Duration> {
        match upstream::look(&self.setup, session, stop).await {
            Ok(()) => {
                self.incidents.upstream.over(Instant::now());
                None
            }
            Err(fault) => {
                let what = "what Valkey may have lost is not looked for";
                Some(tell(&mut self.incidents.upstream, &self.setup.stream, &fault, what))
            }
        }
    }

    /// Trims the stream.
    pub(super) async fn trim(&mut self, session: &mut Session, stop: &Stop) {
        match self.try_trim(session, stop).await {
            Ok(()) => drop(self.incidents.trim.over(Instant::now())),
            Err(fault) => {
                tell(&mut self.incidents.trim, &self.setup.stream, &fault, "the stream is not trimmed");
            }
        }
    }

    /// Merges the ledger's rows.
    pub(super) async fn merge(&mut self, link: &Link, stop: &Stop) {
        match self.try_merge(link, stop).await {
            Ok(()) => drop(self.incidents.merge.over(Instant::now())),
            Err(fault) => {
                tell(&mut self.incidents.merge, &self.setup.stream, &fault, "the ledger's rows are not merged");
            }
        }
    }

    /// Cuts what is settled by everybody and older than the retention, as far as the ledger vouches for it.
    async fn try_trim(&mut self, session: &mut Session, stop: &Stop) -> Result<(), Fault> {
        // An outage must not eat the retention that its repair may need.
        let fails = |(_, metrics): &(Lane, Arc<Metrics>)| metrics.is_failing();
        while !stop.is_asked() && !self.setup.lanes.iter().any(fails) {
            let (stream, groups) = (self.setup.stream.clone(), self.groups.clone());
            let at = match trim::line(&session.link, &stream, &groups, self.setup.retention).await? {
                Line::Nothing => return Ok(()),
                Line::Missing(group) => {
                    self.raise_alarm(|| {
                        error!(%stream, %group, "a configured group is missing: the stream is not trimmed, for nobody knows what that group has read");
                    });
                    return Ok(());
                }
                Line::At { at, held_by, .. } => {
                    self.look_at_holder(held_by);
                    at
                }
            };
            let Some(below) = at.number().checked_sub(1).map(EntryId::from_number) else { return Ok(()) };
            let entries = trim::page(session, &stream, EntryId::MIN, below, STEP).await?;
            let (Some(first), Some(last)) = (entries.entries().first(), entries.entries().last()) else {
                self.alarm = None;
                return Ok(());
            };
            let labels = self.setup.lanes.first().and_then(|(_, metrics)| metrics.recorder.labels());
            let span = labels.map(|labels| trace::alone("trim", labels));
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
            let cut = trim::cut(&session.link, &stream, &groups, self.setup.retention, up_to);
            if let Line::At { cut, .. } = failpoint::during("trim.cut", cut).await? {
                self.setup.lanes.iter().for_each(|(_, metrics)| metrics.trimmed(cut));
                span.iter().for_each(|span| span.number("tidegate.entries.trimmed", cut));
            }
            if entries.len() < STEP {
                return Ok(());
            }
        }
        Ok(())
    }

    /// A group that no configured pipeline reads with and that has settled nothing for longer than the retention keeps the stream
    /// from being trimmed: after a rename it is the old name's.
    fn look_at_holder(&mut self, held_by: Option<String>) {
        let Some(group) = held_by.filter(|group| !self.groups.contains(group)) else {
            self.group_alarm = None;
            return;
        };
        let now = Instant::now();
        if self.group_alarm.is_none_or(|told| now - told >= REMIND_OF_GROUP_AFTER) {
            self.group_alarm = Some(now);
            let stream = &self.setup.stream;
            warn!(%stream, %group, "a group that no pipeline of this configuration reads with has settled nothing for longer than trim.retention and holds back trimming: if nobody reads with it any more, XGROUP DESTROY it");
        }
    }

    /// Merges ledger rows: with their digests below the frontier of the pipeline's group, without them where the stream has nothing
    /// any more.
    async fn try_merge(&mut self, link: &Link, stop: &Stop) -> Result<(), Fault> {
        let stream = &self.setup.stream;
        for (n, (lane, _)) in self.setup.lanes.iter().enumerate() {
            let Some(frontier) = read::frontier(link, stream, &lane.pipeline().group()).await? else { continue };
            while !stop.is_asked() {
                let (id, from) = (lane.id(), self.merged_to[n]);
                match self.setup.database.transact(async |c| merge::merge(c, id, frontier, from).await).await? {
                    Merged::Step { next, .. } => self.merged_to[n] = next,
                    Merged::Done { next } => {
                        self.merged_to[n] = next;
                        break;
                    }
                }
            }
        }
        let Line::At { floor, .. } = trim::line(link, stream, &self.groups, self.setup.retention).await? else {
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

    fn raise_alarm(&mut self, tell: impl FnOnce()) {
        let now = Instant::now();
        if self.alarm.is_none_or(|told| now - told >= REMIND_AFTER) {
            self.alarm = Some(now);
            tell();
        }
    }
}

/// Tells a fault of one duty, at first and now and then; gives how long to wait before the next try.
pub(super) fn tell(incident: &mut Incident, stream: &str, fault: &Fault, what: &str) -> Duration {
    let now = Instant::now();
    let response = incident.met(fault, now);
    let verdict = response.judgement.verdict;
    if incident.is_news(verdict, now) {
        match verdict {
            Verdict::Halt => error!(%stream, %fault, advice = response.judgement.advice, "{what}"),
            _ => info!(%stream, %fault, "{what} for now"),
        }
    }
    response.wait
}
