//! docs/functions.md, executed: the lines for valkey-cli by a plain client, the programs by the real client libraries.
//!
//! `make peers` installs those apart from everything; PYTHON names the interpreter that has `valkey`, NODE_PEER the folder that has `iovalkey`. Without
//! them that part is left out, and says so.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::harness::{Daemon, Lab, Resp, output};
use crate::managed::is_managed;
use crate::page::blocks;

const DOCUMENT: &str = include_str!("../../docs/functions.md");

async fn managed() -> (Lab, Daemon) {
    let lab = Lab::new().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed");
    let daemon = Daemon::start(command);
    is_managed(&lab).await;
    (lab, daemon)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_lines_for_valkey_cli_add_once() {
    let (lab, _daemon) = managed().await;
    let [lines] = blocks(DOCUMENT, "sh")[..] else { panic!("one block") };
    let lines: Vec<Vec<&str>> = lines.lines().map(|line| line.split(' ').skip(1).collect()).collect();
    assert_eq!(lab.client().await.call(&lines[0]).await, Resp::Array(vec![Resp::Int(2)]), "accepted, blind");
    let again = lab.client().await.call(&lines[0]).await.array();
    assert_eq!(again[0], Resp::Int(3), "seen");
    lab.await_value("7", 5).await;
    let status = lab.client().await.call(&lines[1]).await.array();
    assert_eq!(status[0], Resp::Int(1), "{status:?}");
}

/// Runs a program, and waits for what it added three times five of.
async fn adds_fifteen(lab: &Lab, mut command: Command, id: &str) {
    command.env("VALKEY_URL", lab.valkey.url()).stdin(Stdio::null());
    let (code, stdout, stderr) = output(&mut command).await;
    // Absent: nobody has brought the value. It is accepted all the same.
    assert_eq!((code, stdout.trim()), (0, "absent"), "{stderr}");
    lab.await_value(id, 15).await;
}

/// A program by the library `valkey` of Python; none, which is said, where it is not installed.
pub(crate) fn in_python(program: &str) -> Option<Command> {
    let Ok(python) = std::env::var("PYTHON") else {
        eprintln!("skipped: PYTHON names no interpreter with the library valkey (make peers)");
        return None;
    };
    let mut command = Command::new(python);
    command.args(["-c", program]);
    Some(command)
}

/// A program by the library `iovalkey` of Node; none, which is said, where it is not installed.
pub(crate) fn in_node(program: &str) -> Option<Command> {
    let Ok(folder) = std::env::var("NODE_PEER") else {
        eprintln!("skipped: NODE_PEER names no folder with the library iovalkey (make peers)");
        return None;
    };
    let mut command = Command::new("node");
    command.args(["--input-type=module", "--eval", program]).current_dir(Path::new(&folder));
    Some(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_python_program_adds_with_the_real_client_library() {
    let [program] = blocks(DOCUMENT, "python")[..] else { panic!("one program") };
    let Some(command) = in_python(program) else { return };
    let (lab, _daemon) = managed().await;
    adds_fifteen(&lab, command, "python").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_node_program_adds_with_the_real_client_library() {
    let [program] = blocks(DOCUMENT, "javascript")[..] else { panic!("one program") };
    let Some(command) = in_node(program) else { return };
    let (lab, _daemon) = managed().await;
    adds_fifteen(&lab, command, "node").await;
}
