//! A real sentinel, which watches over a primary.

use std::process::Stdio;

use tempfile::TempDir;
use tidegate::ops::sandbox::valkey_server;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::harness::{Client, Resp, eventually};

/// The name that the sentinels know the primary by.
pub const SERVICE: &str = "counters";

/// A sentinel. It ends with this.
pub struct Sentinel {
    pub port: u16,
    _folder: TempDir,
    _process: Child,
}

impl Sentinel {
    /// One that listens on this port and watches the primary on the other one; so many must agree that it is dead. `settings` are further
    /// lines of its file.
    pub async fn watching(primary: u16, port: u16, quorum: usize, settings: &[String]) -> Sentinel {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor {SERVICE} 127.0.0.1 {primary} {quorum}\n\
             sentinel down-after-milliseconds {SERVICE} 2000\nsentinel failover-timeout {SERVICE} 5000\n{}\n",
            folder.path().display(),
            settings.join("\n")
        );
        std::fs::write(&file, text).expect("written");
        let mut command = Command::new(valkey_server().expect("installed"));
        command.arg(&file).arg("--sentinel").stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let process = command.spawn().expect("it starts");
        let up = async || TcpStream::connect(("127.0.0.1", port)).await.is_ok();
        eventually("the sentinel answers", true, up).await;
        Sentinel { port, _folder: folder, _process: process }
    }

    /// Its answer.
    pub async fn ask(&self, words: &[&str]) -> Resp {
        Client::connect(self.port).await.call(words).await
    }
}
