//! Server: which process a connection has reached, and which history of writes that stands for.
//!
//! Takes the reply to [`Server::question`]; a replica is refused as it refuses writes.

use super::command::{Command, Reply, unexpected};
use crate::retry::Fault;

/// Which server it is, and which history of writes it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Server {
    /// The process: another one after each start.
    pub(super) run_id: String,
    /// The history: another one after each failover.
    pub(super) replication_id: String,
}

impl Server {
    /// What to ask.
    pub(super) fn question() -> Command {
        Command::new("INFO").arg("server").arg("replication")
    }

    /// What was answered. A replica is refused as it refuses writes.
    pub(super) fn told_by(info: &Reply) -> Result<Server, Fault> {
        let text = info.as_text().ok_or_else(|| unexpected("INFO"))?;
        let field = |name: &str| info_field(text, name).map(str::to_owned).ok_or_else(|| unexpected("INFO"));
        if field("role")? != "master" {
            let message = "READONLY this server is a replica";
            return Err(Fault::Valkey { code: "READONLY".into(), message: message.into() });
        }
        Ok(Server { run_id: field("run_id")?, replication_id: field("master_replid")? })
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
