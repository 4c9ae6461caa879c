//! Worker processes, and what they cost as the operating system tells it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;

use super::LOOK_EVERY;
use crate::ops::stage::{Stage, Trouble};

/// Worker processes.
pub(super) struct Workers {
    /// In the order in which they were started.
    children: Vec<Child>,
    told: Vec<Arc<Told>>,
}

/// What one of them has said of itself.
#[derive(Debug, Default)]
struct Told {
    is_running: AtomicBool,
    rows: AtomicU64,
}

impl Workers {
    pub(super) fn start(processes: u8, stage: &Stage) -> Result<Workers, Trouble> {
        let told: Vec<Arc<Told>> = (0..processes).map(|_| Arc::default()).collect();
        let children = told.iter().map(|told| start_one(stage, told.clone())).collect::<Result<_, _>>()?;
        Ok(Workers { children, told })
    }

    /// Kills the process that has lived longest (SIGKILL); gives its id.
    pub(super) async fn kill_one(&mut self) -> Result<u32, Trouble> {
        let mut child = self.children.remove(0);
        self.told.remove(0);
        let process = child.id().ok_or("a worker process had ended")?;
        child.kill().await?;
        Ok(process)
    }

    /// Starts a process for the one that was killed.
    pub(super) fn replace_the_dead(&mut self, stage: &Stage) -> Result<(), Trouble> {
        let told = Arc::<Told>::default();
        self.children.push(start_one(stage, told.clone())?);
        self.told.push(told);
        Ok(())
    }

    /// Whether all of them have said that they run.
    pub(super) fn are_running(&self) -> bool {
        self.told.iter().all(|told| told.is_running.load(Ordering::Relaxed))
    }

    pub(super) fn all_live(&mut self) -> Result<(), Trouble> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                return Err(format!("a worker process ended: {status}").into());
            }
        }
        Ok(())
    }

    /// CPU seconds of all together, and the most memory that one of them held; none where the system does not tell.
    pub(super) fn cost(&self) -> (Option<f64>, Option<u64>) {
        let pids = || self.children.iter().filter_map(Child::id);
        (pids().map(cpu_seconds).sum(), pids().map(peak_memory).max().flatten())
    }

    /// Stops them in order; gives the rows they wrote.
    pub(super) async fn stop(mut self) -> Result<u64, Trouble> {
        for child in &mut self.children {
            if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid as i32)) {
                kill_process(pid, Signal::TERM)?;
            }
            child.wait().await?;
        }
        // Their last words may still be on their way through the pipe.
        while self.told.iter().any(|told| Arc::strong_count(told) > 1) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(self.told.iter().map(|told| told.rows.load(Ordering::Relaxed)).sum())
    }
}

/// Starts a worker process that tells when it runs, and how many rows it has written.
fn start_one(stage: &Stage, told: Arc<Told>) -> std::io::Result<Child> {
    stage.worker(move |event| {
        if event["level"] == "ERROR" {
            eprintln!("{event}");
        }
        match event["event"].as_str() {
            Some("running") => told.is_running.store(true, Ordering::Relaxed),
            Some("metrics") => told.rows.store(event["rows"].as_u64().unwrap_or(0), Ordering::Relaxed),
            _ => {}
        }
    })
}

/// User and system time of a process, as Linux tells it in hundredths of a second.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything: the 12th and 13th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) as f64 / 100.0)
}

/// The most memory a process has held, in bytes.
fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    peak.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}
