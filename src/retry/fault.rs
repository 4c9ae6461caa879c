//! Fault: what went wrong with a server, in the words of the one who said it.
//!
//! Takes what a server answered, or that it did not; gives a value that names no client library. It cannot fail.

use std::{fmt, io};

/// What went wrong, in the words of the one who said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Valkey answered with an error.
    Valkey {
        /// The reply's first word, such as `NOGROUP`.
        code: String,
        /// The whole reply.
        message: String,
    },
    /// Valkey did not answer in time, or closed the connection.
    ValkeyLost(String),
    /// What answered cannot be understood or trusted: a certificate, TLS to a plain port, another protocol.
    ValkeyProtocol(String),
    /// PostgreSQL answered with an error.
    Postgres {
        /// Its five-character code.
        sqlstate: String,
        /// Its primary message. The detail, which may quote rows, is left with the server.
        message: String,
        /// The schema it names, if it names one.
        schema: Option<String>,
        /// The constraint it names, if it names one.
        constraint: Option<String>,
        /// The function of the server's source that says it: one code stands for different things, and messages are translated.
        routine: Option<Box<str>>,
    },
    /// PostgreSQL did not answer in time or closed the connection: what was sent may or may not have happened.
    PostgresLost(String),
    /// What answered cannot be understood or trusted: a certificate, a server without TLS, another protocol. What was sent may or may
    /// not have happened.
    PostgresProtocol(String),
    /// A batch cannot be summed: the total of one key leaves the range of `bigint`.
    SumOverflow,
    /// A flush met rows of concurrent flushes again and again.
    StillRefused,
}

impl Fault {
    /// One word for programs: what the server called it, or what it is called here.
    pub fn code(&self) -> &str {
        match self {
            Fault::Valkey { code, .. } => plain(code),
            Fault::Postgres { sqlstate, .. } => plain(sqlstate),
            Fault::ValkeyLost(_) => "valkey_lost",
            Fault::ValkeyProtocol(_) => "valkey_protocol",
            Fault::PostgresLost(_) => "postgres_lost",
            Fault::PostgresProtocol(_) => "postgres_protocol",
            Fault::SumOverflow => "sum_overflow",
            Fault::StillRefused => "still_refused",
        }
    }

    /// The same where a server does not say which key it is about, and somebody has to know.
    pub fn about(self, key: &str) -> Fault {
        match self {
            Fault::Valkey { code, message } if code == "WRONGTYPE" => {
                let message = format!("{} ({key:?})", without_script(&message));
                Fault::Valkey { code, message }
            }
            fault => fault,
        }
    }

    /// Whether a server of a cluster said that another one has, or gets, what it was asked for.
    pub fn is_redirection(&self) -> bool {
        matches!(self, Fault::Valkey { code, .. } if ["MOVED", "ASK"].contains(&&**code))
    }

    /// Whether it says that another server is the primary, by now, of what was asked for.
    pub fn is_of_another_server(&self) -> bool {
        self.is_redirection() || matches!(self, Fault::Valkey { code, .. } if code == "READONLY")
    }
}

/// A server's code, if it looks like one: it may come from anybody's trigger or script.
fn plain(code: &str) -> &str {
    const LONGEST: usize = 32;
    let is_plain = (1..=LONGEST).contains(&code.len()) && code.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if is_plain { code } else { "other" }
}

/// A server's words without the script in which it met the error: its hash, which Valkey 9.1 leaves out, says nothing to anybody.
fn without_script(message: &str) -> &str {
    match message.rsplit_once(" script: ") {
        Some((words, place)) if place.contains("on @user_script:") => words,
        _ => message,
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Valkey { message, .. } => write!(f, "Valkey: {}", without_script(message)),
            Fault::ValkeyLost(why)
            | Fault::ValkeyProtocol(why)
            | Fault::PostgresLost(why)
            | Fault::PostgresProtocol(why) => f.write_str(why),
            Fault::Postgres { sqlstate, message, .. } => write!(f, "PostgreSQL: {message} ({sqlstate})"),
            Fault::SumOverflow => f.write_str("the deltas of one key add up to more than a bigint holds"),
            Fault::StillRefused => f.write_str("the ledger refused the batch again and again"),
        }
    }
}

impl std::error::Error for Fault {}

/// An error of a socket, without the numbers of the operating system.
pub fn socket_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::ConnectionReset => "connection reset".into(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionAborted => {
            "the other side closed the connection".into()
        }
        io::ErrorKind::TimedOut => "no answer in time".into(),
        io::ErrorKind::NotFound => "there is no such socket".into(),
        _ => {
            let words = error.to_string();
            if words.starts_with("failed to lookup address information") {
                return "the host's name is not known".into();
            }
            words.split(" (os error").next().unwrap_or_default().to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_in_which_an_error_was_met_is_not_told() {
        // As Valkey 8.0 and Redis say it, and as Valkey 9.1 does.
        for place in ["5f2a, on @user_script:3.", "on @user_script:3."] {
            let fault = Fault::Valkey { code: "WRONGTYPE".into(), message: format!("WRONGTYPE no script: {place}") };
            assert_eq!(fault.to_string(), "Valkey: WRONGTYPE no");
        }
        let fault = Fault::Valkey { code: "ERR".into(), message: "ERR no script: of that name".into() };
        assert_eq!(fault.to_string(), "Valkey: ERR no script: of that name");
    }
}
