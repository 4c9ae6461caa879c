//! `tidegate top` in a real terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::harness::{Lab, eventually, output, within_limit};

/// A terminal of 80 columns and 24 lines: our end, and the program's.
fn terminal() -> (OwnedFd, OwnedFd) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).expect("granted");
    unlockpt(&ours).expect("unlocked");
    let name = ptsname(&ours, Vec::new()).expect("a name");
    let theirs = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("opened");
    tcsetwinsize(&ours, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).expect("sized");
    (ours, theirs)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_draws_in_a_terminal_and_gives_it_back_as_it_was() {
    let lab = Lab::new().await;
    let _daemon = lab.daemon();
    lab.client().await.add_many("a", 10).await;
    lab.await_value("a", 10).await;
    let (ours, theirs) = terminal();
    let mut command = lab.program(&["top", "--every", "300ms"]);
    let end = || Stdio::from(theirs.try_clone().expect("another end"));
    command.env("TERM", "xterm-256color").stdin(end()).stdout(end()).stderr(end());
    let mut child = command.spawn().expect("it runs");
    drop(theirs);
    let drawn = Arc::new(Mutex::new(Vec::new()));
    let (mut reader, into) = (File::from(ours.try_clone().expect("our end")), drawn.clone());
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            into.lock().expect("unpoisoned").extend_from_slice(&buffer[..length]);
        }
    });
    let text = || String::from_utf8_lossy(&drawn.lock().expect("unpoisoned")).into_owned();
    // Cells come as they change, with moves of the cursor between: words without blanks stay together.
    for word in ["flushing;", "flush:counters", "backlog", "daemons", "incidents", "flowing"] {
        eventually(word, true, async || text().contains(word)).await;
    }
    File::from(ours).write_all(b"q").expect("typed");
    let status = within_limit("the end", child.wait()).await.expect("waited for");
    assert_eq!(status.code(), Some(0), "{}", text());
    // The other screen was left, and the cursor is there again.
    eventually("the screen is given back", true, async || {
        text().contains("\x1b[?1049l") && text().contains("\x1b[?25h")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_it_says_what_to_use_instead() {
    let lab = Lab::new().await;
    let (code, stdout, stderr) = output(&mut lab.program(&["top"])).await;
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("tidegate status --watch --output json"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn colours_are_for_a_terminal_and_for_people_who_want_them() {
    let lab = Lab::new().await;
    for (no_color, coloured) in [("", true), ("1", false)] {
        let (ours, theirs) = terminal();
        let mut command = lab.program(&["status"]);
        command.env("TERM", "xterm").env("NO_COLOR", no_color).stdout(Stdio::from(theirs));
        let mut child = command.spawn().expect("it runs");
        // The command keeps its own copy of the terminal's end, and would keep it open.
        drop(command);
        let mut text = Vec::new();
        let read = tokio::task::spawn_blocking(move || {
            // A terminal whose other end is closed ends with an error.
            let _ = File::from(ours).read_to_end(&mut text);
            text
        });
        let status = within_limit("the end", child.wait()).await.expect("waited for");
        let text = within_limit("the end of the output", read).await.expect("read");
        let text = String::from_utf8_lossy(&text);
        assert_eq!((status.code(), text.contains('\x1b')), (Some(4), coloured), "{text}");
    }
}
