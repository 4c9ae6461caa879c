//! `tidegate top`: everything at a glance, again and again, on a terminal.
//!
//! Takes looks at both servers; draws what flows, what waits, who works, and what is wrong. Ends with q, Esc or Ctrl-C. It needs a terminal
//! and no mouse, works over ssh and in 80 columns of 24 lines, and asks the servers no more than `status --watch`.

mod picture;

use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use self::picture::Picture;
use super::complete::{Name, by};
use super::context::chosen;
use super::observe::{Look, Servers};
use super::status::{limits, report::Status};
use super::{Context, Exit, Failure};
use crate::config::Needs;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Only these pipelines; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pub pipelines: Vec<String>,
    /// How often it looks
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub every: Duration,
    /// An unsettled entry older than this is a degraded service
    #[arg(long, default_value = "1m", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub max_age: Duration,
}

/// The shortest time between two looks.
const SOONEST: Duration = Duration::from_millis(200);
/// How long the reader of keys waits for one before it looks whether it is still needed.
const KEYS_EVERY: Duration = Duration::from_millis(100);

/// What somebody has typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Typed {
    Quit,
    /// Shows the next pipeline alone, or all.
    Next,
    /// Holds the picture, or lets it go on.
    Hold,
    /// The window has another size.
    Resized,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let pipelines = chosen(&config, &opts.pipelines)?;
    if !context.terminal.shows_output {
        return Err(Failure::usage("this needs a terminal: `tidegate status --watch --output json` is for programs"));
    }
    let mut servers = Servers::of(&config, "tidegate:top")?;
    let mut before = Look::take(&mut servers, &pipelines, config.reclaim.dead_after).await;
    let limits = limits(&config, opts.max_age);
    let mut picture = Picture::new(context.terminal.paint, Status::of(&before, &before, &limits));
    let mut terminal = ratatui::try_init()?;
    let (sender, mut typed) = mpsc::channel(16);
    // A thread, not a task: a read of a terminal cannot be cancelled.
    std::thread::spawn(move || read_keys(&sender));
    let mut tick = tokio::time::interval(opts.every.max(SOONEST));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let outcome = loop {
        if let Err(error) = terminal.draw(|frame| picture.draw(frame)) {
            break Err(error.into());
        }
        tokio::select! {
            key = typed.recv() => match key {
                Some(Typed::Quit) | None => break Ok(Exit::Ok),
                Some(Typed::Next) => picture.next(),
                Some(Typed::Hold) => picture.hold(),
                Some(Typed::Resized) => {}
            },
            _ = tick.tick() => {
                let now = Look::take(&mut servers, &pipelines, config.reclaim.dead_after).await;
                picture.show(Status::of(&before, &now, &limits));
                before = now;
            }
        }
    };
    ratatui::restore();
    outcome
}

fn read_keys(sender: &mpsc::Sender<Typed>) {
    while !sender.is_closed() {
        let typed =
            match event::poll(KEYS_EVERY).and_then(|there| if there { event::read().map(Some) } else { Ok(None) }) {
                Ok(None) => continue,
                Ok(Some(Event::Resize(..))) => Typed::Resized,
                Ok(Some(Event::Key(key))) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Typed::Quit,
                    KeyCode::Char('q') | KeyCode::Esc => Typed::Quit,
                    KeyCode::Tab | KeyCode::Char('n') => Typed::Next,
                    KeyCode::Char(' ') => Typed::Hold,
                    _ => continue,
                },
                Ok(Some(_)) => continue,
                Err(_) => Typed::Quit,
            };
        if sender.blocking_send(typed).is_err() {
            return;
        }
    }
}
