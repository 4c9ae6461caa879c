//! Schedule: the caretakers of some streams do each of their duties in its time, one after the other, over one session.
//!
//! Takes the caretakers and where Valkey is; a Valkey that is out of reach is waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::{Interval, MissedTickBehavior, interval_at};

use super::attention::Attention;
use super::caretaker::{Caretaker, tell};
use super::session::Session;
use crate::retry::Incident;
use crate::shutdown::Stop;
use crate::valkey::Endpoint;

/// The name of the connections.
const NAME: &str = "tidegate:caretaker";

/// See the module.
#[derive(Debug)]
pub struct Schedule {
    valkey: Endpoint,
    caretakers: Vec<Caretaker>,
    /// Rung when a worker had to create a group.
    regrouped: Arc<Notify>,
    connecting: Incident,
}

impl Schedule {
    /// Of these caretakers: one at the least, all of the same schedule.
    pub fn new(valkey: Endpoint, caretakers: Vec<Caretaker>, regrouped: Arc<Notify>) -> Schedule {
        Schedule { valkey, caretakers, regrouped, connecting: Incident::default() }
    }

    /// Takes care until it is told to stop.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            let fault = match Session::open(&self.valkey, NAME).await {
                Ok(session) => {
                    self.connecting.over(Instant::now());
                    self.go(session, &stop).await;
                    continue;
                }
                Err(fault) => fault,
            };
            let stream = &self.caretakers[0].setup.stream;
            let wait = tell(&mut self.connecting, stream, &fault, "the stream is not taken care of");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.asked() => {}
            }
        }
    }

    /// One session's life. A new one may lead to another server: what is lost is looked for first.
    async fn go(&mut self, mut session: Session, stop: &Stop) {
        let setup = &self.caretakers[0].setup;
        let (trim_every, merge_every) = (setup.trim_every, setup.compact_every);
        let (mut trim, mut merge) = (ticks(trim_every), ticks(merge_every));
        let (mut to_trim, mut to_merge) = (Attention::of(self.caretakers.len()), Attention::of(self.caretakers.len()));
        let regrouped = self.regrouped.clone();
        let mut look_at = Some(tokio::time::Instant::now());
        while !session.is_lost() {
            tokio::select! {
                () = stop.asked() => return,
                () = regrouped.notified() => look_at = Some(tokio::time::Instant::now()),
                () = tokio::time::sleep_until(look_at.unwrap_or_else(tokio::time::Instant::now)), if look_at.is_some() => {
                    let mut again = None;
                    for caretaker in &mut self.caretakers {
                        let wait = caretaker.look_upstream(&mut session, stop).await;
                        again = again.max(wait);
                        if stop.is_asked() || session.is_lost() {
                            break;
                        }
                    }
                    look_at = again.map(|wait| tokio::time::Instant::now() + wait);
                }
                _ = trim.tick() => for n in to_trim.round(|n| self.caretakers[n].settled(), trim_every) {
                    self.caretakers[n].trim(&mut session, stop).await;
                    if stop.is_asked() || session.is_lost() {
                        break;
                    }
                },
                _ = merge.tick() => for n in to_merge.round(|n| self.caretakers[n].settled(), merge_every) {
                    self.caretakers[n].merge(&session.link, stop).await;
                    if stop.is_asked() || session.is_lost() {
                        break;
                    }
                },
            }
        }
    }
}

/// Not at once: the workers have yet to create the groups.
fn ticks(every: Duration) -> Interval {
    let mut ticks = interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
