//! `tidegate audit`: does every counter in Valkey equal its row in PostgreSQL and what is on the way between?
//!
//! Takes a pipeline, and which of its counters; prints those that differ, by class, and with --repair sets Valkey right, by adding the
//! difference. Exit 3 when any differs. It refuses to judge what it could not read to the end: exit 75.
//!
//! # While producers run
//!
//! A counter, its row and the stream cannot be read at one moment; read one after the other they always differ. So nothing is compared that
//! was read at different moments. For each counter the script that reads it also tells the stream's last id of that moment: the counter has
//! every entry up to there, and none behind. PostgreSQL is read in one snapshot, with its ledger, and the ledger tells entry by entry which are
//! in the rows of that snapshot. What lies between the two moments is read from the stream: an entry before the counter's moment that the
//! snapshot lacks is pending; one behind it that the snapshot has is taken off. So
//!
//! `Valkey = PostgreSQL + pending - ahead + dead letters`
//!
//! holds exactly, under any load, for producers that add counter and entry in one step. For those that add them in two, a counter is a moment
//! ahead of its entry: what differs is looked at again, at random moments, and only what differs each time, and often by as much, is called drift.
//!
//! `keys` says which counters; `round` looks at them once and `book` adds up; `judge` says what differs; `repair` sets it right.

mod book;
mod judge;
mod keys;
mod repair;
mod round;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use self::judge::{Class, History, Sums};
use self::keys::Keys;
use self::round::Round;
use super::columns::{Page, Tone, count, cut, plural, printable, signed};
use super::complete::{Name, by};
use super::context::{Report, one_of_counters};
use super::observe::Servers;
use super::{Context, Exit, Failure};
use crate::config::Needs;
use crate::model::pipeline::Pipeline;
use crate::shutdown::Signals;
use crate::target;

/// How many counters are judged together.
const TOGETHER: usize = 20_000;
/// How often a counter that differs is looked at, at the most.
const ROUNDS: usize = 20;
/// How often a look is taken again because something was trimmed meanwhile.
const TRIES: usize = 6;
/// The shortest and the longest wait between two looks, in milliseconds: at random, so that no producer keeps step with them.
const BETWEEN_MS: (u64, u64) = (40, 200);

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// The pipeline; may be left out where there is only one
    #[arg(long, value_name = "NAME", add = by(Name::CounterPipeline))]
    pub pipeline: Option<String>,
    /// Every counter, of the table and of Valkey
    #[arg(long, conflicts_with_all = ["sample", "keys"])]
    pub full: bool,
    /// So many counters, at random
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub sample: u32,
    /// Only this counter, by its row's key; may be given several times
    #[arg(long = "key", value_name = "KEY", conflicts_with = "sample")]
    pub keys: Vec<String>,
    /// Set Valkey right: add to each counter what it lacks, after the differences were shown
    #[arg(long)]
    pub repair: bool,
    /// With --repair: only show what would be added
    #[arg(long, requires = "repair")]
    pub dry_run: bool,
    /// With --repair: do it without asking
    #[arg(long, requires = "repair")]
    pub yes: bool,
    /// Show so many differences at the most; all are counted
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub limit: usize,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Audit {
    /// The pipeline.
    pub pipeline: String,
    /// `full`, `sample` or `keys`.
    pub scope: &'static str,
    /// Counters that were judged.
    pub counters: u64,
    /// Counters whose row has the same value.
    pub equal: u64,
    /// Counters whose row differs by what is on the way: all is well.
    pub pending: u64,
    /// Counters whose row differs by open or discarded dead letters.
    pub dead_letters: u64,
    /// Counters that are above their row and all that is on the way.
    pub valkey_ahead: u64,
    /// Counters that are below their row and all that is on the way.
    pub pg_ahead: u64,
    /// Counters of which it cannot be said what they should be.
    pub unexplained: u64,
    /// Entries that are in the rows, and that the streams had no longer although nothing had trimmed them: Valkey came back with an older copy, or
    /// they were deleted. Only those behind the last entry that is settled and acknowledged are seen.
    pub gone: u64,
    /// Counters that were set right.
    pub repaired: u64,
    /// Whether nothing was set right because that was only tried.
    pub dry_run: bool,
    /// Those that differ, the largest differences first.
    pub differences: Vec<Difference>,
}

/// A counter that differs.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Difference {
    /// The row's key.
    pub key: String,
    /// `valkey_ahead`, `pg_ahead` or `unexplained`.
    pub class: Class,
    /// The counter in Valkey; null where there is none. Whole numbers as text: they may have more than 53 bits.
    pub valkey: Option<String>,
    /// The row in PostgreSQL; null where there is none.
    pub postgres: Option<String>,
    /// What is on the way to the row.
    pub pending: String,
    /// What dead letters hold back.
    pub dead_letters: String,
    /// What Valkey has more than it should; negative: less.
    pub difference: String,
    /// Why, where it is known.
    pub why: Option<String>,
    /// Whether it was set right.
    pub repaired: bool,
    #[serde(skip)]
    exact: i128,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let pipeline = one_of_counters(&config, opts.pipeline.as_deref())?;
    let mut servers = Servers::of(&config, "tidegate:audit")?;
    let mut signals = Signals::listen()?;
    tokio::select! {
        audited = audit(&opts, context, pipeline, &mut servers) => audited,
        _ = signals.next() => Ok(Exit::Interrupted),
    }
}

async fn audit(opts: &Opts, context: &Context, pipeline: &Pipeline, servers: &mut Servers) -> Result<Exit, Failure> {
    let keys = keys(pipeline, servers).await?;
    // Held to the end: two repairs at once would both add what one of them should.
    let lock = match opts.repair && !opts.dry_run {
        true => Some(repair::lock(servers, pipeline).await?),
        false => None,
    };
    let mut audit = examine(opts, &|line| context.say(line), pipeline, &keys, servers).await?;
    if opts.repair {
        repair::repair(opts, context, servers, pipeline, &keys, &mut audit).await?;
    }
    drop(lock);
    let differ = audit.differ();
    audit.differences.truncate(opts.limit);
    context.print(&audit)?;
    Ok(if differ { Exit::Drift } else { Exit::Ok })
}

/// Compares, and changes nothing: what `tidegate audit` says without --repair.
pub async fn look(
    opts: &Opts,
    say: &(dyn Fn(&str) + Sync),
    pipeline: &Pipeline,
    servers: &mut Servers,
) -> Result<Audit, Failure> {
    let keys = keys(pipeline, servers).await?;
    let mut audit = examine(opts, say, pipeline, &keys, servers).await?;
    audit.differences.truncate(opts.limit);
    Ok(audit)
}

/// The keys of the pipeline's table, which must fit.
async fn keys(pipeline: &Pipeline, servers: &Servers) -> Result<Keys, Failure> {
    let checked = servers.database.run(async |c| target::check_tables_that_are_read(c, pipeline).await).await?;
    let fits = checked.map_err(|unfit| Failure::new(Exit::Config, unfit.to_string()))?;
    Ok(Keys::new(pipeline, &fits[0]))
}

/// Judges all counters that are asked for; gives every difference, the largest first.
async fn examine(
    opts: &Opts,
    say: &(dyn Fn(&str) + Sync),
    pipeline: &Pipeline,
    keys: &Keys,
    servers: &mut Servers,
) -> Result<Audit, Failure> {
    let scope = if opts.full {
        "full"
    } else if opts.keys.is_empty() {
        "sample"
    } else {
        "keys"
    };
    let mut audit = Audit { pipeline: pipeline.name.clone(), scope, dry_run: opts.dry_run, ..Audit::default() };
    let mut groups = keys.groups(opts, servers);
    while let Some(ids) = groups.next(servers).await? {
        let judged = judge(say, servers, pipeline, keys, ids, &mut audit.gone).await?;
        audit.add(&judged);
    }
    audit.differences.sort_by_key(|difference| std::cmp::Reverse(difference.exact.unsigned_abs()));
    Ok(audit)
}

/// Judges these counters: once, and those that differ again until it is certain that they do.
async fn judge(
    say: &(dyn Fn(&str) + Sync),
    servers: &mut Servers,
    pipeline: &Pipeline,
    keys: &Keys,
    ids: BTreeSet<String>,
    gone: &mut u64,
) -> Result<BTreeMap<String, (Class, Sums)>, Failure> {
    let mut judged = BTreeMap::new();
    let mut history: BTreeMap<String, History> = BTreeMap::new();
    let mut open = ids;
    for round in 0..ROUNDS {
        if round > 0 {
            tokio::time::sleep(pause()).await;
        }
        let sums = persistently(say, servers, pipeline, keys, &open, gone).await?;
        let mut differ = BTreeSet::new();
        for (id, sums) in sums {
            let history = history.entry(id.clone()).or_default();
            match history.see(sums, round + 1 == ROUNDS) {
                Some((class, sums)) => drop(judged.insert(id, (class, sums))),
                None => drop(differ.insert(id)),
            }
        }
        open = differ;
        if open.is_empty() {
            break;
        }
    }
    Ok(judged)
}

fn pause() -> Duration {
    Duration::from_millis(rand::random_range(BETWEEN_MS.0..=BETWEEN_MS.1))
}

/// A round, again where something was trimmed while it was read. `gone`: how many entries the ledger has that the streams have no longer.
async fn persistently(
    say: &(dyn Fn(&str) + Sync),
    servers: &mut Servers,
    pipeline: &Pipeline,
    keys: &Keys,
    ids: &BTreeSet<String>,
    gone: &mut u64,
) -> Result<BTreeMap<String, Sums>, Failure> {
    let mut last = String::new();
    for _ in 0..TRIES {
        match round::take(servers, pipeline, keys, ids).await? {
            Round::Whole(sums, now_gone) => {
                *gone = now_gone.max(*gone);
                return Ok(sums);
            }
            Round::Partial(why) => {
                say(&format!("reading again: {why}"));
                last = why;
            }
        }
        tokio::time::sleep(pause()).await;
    }
    Err(Failure::new(
        Exit::Retry,
        format!("nothing was judged: each of {TRIES} times {last}. Run it again, or raise trim.retention"),
    ))
}

impl Audit {
    /// Whether any counter differs still.
    pub fn differ(&self) -> bool {
        self.differences.iter().any(|difference| !difference.repaired)
    }

    fn add(&mut self, judged: &BTreeMap<String, (Class, Sums)>) {
        for (key, (class, sums)) in judged {
            self.counters += 1;
            let place = match class {
                Class::Equal => &mut self.equal,
                Class::Pending => &mut self.pending,
                Class::DeadLetters => &mut self.dead_letters,
                Class::ValkeyAhead => &mut self.valkey_ahead,
                Class::PgAhead => &mut self.pg_ahead,
                Class::Unexplained => &mut self.unexplained,
            };
            *place += 1;
            if class.differs() {
                self.differences.push(Difference::of(key, *class, sums));
            }
        }
    }
}

impl Difference {
    fn of(key: &str, class: Class, sums: &Sums) -> Difference {
        Difference {
            key: key.to_owned(),
            class,
            valkey: sums.valkey.map(|value| value.to_string()),
            postgres: sums.stored.map(|value| value.to_string()),
            pending: (sums.pending - sums.ahead).to_string(),
            dead_letters: sums.letters.to_string(),
            difference: sums.difference().to_string(),
            why: sums.why(),
            repaired: false,
            exact: sums.difference(),
        }
    }
}

impl Report for Audit {
    fn show(&self, page: &mut Page) {
        let differ = self.valkey_ahead + self.pg_ahead + self.unexplained;
        let counters = plural(self.counters, "counter", "counters");
        let left = differ.saturating_sub(self.repaired);
        match (differ, left) {
            (0, _) => {
                page.toned(Tone::Good, format!("{}: {counters} judged ({}), none differs", self.pipeline, self.scope))
            }
            (_, 0) => page.toned(
                Tone::Good,
                format!("{}: {counters} judged ({}), {} set right", self.pipeline, self.scope, count(differ)),
            ),
            _ => page.toned(
                Tone::Bad,
                format!("{}: {counters} judged ({}), {} differ", self.pipeline, self.scope, count(left)),
            ),
        }
        for (number, words) in [
            (self.equal, "equal"),
            (self.pending, "differ by what is on the way: all is well"),
            (self.dead_letters, "differ by dead letters: see `tidegate dead list`"),
            (self.valkey_ahead, "are ahead in Valkey"),
            (self.pg_ahead, "are ahead in PostgreSQL"),
            (self.unexplained, "are unexplained"),
            (self.repaired, "were set right"),
        ] {
            if number > 0 {
                page.line(format!("  {:>12}  {words}", count(number)));
            }
        }
        if self.gone > 0 {
            let entries = plural(self.gone, "entry", "entries");
            page.line(format!(
                "{entries} in PostgreSQL are no longer in the stream: Valkey came back with an older copy, or they were deleted"
            ));
        }
        if self.differences.is_empty() {
            return;
        }
        let rows: Vec<Vec<String>> = self
            .differences
            .iter()
            .map(|d| {
                let or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
                let class = if d.repaired { "repaired" } else { d.class.word() };
                vec![
                    cut(&printable(&d.key), 40),
                    class.to_owned(),
                    or_none(&d.valkey),
                    or_none(&d.postgres),
                    d.pending.clone(),
                    d.dead_letters.clone(),
                    signed(d.exact),
                    cut(&printable(d.why.as_deref().unwrap_or_default()), 80),
                ]
            })
            .collect();
        page.table(&["key", "class", ">valkey", ">postgres", ">pending", ">letters", ">difference", "why"], &rows);
    }
}
