//! A daemon's admin port as a scraper and a prober see it.

use std::collections::BTreeMap;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::Daemon;

/// Where a daemon serves metrics and health.
pub struct Admin {
    pub address: String,
}

/// What a request got.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    /// By name in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    /// The body, which is a document.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

/// One line of a scrape.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// What one scrape has read.
#[derive(Debug, Clone)]
pub struct Scrape {
    pub text: String,
    pub samples: Vec<Sample>,
}

impl Admin {
    /// That of a daemon that has just been started.
    pub async fn of(daemon: &mut Daemon) -> Admin {
        let event = daemon.wait_for_event("listening", |_| true).await;
        Admin { address: event["address"].as_str().expect("an address").to_owned() }
    }

    /// Asks as any host; gives status and body.
    pub async fn ask(&self, path: &str, host: &str) -> std::io::Result<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let answer = String::from_utf8(answer).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        Ok((head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"), body.to_owned()))
    }

    /// Sends any request; gives the whole answer.
    pub async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut stream = TcpStream::connect(&self.address).await.expect("connected");
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        let is_host = |name: &str| name.eq_ignore_ascii_case("host");
        if !headers.iter().any(|(name, _)| is_host(name)) {
            request.push_str("Host: 127.0.0.1\r\n");
        }
        headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
        stream.write_all(format!("{request}\r\n{body}").as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        let answer = String::from_utf8(answer).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
        let header =
            |line: &str| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()));
        Answer { status, headers: lines.filter_map(header).collect(), body: body.to_owned() }
    }

    /// Asks a question of health; gives whether the answer is yes, and its body.
    pub async fn health(&self, path: &str) -> (bool, Value) {
        let (status, body) = self.ask(path, "127.0.0.1").await.expect("an answer");
        assert!([200, 503].contains(&status), "{path}: {status} {body}");
        (status == 200, serde_json::from_str(&body).expect("JSON"))
    }

    /// Scrapes.
    pub async fn scrape(&self) -> Scrape {
        let (status, text) = self.ask("/metrics", "127.0.0.1").await.expect("an answer");
        assert_eq!(status, 200, "{text}");
        Scrape::parse(text)
    }
}

impl Scrape {
    fn parse(text: String) -> Scrape {
        let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(sample).collect();
        Scrape { text, samples }
    }

    /// The sum of all samples of this name whose labels have these values.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let fits = |sample: &&Sample| {
            sample.name == name
                && labels.iter().all(|(label, value)| sample.labels.get(*label).is_some_and(|is| is == value))
        };
        let values: Vec<f64> = self.samples.iter().filter(fits).map(|sample| sample.value).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let labels = labels.trim_end_matches('}').split_terminator("\",").filter_map(|pair| {
        let (label, value) = pair.split_once("=\"")?;
        Some((label.to_owned(), value.trim_end_matches('"').to_owned()))
    });
    Sample { name: name.to_owned(), labels: labels.collect(), value: value.parse().expect("a number") }
}
