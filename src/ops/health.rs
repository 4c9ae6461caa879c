//! `tidegate health`: asks the daemon on this machine how it is, for images without a shell or an HTTP client.
//!
//! Takes the configuration that the daemon has, and asks its admin port. Writes the answer. Fails only when it cannot write.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Exit;
use crate::config::Config;
use crate::telemetry::health::Question;

/// The longest answer that is read: one with the health of a few thousand pipelines.
const MAX_ANSWER_BYTES: u64 = 4 << 20;

/// What can be said on the command line. Without a question: is it ready?
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Args {
    /// Is any of its actors stuck? For a liveness probe: an outage of a server does not change it
    #[arg(long, group = "question")]
    pub live: bool,
    /// Are its workers at work? The default
    #[arg(long, group = "question")]
    pub ready: bool,
    /// Were its workers started?
    #[arg(long, group = "question")]
    pub startup: bool,
    /// How long to wait for the answer
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
}

/// Runs the verb; gives 0 where the answer is yes, 1 where it is no or where nobody answers, 78 where nobody is to be asked.
pub async fn run(args: Args, config: &Config, out: &mut dyn Write) -> io::Result<Exit> {
    let question = match args {
        Args { live: true, .. } => Question::Live,
        Args { startup: true, .. } => Question::Startup,
        _ => Question::Ready,
    };
    let Some(listen) = config.admin.listen else {
        writeln!(
            io::stderr(),
            "tidegate health: admin.listen is empty, so the daemon cannot be asked; set it to an address"
        )?;
        return Ok(Exit::Config);
    };
    let address = reachable(listen);
    let answer = match tokio::time::timeout(args.timeout, ask(address, question)).await {
        Ok(answer) => answer,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")),
    };
    match answer {
        Ok((is_yes, body)) => {
            writeln!(out, "{}", body.trim_end())?;
            Ok(if is_yes { Exit::Ok } else { Exit::Error })
        }
        Err(error) => {
            let words = crate::retry::socket_words(&error);
            writeln!(
                io::stderr(),
                "tidegate health: no daemon answers at {address}: {words}; is it running, with this admin.listen?"
            )?;
            Ok(Exit::Error)
        }
    }
}

/// Where a daemon that listens there can be reached from its own machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// Asks; gives whether the answer is yes, and its body.
async fn ask(address: SocketAddr, question: Question) -> io::Result<(bool, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n", question.path());
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await?;
    parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "what answers is not Tidegate's admin port"))
}

/// Reads an answer of HTTP/1.1 that is not chunked. None: it is something else.
fn parse(answer: &str) -> Option<(bool, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?;
    let is_json = head.lines().any(|line| line.eq_ignore_ascii_case("content-type: application/json"));
    (is_json && ["200", "503"].contains(&status)).then(|| (status == "200", body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_everybody_is_asked_at_the_loopback() {
        let asked = |listen: &str| reachable(listen.parse().expect("an address")).to_string();
        assert_eq!(asked("0.0.0.0:9464"), "127.0.0.1:9464");
        assert_eq!(asked("[::]:9464"), "[::1]:9464");
        assert_eq!(asked("10.0.0.7:1"), "10.0.0.7:1");
    }

    #[test]
    fn only_an_answer_of_the_admin_port_counts() {
        let json = "content-type: application/json\r\n\r\n{}";
        assert_eq!(parse(&format!("HTTP/1.1 200 OK\r\n{json}")), Some((true, "{}".into())));
        assert_eq!(parse(&format!("HTTP/1.1 503 Service Unavailable\r\n{json}")), Some((false, "{}".into())));
        for other in [
            "",
            "nonsense",
            "HTTP/1.1 200 OK\r\n\r\nhello",
            "HTTP/1.1 404 Not Found\r\n\r\n",
            "-ERR unknown command\r\n\r\n",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
