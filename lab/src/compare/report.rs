//! The report: tables to read, plots to look at, figures to compute with.
//!
//! Takes the scores of each workload; gives a table on stdout, a plot for each workload and `results.json` in a folder, and the
//! tables in the page of the folder's name. Fails where a file cannot be written.

use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::figures::{Bar, Colour, median, plot, put_on_page, range, thousands};
use tidegate::model::pipeline::Delivery;

use super::contestants::{Contestant, RETENTION};
use super::workload::Workload;
use super::{SETTINGS, Score, Stage};

/// A workload's plots.
struct Plots {
    /// Everybody, and the limits.
    all: String,
    /// Those who do the whole job, the fastest first.
    workers: String,
}

/// Everything that was measured.
pub struct Report {
    heading: String,
    runs: usize,
    tables: Vec<(Workload, String, Plots)>,
    raw: Vec<Value>,
}

impl Report {
    /// Says on what it is measured.
    pub async fn begin(stage: &Stage, runs: usize) -> Result<Report, Box<dyn Error>> {
        let mut database = PgConnection::connect(&stage.database()).await?;
        let postgres: String = sqlx::query_scalar("show server_version").fetch_one(&mut database).await?;
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, m)| m);
        let cores = std::thread::available_parallelism()?;
        let versions = [
            says(&stage.tidegate.display().to_string(), &["--version"])
                .map_or_else(|| "Tidegate".into(), |version| version.replace("tidegate", "Tidegate")),
            format!("Valkey {}", stage.valkey.version().unwrap_or_else(|| "unknown".into())),
            format!("PostgreSQL {}", postgres.split(' ').next().unwrap_or_default()),
            says("node", &["--version"]).map_or_else(|| "no Node".into(), |version| format!("Node {version}")),
            says(&stage.python.display().to_string(), &["--version"]).unwrap_or_else(|| "no Python".into()),
        ];
        let heading = format!(
            "{} entries, {runs} rounds; {cpu}, {cores} cores for both servers and the worker together; {}; PostgreSQL with {}; Tidegate with a retention of {RETENTION}, so that it trims nothing",
            thousands(stage.entries as f64),
            versions.join(", "),
            SETTINGS.join(", ")
        );
        println!("{heading}");
        Ok(Report { heading, runs, tables: Vec::new(), raw: Vec::new() })
    }

    /// Adds a workload, and shows its table.
    pub fn add(&mut self, workload: Workload, scores: &[Score]) {
        let table = table(scores);
        println!("\n{}\n\n{table}", workload.title);
        for score in scores {
            let runs: Vec<Value> = score.took.iter().map(|took| {
                json!({ "seconds": took.seconds, "entries": took.entries, "cpu_seconds": took.cpu, "valkey_cpu_seconds": took.valkey, "peak_memory_bytes": took.memory })
            }).collect();
            self.raw.push(
                json!({ "workload": workload.name, "contestant": score.name, "exact": score.exact, "runs": runs }),
            );
        }
        self.tables.push((workload, table, plots(workload, scores)));
    }

    /// Writes it down: plots and figures into the folder, tables between the marks of the page beside it.
    pub fn write(&self, folder: &Path) -> Result<(), Box<dyn Error>> {
        std::fs::create_dir_all(folder)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let mut text = format!("{}.\n", self.heading);
        for (workload, table, plots) in &self.tables {
            let (title, file) = (workload.title, format!("{}.svg", workload.name));
            write!(text, "\n### {title}\n\n![{title}]({name}/{file})\n\n{table}")?;
            std::fs::write(folder.join(file), &plots.all)?;
            std::fs::write(folder.join(format!("{}-workers.svg", workload.name)), &plots.workers)?;
        }
        put_on_page(&folder.with_extension("md"), "bench-compare", &text)?;
        let raw = json!({ "on": self.heading, "runs": self.runs, "figures": self.raw });
        std::fs::write(folder.join("results.json"), serde_json::to_string_pretty(&raw)? + "\n")?;
        Ok(())
    }
}

fn table(scores: &[Score]) -> String {
    let limits = [Delivery::Group, Delivery::Exclusive].map(|delivery| slower_limit(scores, delivery));
    let node = scores.iter().find(|score| score.contestant == Contestant::Node("batch")).map(rates);
    let mut table = String::from(
        "| | delivery | entries/s | of the slower limit | × Node | CPU s per million | Valkey's CPU, µs an entry | peak MiB | table |\n|---|---|--:|--:|--:|--:|--:|--:|---|\n",
    );
    for score in scores {
        let rates = rates(score);
        let (least, most) = range(&rates);
        let against = |others: &Option<Vec<f64>>| {
            let ratio =
                others.as_ref().map(|others| median(&rates.iter().zip(others).map(|(a, b)| a / b).collect::<Vec<_>>()));
            ratio.map_or_else(|| "–".into(), |ratio| format!("{ratio:.2}"))
        };
        let of_own = |figure: String| if is_limit(score.contestant) { "–".to_owned() } else { figure };
        let cpu = median(&score.took.iter().map(|took| took.cpu / took.entries as f64 * 1e6).collect::<Vec<_>>());
        let valkey = median(&score.took.iter().map(|took| took.valkey / took.entries as f64 * 1e6).collect::<Vec<_>>());
        let memory = median(&score.took.iter().map(|took| took.memory as f64 / f64::from(1 << 20)).collect::<Vec<_>>());
        let exact = match score.contestant {
            Contestant::LimitValkey(_) => "–",
            _ if score.exact => "exact",
            _ => "WRONG",
        };
        let _ = writeln!(
            table,
            "| {} | {} | {} ({}–{}) | {} | {} | {} | {} | {} | {exact} |",
            score.name,
            score.promise,
            thousands(median(&rates)),
            thousands(least),
            thousands(most),
            against(&limits[usize::from(reads_alone(score.contestant))]),
            against(&node),
            of_own(format!("{cpu:.2}")),
            if matches!(score.contestant, Contestant::LimitPostgres(_)) {
                "–".into()
            } else {
                format!("{valkey:.2}")
            },
            of_own(format!("{memory:.0}")),
        );
    }
    table
}

fn is_limit(contestant: Contestant) -> bool {
    matches!(contestant, Contestant::LimitValkey(_) | Contestant::LimitPostgres(_))
}

fn reads_alone(contestant: Contestant) -> bool {
    matches!(contestant, Contestant::Tidegate(Delivery::Exclusive, _) | Contestant::LimitValkey(Delivery::Exclusive))
}

/// Round by round, what the slower of the two servers can do alone, over one connection, Valkey being read in this way.
fn slower_limit(scores: &[Score], delivery: Delivery) -> Option<Vec<f64>> {
    let of = |wanted| scores.iter().find(|score| score.contestant == wanted).map(rates);
    let (valkey, postgres) = (of(Contestant::LimitValkey(delivery))?, of(Contestant::LimitPostgres(1))?);
    Some(valkey.iter().zip(&postgres).map(|(a, b)| a.min(*b)).collect())
}

fn rates(score: &Score) -> Vec<f64> {
    score.took.iter().map(|took| took.entries as f64 / took.seconds).collect()
}

fn plots(workload: Workload, scores: &[Score]) -> Plots {
    let title = format!("{}: entries/s, median (line: least to most)", workload.title);
    let all = plot(&title, &scores.iter().map(bar).collect::<Vec<_>>());
    let mut workers: Vec<Bar> = scores.iter().filter(|score| !is_limit(score.contestant)).map(bar).collect();
    workers.sort_by(|one, other| other.value.total_cmp(&one.value));
    Plots { all, workers: plot(&title, &workers) }
}

fn bar(score: &Score) -> Bar {
    let rates = rates(score);
    let colour = match score.contestant {
        Contestant::Tidegate(..) => Colour::Ours,
        Contestant::LedgerOff => Colour::OursPriced,
        contestant if is_limit(contestant) => Colour::Limit,
        _ => Colour::Others,
    };
    let (value, words) = (median(&rates), thousands(median(&rates)));
    Bar { label: score.name.to_owned(), value, words, range: Some(range(&rates)), colour }
}

fn says(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().trim_start_matches('v').to_owned())
}
