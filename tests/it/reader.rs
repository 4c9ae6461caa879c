//! A reader who types what a page shows: into a real shell, with the program and the clients of both servers on its path.
//!
//! Takes a page and the servers that it is about; gives the first step that does not end as the page says, with the line of the page. Where the page
//! names servers by the usual addresses, the reader names the test's.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;
use tidegate::ops::sandbox::{postgres_programs, valkey_server};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::harness::{Lab, eventually, free_port, program, within_limit};
use crate::page::{self, Step};

/// The shell: one command after the other, each from a file, in one session. It says how each ended.
const SHELL: &str = r#"
while read -r typed; do
    eval "$(<"$typed.sh")" > "$typed.out" 2> "$typed.err" < /dev/null
    echo $?
done"#;
/// Prints a Valkey's answers where there is no valkey-cli.
const VALKEY_CLI: &str = include_str!("valkey-cli.sh");

/// Where a page's servers are for its reader.
const VALKEY: &str = "localhost:6379";
const POSTGRES: &str = "user:password@localhost:5432/app";
const ADMIN: &str = "localhost:9464";

/// A reader at his shell.
pub(crate) struct Reader {
    pub(crate) lab: Lab,
    folder: TempDir,
    shell: Child,
    stdin: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// What stands in pages, and what is typed in its place.
    instead: Vec<(String, String)>,
    typed: usize,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    exit: i32,
    stdout: String,
    stderr: String,
}

impl Reader {
    /// One whose servers are this lab's, and whose shell does not know them yet.
    pub(crate) async fn of(lab: Lab) -> Reader {
        let folder = tempfile::tempdir().expect("a folder");
        let programs = folder.path().join("programs");
        std::fs::create_dir(&programs).expect("made");
        symlink(program(), programs.join("tidegate")).expect("linked");
        let client = valkey_client(lab.valkey.port());
        std::fs::write(programs.join("valkey-cli"), client).expect("written");
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(programs.join("valkey-cli"), executable).expect("executable");
        std::fs::write(folder.path().join("valkey-cli.sh"), VALKEY_CLI).expect("written");
        let path = std::env::var("PATH").unwrap_or_default();
        let postgres = postgres_programs().expect("PostgreSQL is installed");
        let path = format!("{}:{}:{path}", programs.display(), postgres.display());
        let home = folder.path().join("home");
        std::fs::create_dir(&home).expect("made");
        let admin = format!("127.0.0.1:{}", free_port());

        let mut command = Command::new("bash");
        command.args(["-c", SHELL]).env_clear().env("PATH", path).env("HOME", &home).env("LC_ALL", "C.UTF-8");
        command.env("TIDEGATE__ADMIN__LISTEN", &admin);
        if let Some(control) = std::env::var_os(crate::harness::BROKEN) {
            command.env(crate::harness::BROKEN, control);
        }
        command.current_dir(&home).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut shell = command.process_group(0).kill_on_drop(true).spawn().expect("bash starts");
        let (stdin, stdout) = (shell.stdin.take().expect("piped"), shell.stdout.take().expect("piped"));
        let (_, database) = lab.database.split_once("://").expect("a url");
        let valkey = format!("127.0.0.1:{}", lab.valkey.port());
        let instead = [(VALKEY, &*valkey), (POSTGRES, database), (ADMIN, &*admin)];
        let instead = instead.map(|(there, here)| (there.to_owned(), here.to_owned())).to_vec();
        let answers = BufReader::new(stdout).lines();
        Reader { lab, folder, shell, stdin, answers, instead, typed: 0 }
    }

    /// Types something else where a page says this.
    pub(crate) fn instead_of(&mut self, there: &str, here: &str) {
        self.instead.insert(0, (there.to_owned(), here.to_owned()));
    }

    /// One who is in the middle of a page: the shell knows what this program is told.
    pub(crate) async fn told(lab: Lab, like: &Command) -> Reader {
        let mut reader = Reader::of(lab).await;
        for (name, value) in like.as_std().get_envs() {
            let (name, value) = (name.to_string_lossy(), value.unwrap_or_default().to_string_lossy());
            reader.type_in(&format!("export {name}='{value}'")).await;
        }
        reader
    }

    /// The folder that the reader is in.
    pub(crate) fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// Follows a page to its end. `skips`: what is not typed; `fault` does to the servers what the page says.
    pub(crate) async fn follow(
        &mut self,
        page: &str,
        skips: impl Fn(&str) -> bool,
        mut fault: impl AsyncFnMut(&mut Lab, &str),
    ) -> Result<(), String> {
        for step in page::steps(page) {
            match step {
                Step::Fault(what) => fault(&mut self.lab, &what).await,
                Step::File { name, text } => {
                    let place = self.home().join(name);
                    std::fs::create_dir_all(place.parent().unwrap_or(Path::new("/"))).expect("made");
                    std::fs::write(place, self.ours(&text)).expect("written");
                }
                Step::Run(command) if command.is_shown && skips(&command.text) => {}
                Step::Run(command) => {
                    let ended = self.type_in(&command.text).await;
                    let told = |why: String| Err(format!("line {}: {}: {why}: {ended:#?}", command.line, command.text));
                    if ended.exit != command.exit {
                        return told(format!("exit code {}, and not {}", ended.exit, command.exit));
                    }
                    if let Some(line) = page::missing(&command.says, &ended.stdout, &ended.stderr) {
                        return told(format!("does not print {line:?} there"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Types one command. A daemon is left running, and is waited for until it runs.
    pub(crate) async fn type_in(&mut self, text: &str) -> Ended {
        let text = self.ours(text);
        let daemon = daemon(&text);
        let text = daemon.clone().unwrap_or(text);
        self.typed += 1;
        let typed = self.folder.path().join(self.typed.to_string());
        std::fs::write(typed.with_extension("sh"), &text).expect("written");
        let line = format!("{}\n", typed.display());
        self.stdin.write_all(line.as_bytes()).await.expect("typed");
        let answer = within_limit(&text, self.answers.next_line()).await;
        let answer = answer.expect("the shell answers").unwrap_or_else(|| panic!("{text} has ended the shell"));
        let said = |extension| std::fs::read_to_string(typed.with_extension(extension)).unwrap_or_default();
        if daemon.is_some() {
            eventually(&text, true, async || said("err").contains(r#""event":"running""#)).await;
        }
        Ended { exit: answer.parse().expect("an exit code"), stdout: said("out"), stderr: said("err") }
    }

    /// A text of a page with the test's servers in it.
    fn ours(&self, text: &str) -> String {
        self.instead.iter().fold(text.to_owned(), |text, (there, here)| text.replace(there, here))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Daemons that the page leaves running.
        if let Some(group) = self.shell.id().and_then(|id| Pid::from_raw(id as i32)) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// What starts a daemon and lets it run, if this is a daemon's command.
fn daemon(text: &str) -> Option<String> {
    let command = text.split(" #").next().unwrap_or_default().trim_end().trim_end_matches('&').trim_end();
    let is_daemon = command.starts_with("tidegate ") && command.split(' ').any(|word| word == "run");
    let is_watched = is_daemon && !command.contains("--until-empty") && !command.contains("2>");
    is_watched.then(|| format!("TIDEGATE__LOG__FORMAT=json {command} &"))
}

/// A program `valkey-cli` for the Valkey at this port: a real one, or else what stands in for it.
fn valkey_client(port: u16) -> String {
    let server = valkey_server().expect("Valkey is installed");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = server.parent().map(Path::to_owned).into_iter().chain(std::env::split_paths(&path));
    let real = folders
        .flat_map(|folder| ["valkey-cli", "redis-cli"].map(|name| folder.join(name)))
        .find(|client| client.is_file());
    let said = match real {
        Some(client) => format!("'{}' -p {port}", client.display()),
        None => format!("bash \"$(dirname \"$0\")/../valkey-cli.sh\" {port}"),
    };
    format!("#!/bin/sh\nexec {said} \"$@\"\n")
}
