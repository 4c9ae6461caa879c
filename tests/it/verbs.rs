//! Every verb where something is wrong: it says what and what to do next, ends with the documented exit code, and never panics.

use std::fs::{File, OpenOptions, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tidegate::ops::explain::EXITS;
use tokio::process::Command;

use crate::harness::{Lab, STREAM, free_port, output, within_limit};
use crate::rights::{as_role, as_user, create};

/// Every verb that asks a server, as it is typed by whoever looks, and whoever acts.
const VERBS: [&str; 32] = [
    "status",
    "dead list",
    "dead show 1-1",
    "dead redrive --all --yes",
    "dead discard --all --yes",
    "dead reopen --all --yes",
    "audit",
    "audit --full --repair --yes",
    "pause counters --for 1s",
    "resume counters",
    "wait --timeout 50ms",
    "pending --entries",
    "tap --after 0-0 --limit 1",
    "trim --dry-run",
    "group list",
    "group repair --yes",
    "doctor",
    "health",
    "probe --timeout 50ms",
    "migrate --dry-run",
    "migrate",
    "replay --since 1h",
    "counter show a",
    "memory --observe 1",
    "invalidate a",
    "config show",
    "check",
    "check --live",
    "pipeline new --table public.counters",
    "pipeline new --stream flush:counters",
    "bench --entries 10",
    "produce /dev/null",
];

/// Those of managed counters, which a plain pipeline has not.
const OF_MANAGED: [&str; 4] = ["adopt", "warm --top 3", "warm --ids /dev/null", "invalidate --counters counters"];

/// Whether a verb ended as it may: with a documented code, and a sentence where it failed.
fn assert_well_ended(what: &str, code: i32, stdout: &str, stderr: &str) {
    assert!(EXITS.iter().any(|(exit, _)| *exit as i32 == code), "{what}: {code}: {stdout}{stderr}");
    assert!(
        !stderr.contains("panicked") && !stderr.contains("hunter2") && !stdout.contains("hunter2"),
        "{what}: {stderr}"
    );
    assert!(code == 0 || stdout.len() + stderr.len() > 20, "{what} says nothing and ends with {code}");
}

/// How every verb ends on servers that are so: the code and what it said, by verb.
async fn all(
    lab: &Lab,
    verbs: &[&'static str],
    so: impl Fn(&mut Command) -> &mut Command,
) -> Vec<(&'static str, i32, String)> {
    let mut ended = Vec::new();
    for verb in verbs {
        let arguments: Vec<&str> = verb.split(' ').collect();
        let mut command = lab.program_by_default(&arguments);
        command.env("TIDEGATE__LOG__FORMAT", "text");
        so(&mut command);
        let (code, stdout, stderr) = output(&mut command).await;
        assert_well_ended(verb, code, &stdout, &stderr);
        ended.push((*verb, code, stdout + &stderr));
    }
    ended
}

/// A lab with two counters that were flushed.
async fn lab() -> Lab {
    let lab = Lab::new().await;
    lab.client().await.add_many("a", 3).await;
    lab.settle_everything().await;
    lab
}

/// What was asked of the server that refuses: all that ended otherwise than well say why, and what to do.
fn assert_refused(ended: &[(&'static str, i32, String)], code: i32, words: &[&str], at_least: usize) {
    let refused: Vec<_> = ended.iter().filter(|(_, ended, _)| *ended == code).collect();
    assert!(refused.len() >= at_least, "{code}: {ended:?}");
    for (verb, _, said) in refused {
        assert!(words.iter().all(|word| said.contains(word)), "{verb}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_of_either_server_is_named_by_every_verb() {
    let lab = lab().await;
    let wrong = lab.valkey.url().replace("://", "://nobody:hunter2@");
    let ended = all(&lab, &VERBS, |command| command.env("VALKEY_URL", &wrong)).await;
    assert_refused(&ended, 77, &["WRONGPASS", "correct valkey.url"], 14);
    // It is said where status could not look, and no code but these is among them.
    assert!(ended.iter().all(|(_, code, _)| [0, 1, 4, 65, 69, 77].contains(code)), "{ended:?}");
    let by = |verb: &str| ended.iter().find(|(other, ..)| *other == verb).map(|(_, code, said)| (*code, said.as_str()));
    assert!(by("status").is_some_and(|(code, said)| code == 4 && said.contains("WRONGPASS")), "{:?}", by("status"));
    assert_eq!(by("bench --entries 10").map(|(code, _)| code), Some(77));

    let mut sql = lab.sql().await;
    create(&mut sql, "create role may_nothing login password 'hunter2'").await;
    let ended = all(&lab, &VERBS, |command| command.env("DATABASE_URL", as_role(&lab.database, "may_nothing"))).await;
    assert_refused(&ended, 77, &["42501", "grant it (docs/permissions.md"], 12);
    assert_refused(&ended, 78, &["lacks the right to", "grant "], 2);
    let ended = all(&lab, &VERBS, |command| command.env("DATABASE_URL", as_role(&lab.database, "never_made"))).await;
    assert_refused(&ended, 77, &["correct postgres.url"], 14);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_of_valkey_who_may_do_nothing_is_told_so_by_every_verb() {
    let lab = lab().await;
    let mut client = lab.client().await;
    client.call(&["ACL", "SETUSER", "nothing", "on", ">secret", "resetkeys", "-@all", "+hello", "+ping"]).await;
    let url = as_user(&lab.valkey.url(), "nothing");
    let verbs: Vec<&'static str> = VERBS.iter().chain(&OF_MANAGED).copied().collect();
    let ended = all(&lab, &verbs, |command| {
        command.env("VALKEY_URL", &url).env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed")
    })
    .await;
    assert_refused(&ended, 77, &["NOPERM", "grant it with ACL SETUSER"], 16);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "a\nb 2\n").expect("written");
    let file = file.path().to_str().expect("text");
    // Who may call scripts, and not what they call.
    client.call(&["ACL", "SETUSER", "half", "on", ">secret", "~*", "-@all", "+hello", "+ping", "+eval", "+info"]).await;
    let half = as_user(&lab.valkey.url(), "half");
    for (user, arguments) in [
        (&url, &["produce", file][..]),
        (&half, &["produce", file]),
        (&url, &["probe", "--timeout", "1s"]),
        (&half, &["probe", "--timeout", "1s"]),
    ] {
        let (code, _, stderr) = output(lab.program_by_default(arguments).env("VALKEY_URL", user)).await;
        assert_eq!(code, 77, "{arguments:?}: {stderr}");
        assert!(
            stderr.contains("grant it with ACL SETUSER") && !stderr.contains("bad      1"),
            "{arguments:?}: {stderr}"
        );
    }
    assert_eq!(lab.value("a").await, Some(3), "nothing was added");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_missing_and_a_stream_that_is_none_are_named_by_every_verb() {
    let lab = lab().await;
    lab.client().await.call(&["SET", "no:stream", "text"]).await;
    let ended = all(&lab, &VERBS, |command| command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", "no:stream")).await;
    assert_refused(&ended, 78, &["WRONGTYPE", "\"no:stream\"", "rename or delete it"], 9);
    assert!(!ended.iter().any(|(_, _, said)| said.contains("user_script")), "{ended:?}");
    lab.execute("alter table public.counters rename to elsewhere").await;
    let ended = all(&lab, &VERBS, |command| command).await;
    assert_refused(&ended, 78, &["public.counters", "migrate"], 4);
    assert_refused(&ended, 65, &[], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_not_there_are_said_not_to_be() {
    let lab = lab().await;
    for (arguments, code, words) in [
        (&["pending", "--pipeline", "none"][..], 78, "there is no pipeline \"none\": name one of counters"),
        (&["pause", "none"], 78, "there is no pipeline"),
        (&["tap", "--pipeline", "none"], 78, "there is no pipeline"),
        (&["warm", "--top", "1", "--pipeline", "none"], 78, "there is no pipeline"),
        (&["migrate", "--retarget", "none"], 78, "there is no pipeline"),
        (
            &["migrate", "--rename-pipeline", "none=counted"],
            78,
            "the ledger knows no pipeline \"none\": it knows counters",
        ),
        (&["migrate", "--rename-pipeline", "none=counters"], 0, ""),
        (&["pending", "--entries", "--consumer", "none"], 0, "there is no consumer \"none\""),
        (&["dead", "list", "--pipeline", "none"], 0, "knows a pipeline \"none\": they know counters"),
        (&["dead", "redrive", "--stream", "none", "--yes"], 0, "from a stream \"none\""),
        (
            &["dead", "discard", "--reason", "bad_amont", "--yes"],
            0,
            "\"bad_amont\" is no reason of dead letters: they are",
        ),
        (&["group", "repair", "--group", "none", "--yes"], 65, "see `tidegate group list`"),
        (&["explain", "none"], 2, "is no code"),
        (&["config", "show", "none"], 2, "no key begins with none"),
        (&["pipeline", "new", "--table", "none"], 65, "there is no table"),
        (&["pipeline", "new", "--stream", "none"], 65, "there are no entries in the stream"),
        (&["produce", "none"], 66, "cannot read none"),
        (&["pipeline", "test", "none"], 66, "none: cannot be read"),
    ] {
        let (ended, stdout, stderr) = output(&mut lab.program_by_default(arguments)).await;
        assert_eq!(ended, code, "{arguments:?}: {stdout}{stderr}");
        assert!((stdout.clone() + &stderr).contains(words), "{arguments:?}: {stdout}{stderr}");
    }
    // Known names are not remarked upon.
    let known = ["dead", "list", "--pipeline", "counters", "--stream", STREAM, "--reason", "bad_amount"];
    assert_eq!(output(&mut lab.program_by_default(&known)).await.2, "");
    let mut warm = lab.program_by_default(&["warm", "--ids", "none"]);
    let (code, _, stderr) = output(warm.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed")).await;
    assert!(code == 66 && stderr.contains("name a text file with an id on each line"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_file_of_any_kind_is_read_or_said_to_be_unreadable() {
    let lab = Lab::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    };
    let sound = b"[batch]\r\nmax_entries = 5000\r\n";
    let good = [write("crlf", sound), write("bom", &[b"\xef\xbb\xbf", &sound[..]].concat())];
    for path in good {
        let mut command = lab.program_by_default(&["config", "show", "batch.max_entries"]);
        let (code, stdout, stderr) = output(command.arg("--config").arg(&path)).await;
        assert!(code == 0 && stdout.contains("5000"), "{path:?}: {stdout}{stderr}");
    }
    let empty = write("empty", b"");
    assert_eq!(output(lab.program_by_default(&["check"]).arg("--config").arg(&empty)).await.0, 0);
    let large = write("large", &b"# ten megabytes\n".repeat(10 << 16));
    let latin = write("latin1", b"# caf\xe9\n");
    let yaml = write("yaml", b"batch:\n  max_entries: 5\n");
    let hidden = write("hidden", sound);
    std::fs::set_permissions(&hidden, Permissions::from_mode(0o0)).expect("hidden");
    // Root may read it all the same.
    let may_read = File::open(&hidden).is_ok();
    let missing = folder.path().join("missing");
    for (path, code, words) in [
        (folder.path().to_owned(), 66, "cannot be read (Is a directory"),
        (missing, 66, "cannot be read (No such file"),
        (hidden, if may_read { 0 } else { 66 }, if may_read { "" } else { "cannot be read (Permission denied" }),
        (large, 78, "it is larger than 1048576 bytes"),
        (latin, 78, "it is not UTF-8 text"),
        (yaml, 78, "is not TOML"),
    ] {
        for verb in [
            "check",
            "run",
            "migrate",
            "status",
            "doctor",
            "produce",
            "config show",
            "warm --top 1",
            "completions bash",
        ] {
            // Those of which the file is not wrong, or not read, do what they do.
            if words.is_empty() || verb.starts_with("completions") {
                continue;
            }
            let arguments: Vec<&str> = verb.split(' ').collect();
            let (ended, stdout, stderr) = output(lab.program_by_default(&arguments).arg("--config").arg(&path)).await;
            assert_eq!(ended, code, "{verb} {path:?}: {stdout}{stderr}");
            assert!(stderr.contains(words), "{verb} {path:?}: {stderr}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stdout_that_is_closed_full_or_no_longer_read_is_borne() {
    let lab = lab().await;
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("there");
    for verb in VERBS.iter().filter(|verb| !verb.starts_with("bench")) {
        let arguments: Vec<&str> = verb.split(' ').collect();
        let command = || {
            let mut command = lab.program_by_default(&arguments);
            command.args(["--output", "json"]).stderr(Stdio::piped());
            command
        };
        let mut child = command().stdout(Stdio::piped()).spawn().expect("it runs");
        // Whoever read is gone before the first byte comes.
        drop(child.stdout.take());
        let ended = within_limit("the end", child.wait_with_output()).await.expect("it ran");
        let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!stderr.contains("panicked") && !stderr.contains("roken pipe"), "{verb}: {stderr}");
        assert!(EXITS.iter().any(|(exit, _)| Some(*exit as i32) == ended.status.code()), "{verb}: {:?}", ended.status);
        let child = command().stdout(full()).spawn().expect("it runs");
        let ended = within_limit("the end", child.wait_with_output()).await.expect("it ran");
        let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!stderr.contains("panicked"), "{verb}: {stderr}");
        assert!(
            ended.status.code() != Some(1) || stderr.contains("stdout cannot be written to") || *verb == "health",
            "{verb}: {stderr}"
        );
        assert!(!stderr.contains("os error"), "{verb}: {stderr}");
    }
}

/// What a verb writes on a terminal so wide and so high, until it ends.
async fn on_terminal(command: &mut Command, columns: u16, rows: u16) -> (Option<i32>, String) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("its own");
    tcsetwinsize(&ours, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).expect("sized");
    let name = ptsname(&ours, Vec::new()).expect("a name");
    let theirs =
        || OpenOptions::new().read(true).write(true).open(Path::new(name.to_str().expect("text"))).expect("open");
    let mut child = command.stdin(Stdio::null()).stdout(theirs()).stderr(theirs()).spawn().expect("it runs");
    // The command would hold their side open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let reader = std::thread::spawn(move || {
        let (mut told, mut ours) = (Vec::new(), File::from(ours));
        // It ends with an error when their side is closed.
        let _ = ours.read_to_end(&mut told);
        told
    });
    let status = within_limit("the end", child.wait()).await.expect("it ran");
    let told = tokio::task::spawn_blocking(|| reader.join().expect("read")).await.expect("joined");
    (status.code(), String::from_utf8_lossy(&told).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_narrow_terminal_everything_is_shown_and_without_colours_where_none_are_wanted() {
    let lab = lab().await;
    for verb in [
        "status",
        "doctor",
        "dead list",
        "pending",
        "group list",
        "audit",
        "trim --dry-run",
        "config show",
        "explain D1",
        "--help",
        "run --help",
    ] {
        let arguments: Vec<&str> = verb.split(' ').collect();
        let (code, wide, _) = output(&mut lab.program_by_default(&arguments)).await;
        for (columns, rows) in [(20, 10), (1, 1)] {
            let mut command = lab.program_by_default(&arguments);
            let (ended, told) = on_terminal(command.env("TERM", "xterm").env("NO_COLOR", "1"), columns, rows).await;
            assert_eq!(ended, Some(code), "{verb} {columns}: {told}");
            assert!(!told.contains('\x1b') && !told.contains("panicked"), "{verb} {columns}: {told}");
            assert!(told.len() >= wide.len() / 2, "{verb} {columns}: {told}");
        }
    }
    let (_, told) = on_terminal(lab.program_by_default(&["status"]).env("TERM", "xterm"), 20, 10).await;
    assert!(told.contains('\x1b'), "with colours otherwise: {told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_away_are_named_by_every_verb() {
    let lab = lab().await;
    let (valkey, postgres) = (free_port(), free_port());
    let valkey_away = format!("valkey://nobody:hunter2@127.0.0.1:{valkey}");
    let ended = all(&lab, &VERBS, |command| command.env("VALKEY_URL", &valkey_away)).await;
    assert_refused(&ended, 69, &[&format!("127.0.0.1:{valkey}")], 14);
    let postgres_away = format!("postgres://nobody:hunter2@127.0.0.1:{postgres}/db");
    let ended = all(&lab, &VERBS, |command| command.env("DATABASE_URL", &postgres_away)).await;
    assert_refused(&ended, 69, &[&format!("127.0.0.1:{postgres}")], 14);
}
