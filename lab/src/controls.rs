//! Controls: each promise of `lab/controls.toml` is broken on purpose, and the tests that it names must notice.
//!
//! Takes the tree as it stands; copies it, applies the edits of all controls, and builds the tests there once. Runs the tests
//! as they are, where they must pass, and once for each broken control, where they must fail. Fails with the controls whose
//! edits do not apply, whose tests fail unbroken, or that nobody noticed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_lab::edits::{Control, apply, controls};
use tidegate_lab::harness::BROKEN;
use tokio::process::Command;
use tokio::sync::Semaphore;

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// How long a broken test waits for what will not come, in seconds.
const LIMIT: &str = "12";
/// After this a control's tests are ended.
const ENDED_AFTER: Duration = Duration::from_secs(240);

/// Builds the tests and the program; in the tree this has been built just before, and its dependencies are used again.
const TESTS: [&str; 4] = ["build", "--bins", "--test", "it"];

/// What the copy's `crate::broken` is.
const BROKEN_RS: &str = r#"//! Which control is broken in this process: the one that TIDEGATE_BROKEN names.

pub(crate) fn is(control: &str) -> bool {
    static NAMED: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| std::env::var("TIDEGATE_BROKEN").unwrap_or_default());
    *NAMED == control
}

/// The text, with one part of it replaced if this control is broken. Without that part the control is out of date.
#[allow(dead_code)]
pub(crate) fn replaced(control: &str, text: &str, part: &str, by: &str) -> String {
    assert_eq!(text.matches(part).count(), 1, "control {control}: the text to replace must occur once: {part}");
    if is(control) { text.replace(part, by) } else { text.to_owned() }
}
"#;

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Only this control
    #[arg(long)]
    only: Option<String>,
    /// Only whether all edits apply and the copy compiles
    #[arg(long)]
    check: bool,
    /// Only the program of the copy, optimised: for the benchmark without a ledger
    #[arg(long)]
    release: bool,
    /// Controls at a time
    #[arg(long, default_value_t = 3)]
    jobs: usize,
}

/// The copy: sources, and what is built from them.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

pub async fn run(args: Args) -> bool {
    match verdict(&args).await {
        Ok(holds) => holds,
        Err(why) => {
            println!("{why}");
            false
        }
    }
}

async fn verdict(args: &Args) -> Result<bool, String> {
    let all = controls();
    let copy = Copy::of(Path::new(ROOT), &all)?;
    if args.check {
        copy.cargo(&TESTS).await?;
        println!("{} controls apply, and the copy compiles", all.len());
        return Ok(true);
    }
    if args.release {
        copy.cargo(&["build", "--release", "--bin", "tidegate"]).await?;
        println!("{}", copy.target.join("release/tidegate").display());
        return Ok(true);
    }
    let chosen: Vec<Control> =
        all.into_iter().filter(|control| args.only.as_ref().is_none_or(|only| *only == control.name)).collect();
    if chosen.is_empty() {
        return Err("there is no control of that name in lab/controls.toml".into());
    }
    let program = Arc::new(copy.tests().await?);
    let names: BTreeSet<String> = chosen.iter().flat_map(|control| control.tests.clone()).collect();
    let said = program.run(&names, None, args.jobs).await?;
    let failed: Vec<&String> = names.iter().filter(|test| !said.contains(&format!("test {test} ... ok"))).collect();
    if !failed.is_empty() {
        return Err(format!("{said}\nas it is, these tests fail or are not there: {failed:?}"));
    }
    println!("as it is: {} tests passed", names.len());
    let (turns, started) = (Arc::new(Semaphore::new(args.jobs)), Instant::now());
    let mut runs = tokio::task::JoinSet::new();
    let count = chosen.len();
    for control in chosen {
        let (program, turns) = (program.clone(), turns.clone());
        runs.spawn(async move {
            let _turn = turns.acquire().await;
            program.is_noticed(&control).await
        });
    }
    let unnoticed = runs.join_all().await.into_iter().filter(|noticed| !noticed).count();
    let verdict = if unnoticed == 0 { "each was noticed" } else { "NOT EACH WAS NOTICED" };
    println!("{count} controls in {} s, {unnoticed} unnoticed: {verdict}", started.elapsed().as_secs());
    Ok(unnoticed == 0)
}

impl Copy {
    /// Copies what is, or could be, committed, and edits it. Only what differs is written, so that little is built again.
    fn of(root: &Path, controls: &[Control]) -> Result<Copy, String> {
        let edited = apply(controls, |file| std::fs::read_to_string(root.join(file)));
        let mut edited = edited.map_err(|faults| faults.join("\n"))?;
        let read = |file: &str| std::fs::read_to_string(root.join(file)).map_err(|error| format!("{file}: {error}"));
        let library = edited.remove("src/lib.rs").map_or_else(|| read("src/lib.rs"), Ok)?;
        edited.insert("src/lib.rs".into(), library + "\nmod broken;\n");
        edited.insert("src/broken.rs".into(), BROKEN_RS.into());
        // A feature that nothing else has: cargo tells the copy's builds from the tree's by it, and shares everything else.
        let manifest = read("Cargo.toml")?.replacen("[features]\n", "[features]\nbroken = []\n", 1);
        edited.insert("Cargo.toml".into(), manifest);

        let base = root.join("target/controls");
        let copy = Copy { tree: base.join("tree"), target: base.join("target") };
        let mut expected: BTreeSet<PathBuf> = BTreeSet::new();
        for file in listed(root)?.into_iter().chain(edited.keys().cloned()) {
            let text = match edited.get(&file) {
                Some(text) => text.clone().into_bytes(),
                None => std::fs::read(root.join(&file)).map_err(|error| format!("{file}: {error}"))?,
            };
            let to = copy.tree.join(&file);
            write_if_it_differs(&to, &text).map_err(|error| format!("{}: {error}", to.display()))?;
            expected.insert(to);
        }
        remove_others(&copy.tree, &expected).map_err(|error| format!("{}: {error}", copy.tree.display()))?;
        Ok(copy)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(arguments).args(["--locked", "--workspace", "--features", "tidegate/broken"]);
        command.current_dir(&self.tree).stdin(Stdio::null());
        // The dependencies are those of the tree; the programs go to a place of their own.
        command.env("CARGO_TARGET_DIR", &self.target).env("CARGO_BUILD_BUILD_DIR", Path::new(ROOT).join("target"));
        command
    }

    async fn cargo(&self, arguments: &[&str]) -> Result<(), String> {
        let status = self.command(arguments).status().await.map_err(|error| format!("cargo: {error}"))?;
        if status.success() { Ok(()) } else { Err("the copy does not compile: an edit does not fit any more".into()) }
    }

    /// Builds the tests; gives them as a program.
    async fn tests(&self) -> Result<Tests, String> {
        self.cargo(&TESTS).await?;
        let mut command = self.command(&TESTS);
        command.args(["--message-format", "json"]);
        let output = command.stderr(Stdio::null()).output().await.map_err(|error| format!("cargo: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let built = messages
            .filter(|message| message["target"]["name"] == "it")
            .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)));
        let tests = built.ok_or("cargo names no program for the tests")?;
        Ok(Tests { tests, program: self.target.join("debug/tidegate"), tree: self.tree.clone() })
    }
}

/// The tests of the copy, ready to run.
struct Tests {
    tests: PathBuf,
    program: PathBuf,
    tree: PathBuf,
}

impl Tests {
    /// Runs these tests; gives what they said.
    async fn run(&self, names: &BTreeSet<String>, broken: Option<&str>, jobs: usize) -> Result<String, String> {
        let mut command = Command::new(&self.tests);
        command.arg("--exact").args(names).args(["--test-threads", &jobs.to_string()]).current_dir(&self.tree);
        command.env("CARGO_BIN_EXE_tidegate", &self.program).env("RUST_BACKTRACE", "0");
        command.env_remove(BROKEN).stdin(Stdio::null()).kill_on_drop(true);
        if let Some(broken) = broken {
            command.env(BROKEN, broken).env("TIDEGATE_TEST_LIMIT", LIMIT);
        }
        // As they are there is no hurry: each test has a limit of its own.
        let limit = if broken.is_some() { ENDED_AFTER } else { ENDED_AFTER * 10 };
        let output = tokio::time::timeout(limit, command.output()).await;
        let output = output.map_err(|_| format!("the tests did not end within {} s", limit.as_secs()))?;
        let output = output.map_err(|error| format!("{}: {error}", self.tests.display()))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    }

    async fn is_noticed(&self, control: &Control) -> bool {
        for _ in 0..control.tries {
            if self.notices(control).await {
                return true;
            }
        }
        false
    }

    async fn notices(&self, control: &Control) -> bool {
        let names: BTreeSet<String> = control.tests.iter().cloned().collect();
        let said = match self.run(&names, Some(&control.name), names.len()).await {
            Ok(said) => said,
            Err(why) => {
                println!("{}: {why}", control.name);
                return false;
            }
        };
        let passed: Vec<&String> =
            names.iter().filter(|test| !said.contains(&format!("test {test} ... FAILED"))).collect();
        if !passed.is_empty() {
            println!("{}: NOT NOTICED by {passed:?}: {said}", control.name);
            return false;
        }
        let how: Vec<&str> = said.lines().skip_while(|line| !line.contains("panicked at")).skip(1).take(1).collect();
        println!("{}: {}: noticed: {}", control.name, control.promise, how.join(" "));
        true
    }
}

/// Files that are, or could be, committed.
fn listed(root: &Path) -> Result<Vec<String>, String> {
    let mut git = std::process::Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root);
    let output = git.output().map_err(|error| format!("git: {error}"))?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(names.lines().filter(|name| root.join(name).is_file()).map(str::to_owned).collect())
}

fn write_if_it_differs(to: &Path, text: &[u8]) -> std::io::Result<()> {
    if std::fs::read(to).is_ok_and(|there| there == text) {
        return Ok(());
    }
    to.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    std::fs::write(to, text)
}

/// Removes files of an earlier copy.
fn remove_others(folder: &Path, expected: &BTreeSet<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, expected)?;
        } else if !expected.contains(&path) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}
