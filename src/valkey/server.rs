//! Server: which process a connection has reached, and which history of writes that stands for.
//!
//! Takes the replies to [`Server::question`] and, in a cluster, to [`Server::question_of_cluster`]; a replica is refused as it refuses
//! writes.

use super::command::{Command, Reply, unexpected};
use crate::retry::Fault;

/// Which server it is, and which history of writes it stands for.
///
/// A slot that leaves a node of a cluster takes its streams along, with their groups and everything pending; it may come back with another
/// history, if the node where it was has failed over meanwhile. A node takes a new configuration epoch when it takes over a slot, so
/// a link that was opened before does not take the one for the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Server {
    /// The process: another one after each start.
    pub(super) run_id: String,
    /// The history: another one after each failover.
    pub(super) replication_id: String,
    /// In a cluster: another one after the node has taken over slots.
    pub(super) config_epoch: Option<u64>,
    pub(super) is_in_cluster: bool,
}

impl Server {
    /// What to ask.
    pub(super) fn question() -> Command {
        Command::new("INFO").arg("server").arg("replication")
    }

    /// What to ask a node of a cluster, too.
    pub(super) fn question_of_cluster() -> Command {
        Command::new("CLUSTER").arg("INFO")
    }

    /// What was answered. A replica is refused as it refuses writes.
    pub(super) fn told_by(info: &Reply, cluster: Option<&Reply>) -> Result<Server, Fault> {
        let text = info.as_text().ok_or_else(|| unexpected("INFO"))?;
        let field = |name: &str| info_field(text, name).map(str::to_owned).ok_or_else(|| unexpected("INFO"));
        if field("role")? != "master" {
            let message = "READONLY this server is a replica";
            return Err(Fault::Valkey { code: "READONLY".into(), message: message.into() });
        }
        let epoch = |cluster: &Reply| info_field(cluster.as_text()?, "cluster_my_epoch")?.parse().ok();
        let config_epoch =
            cluster.map(|cluster| epoch(cluster).ok_or_else(|| unexpected("CLUSTER INFO"))).transpose()?;
        // Older servers have another name for it.
        let mode = info_field(text, "server_mode").or_else(|| info_field(text, "redis_mode"));
        let is_in_cluster = mode == Some("cluster");
        Ok(Server { run_id: field("run_id")?, replication_id: field("master_replid")?, config_epoch, is_in_cluster })
    }

    /// Whether it is the same process with the same history of writes.
    pub(super) fn has_the_same_past(&self, other: &Server) -> bool {
        (&self.run_id, &self.replication_id) == (&other.run_id, &other.replication_id)
    }
}

/// The value of one line of INFO.
pub(super) fn info_field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_lines_of_names_and_values() {
        let text = "# Server\r\nrun_id:abc\r\nrun_id_2:x\r\n";
        assert_eq!(info_field(text, "run_id"), Some("abc"));
        assert_eq!(info_field(text, "run"), None);
    }
}
