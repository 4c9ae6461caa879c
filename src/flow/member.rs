//! Member: how a stream is read, by a worker of the group, until it can be read alone.
//!
//! While other consumers are at work, while entries are pending, and where one has died, for as many entries as that one may have held, the
//! holder of the lease reads as a member of the group, like any other: so an entry that kills its readers is found by its deliveries.

use super::lease::Lease;
use super::session::Session;
use super::taker::{Plan, Taker};
use crate::retry::Fault;

/// Until when a worker of the group reads a stream that is to be read alone.
#[derive(Debug)]
pub struct Membership {
    /// It reads while this process holds the lease.
    pub lease: Lease,
    /// How many entries more are read as a member of the group although nobody else is at work: one who died may have held them.
    pub doubtful: u64,
}

impl Membership {
    /// Whether the lease is still this process's.
    pub(super) fn lasts(&self) -> bool {
        self.lease.is_held()
    }
}

impl Taker {
    /// Whether what follows can be read alone, as far as is known.
    pub(super) fn may_read_alone(&self, plan: &Plan) -> bool {
        let is_in_no_doubt = self.membership.as_ref().is_some_and(|membership| membership.doubtful == 0);
        is_in_no_doubt && plan.is_sole && !plan.own && !plan.dead
    }

    /// Looks once more, with nothing held.
    pub(super) async fn is_alone(&mut self, session: &Session, plan: &mut Plan) -> Result<bool, Fault> {
        self.survey(session, plan).await?;
        Ok(self.may_read_alone(plan) && plan.own_pending == 0)
    }

    /// So many consumers have died since the last look: what they may have held is read as a member of the group.
    pub(super) fn mourn(&mut self, died: usize) {
        let most = self.setup.most_in_doubt();
        if let Some(membership) = self.membership.as_mut().filter(|_| died > 0) {
            membership.doubtful = most;
        }
    }

    /// So many entries were read as a member of the group. When the backlog ends, so does every doubt.
    pub(super) fn read_as_member(&mut self, entries: usize) {
        let has_more = self.reader.has_more();
        if let Some(membership) = &mut self.membership {
            membership.doubtful = if has_more { membership.doubtful.saturating_sub(entries as u64) } else { 0 };
        }
    }
}
