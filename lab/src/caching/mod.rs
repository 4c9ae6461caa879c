//! The reading side against what people write by hand; see `make bench-cache`.
//!
//! Four questions, each on servers of its own: how often a row is loaded when it expires under many readers; how often a reader sees an old row after a
//! COMMIT; how many counters are wrong at rest where they were evicted; and what an increment and a read cost Valkey. All contestants of a table take part
//! in the same run, one after the other. Valkey's processor time is told by Valkey itself, so the contestants' languages do not enter into it.

mod counting;
mod herd;
mod price;
mod stale;

use std::error::Error;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use tidegate::valkey::{Command, Connection, Endpoint};
use tokio::task::LocalSet;

use crate::figures::{self, Bar, Colour};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds that each contestant runs for
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Which tables: herd, stale, counting, price
    #[arg(long, value_delimiter = ',')]
    tables: Vec<String>,
    /// A folder for the plots; the tables go between the marks of the page of the same name beside it
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A table in the making.
struct Table {
    name: &'static str,
    title: String,
    head: &'static [&'static str],
    rows: Vec<Vec<String>>,
    /// The column that is plotted, and what it says.
    plotted: (usize, &'static str),
}

impl Table {
    fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let head: Vec<String> = self.head.iter().map(|cell| (*cell).to_owned()).collect();
        let rule = format!("| ---{} |\n", " | ---:".repeat(head.len() - 1));
        let mut text = format!("{}{rule}", line(&head));
        self.rows.iter().for_each(|row| text.push_str(&line(row)));
        text
    }

    fn plot(&self) -> String {
        let bar = |row: &Vec<String>| {
            let words = row[self.plotted.0].clone();
            // Of "18 (0.30 %)" the share.
            let figure = words.split_once('(').map_or(words.as_str(), |(_, share)| share.trim_end_matches(')'));
            let value = figure.trim_end_matches(" %").replace(',', "").parse().unwrap_or(0.0);
            let colour = if row[0].starts_with("tidegate") { Colour::Ours } else { Colour::Others };
            Bar { label: row[0].replace('`', ""), value, words, range: None, colour }
        };
        let bars: Vec<Bar> = self.rows.iter().map(bar).collect();
        figures::plot(self.plotted.1, &bars)
    }
}

pub async fn run(args: Args) -> bool {
    // The contestants share one thread: what they are compared by does not depend on it.
    match LocalSet::new().run_until(measure(&args)).await {
        Ok(()) => true,
        Err(error) => {
            eprintln!("bench-cache: {error}");
            false
        }
    }
}

async fn measure(args: &Args) -> Result<(), Box<dyn Error>> {
    let lasting = Duration::from_secs(args.seconds);
    let is_wanted = |name: &str| args.tables.is_empty() || args.tables.iter().any(|wanted| wanted == name);
    let mut text = String::new();
    for name in ["herd", "stale", "counting", "price"].into_iter().filter(|name| is_wanted(name)) {
        let table = match name {
            "herd" => herd::table(lasting).await?,
            "stale" => stale::table(lasting).await?,
            "counting" => counting::table(lasting).await?,
            _ => price::table().await?,
        };
        assert_eq!(table.name, name, "a table is what was asked for");
        let (title, markdown) = (&table.title, table.markdown());
        println!("### {title}\n\n{markdown}");
        if let Some(folder) = &args.out {
            std::fs::create_dir_all(folder)?;
            std::fs::write(folder.join(format!("{name}.svg")), table.plot())?;
            let place = folder.file_name().unwrap_or_default().to_string_lossy();
            writeln!(text, "### {title}\n\n![{title}]({place}/{name}.svg)\n\n{markdown}")?;
        }
    }
    if let Some(folder) = &args.out {
        figures::put_on_page(&folder.with_extension("md"), "bench-cache", text.trim_end())?;
    }
    Ok(())
}

fn endpoint(url: &str) -> Endpoint {
    let limit = Duration::from_secs(5);
    Endpoint::new(url.to_owned().into(), limit, limit)
}

/// A connection for a contestant that is written by hand.
async fn connect(url: &str) -> Result<Connection, Box<dyn Error>> {
    Ok(Connection::open_unnamed(&endpoint(url)).await?)
}

/// One command of words.
fn words<const N: usize>(name: &'static str, words: [&str; N]) -> Command {
    Command::new(name).args(words)
}

fn percent(part: u64, of: u64) -> String {
    if of == 0 { "–".into() } else { format!("{:.2} %", part as f64 * 100.0 / of as f64) }
}
