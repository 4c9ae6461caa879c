//! The function library: what Valkey does in one atomic step for counters that may vanish and for cached rows.
//!
//! Takes a connection; loads the library, or calls one of its functions and gives the answer's [`Status`] and the rest of it. Fails with what Valkey
//! said: [`NO_FUNCTION`] where the library is not there, [`OTHER_LIBRARY`] where another one has its name.
//!
//! The names of library and functions carry a version, so that two versions of this program can share a server: a change of what a function takes or
//! gives is a new version. The text is `tidegate.lua`; docs/functions.md says how other languages call it.

#[cfg(feature = "daemon")]
pub mod gate;

use std::fmt::Display;

use crate::retry::Fault;
use crate::valkey::{Command, Connection, Reply, unexpected};

/// The library's text.
pub const TEXT: &str = include_str!("tidegate.lua");
/// Its name.
pub const NAME: &str = "tidegate_1";
/// The code of the fault where a server does not know the library.
pub const NO_FUNCTION: &str = "NOFUNCTION";
/// The code of the fault where a server holds another text under the library's name.
pub const OTHER_LIBRARY: &str = "OTHERLIBRARY";

/// Declares the functions, each with its name in the library.
macro_rules! functions {
    ($($(#[doc = $sentence:literal])+ $Function:ident = $name:literal;)+) => {
        /// A function of the library. What each takes and gives stands above it in the library's text.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Function {
            $($(#[doc = $sentence])+ $Function,)+
        }

        impl Function {
            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Function::$Function => concat!("tidegate_1_", $name),)+
                }
            }

            /// All of them.
            #[cfg(test)]
            const ALL: &[Function] = &[$(Function::$Function,)+];
        }
    };
}

functions! {
    /// Adds to one counter.
    Incr = "incr";
    /// Adds to many counters of a shard.
    IncrMany = "incr_many";
    /// Asks for leave to bring a counter's value.
    Lease = "lease";
    /// Asks whether PostgreSQL may be read yet.
    Ready = "ready";
    /// Puts a counter's value in place.
    Install = "install";
    /// Gives a lease back.
    Release = "release";
    /// Makes counters clean.
    Settle = "settle";
    /// Drops values.
    Drop = "drop";
    /// Begins to manage a shard.
    Open = "open";
    /// Says that all values of a shard are in doubt.
    Close = "close";
    /// Says that they were dropped.
    Reopen = "reopen";
    /// Tells where a shard stands.
    Status = "status";
    /// Asks for leave to load a row.
    Load = "load";
    /// Puts a row in place.
    Store = "store";
    /// Gives the leave to load back.
    Unload = "unload";
    /// Bars readers from what a writer is about to change.
    Fence = "fence";
    /// Ends that.
    Lift = "lift";
    /// Drops rows.
    Invalidate = "invalidate";
}

/// How a function answers: the first element of its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Done,
    /// Accepted; the value is not known.
    Blind,
    /// This operation was done before.
    Seen,
    /// Nothing is there: bring it.
    Miss,
    /// Somebody else is bringing it.
    Busy,
    /// Not now: values may not be put in place.
    Closed,
    /// Refused: nothing was done.
    Refused,
    /// The caller's lease is not its own any more: nothing was done.
    Lost,
    /// There are notes to be judged by the ledger.
    Judge,
}

impl Status {
    fn of(number: i64) -> Option<Status> {
        const ALL: [Status; 9] = [
            Status::Done,
            Status::Blind,
            Status::Seen,
            Status::Miss,
            Status::Busy,
            Status::Closed,
            Status::Refused,
            Status::Lost,
            Status::Judge,
        ];
        ALL.get(usize::try_from(number).ok()?.checked_sub(1)?).copied()
    }
}

/// A function's answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its first element.
    pub status: Status,
    rest: Vec<Reply>,
}

impl Answer {
    /// Reads a function's reply.
    ///
    /// # Errors
    /// [`Fault::ValkeyProtocol`] where it is none.
    pub fn told(reply: Reply) -> Result<Answer, Fault> {
        let mut parts = reply.into_array().ok_or_else(|| unexpected("FCALL"))?;
        let status = parts.next().and_then(|status| Status::of(status.as_int()?)).ok_or_else(|| unexpected("FCALL"))?;
        Ok(Answer { status, rest: parts.collect() })
    }

    /// That an operation was done before, of which nothing else is known.
    pub(crate) fn seen() -> Answer {
        Answer { status: Status::Seen, rest: Vec::new() }
    }

    /// The element behind the status, counted from 0, where it is a text.
    pub fn text(&self, n: usize) -> Option<&str> {
        self.rest.get(n)?.as_text()
    }

    /// The element behind the status, counted from 0, where it is a number.
    pub fn int(&self, n: usize) -> Option<i64> {
        self.rest.get(n)?.as_int()
    }

    /// The element behind the status, counted from 0, as bytes.
    pub fn bytes(&self, n: usize) -> Option<&bytes::Bytes> {
        self.rest.get(n)?.as_bytes()
    }

    /// A whole number that is written as a text.
    pub fn number(&self, n: usize) -> Option<i64> {
        self.text(n)?.parse().ok()
    }
}

/// A call under construction.
#[derive(Debug, Clone)]
pub struct Call {
    command: Command,
    /// The first of its keys: all of them are in one slot of a cluster.
    key: String,
}

impl Call {
    /// A call of a function with these keys.
    pub fn new<K: Display>(function: Function, keys: impl IntoIterator<Item = K, IntoIter: ExactSizeIterator>) -> Call {
        let mut keys = keys.into_iter();
        let command = Command::new("FCALL").arg(function.name()).arg(keys.len());
        let key = keys.next().map(|key| key.to_string());
        let command = command.args(&key).args(keys);
        Call { command, key: key.unwrap_or_default() }
    }

    /// The key that tells where it is to be sent.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Adds an argument, as it is displayed.
    pub fn arg(self, argument: impl Display) -> Call {
        Call { command: self.command.arg(argument), ..self }
    }

    /// Adds an argument of any bytes.
    pub fn bytes(self, argument: &[u8]) -> Call {
        Call { command: self.command.bytes(argument), ..self }
    }

    /// Adds arguments.
    pub fn args(self, arguments: impl IntoIterator<Item = impl Display>) -> Call {
        Call { command: self.command.args(arguments), ..self }
    }

    /// What is sent.
    pub fn command(&self) -> Command {
        self.command.clone()
    }

    /// Sends it and reads the answer.
    pub async fn send(self, connection: &Connection) -> Result<Answer, Fault> {
        Answer::told(connection.call(self.command).await.map_err(named)?)
    }

    /// The same; loads the library where the server does not know it.
    pub async fn send_surely(self, connection: &Connection) -> Result<Answer, Fault> {
        match self.clone().send(connection).await {
            Err(fault) if is_unknown(&fault) => {
                load(connection).await?;
                self.send(connection).await
            }
            answer => answer,
        }
    }
}

/// A fault of a call, where the library is missing by a name of its own.
fn named(fault: Fault) -> Fault {
    match fault {
        Fault::Valkey { message, .. } if message.contains(UNKNOWN) => {
            Fault::Valkey { code: NO_FUNCTION.into(), message }
        }
        fault => fault,
    }
}

/// How a server says that it does not know a function.
const UNKNOWN: &str = "Function not found";

/// Whether the server does not know the library.
pub fn is_unknown(fault: &Fault) -> bool {
    matches!(fault, Fault::Valkey { message, .. } if message.contains(UNKNOWN))
}

/// Whether the function, or the script, had begun when it failed: then nobody knows how far it came. Every other refusal is said before it begins.
pub fn had_begun(fault: &Fault) -> bool {
    matches!(fault, Fault::Valkey { message, .. } if message.contains("user_function") || message.contains("user_script"))
}

/// Loads the library, unless it is there. Needs the right to `function|load` and `function|list`.
pub async fn load(connection: &Connection) -> Result<(), Fault> {
    let text = TEXT;
    match connection.call(Command::new("FUNCTION").arg("LOAD").arg(text)).await {
        Ok(_) => Ok(()),
        // A full server refuses to load a library, whether it has it or not.
        Err(Fault::Valkey { code, message }) if code == "OOM" || message.contains("already exists") => {
            let list = Command::new("FUNCTION").arg("LIST").arg("LIBRARYNAME").arg(NAME).arg("WITHCODE");
            let mut libraries = connection.call(list).await?.into_array().ok_or_else(|| unexpected("FUNCTION LIST"))?;
            let known = libraries.next().and_then(Reply::into_map).and_then(|mut fields| {
                fields.find(|(name, _)| name.as_text() == Some("library_code")).map(|(_, code)| code)
            });
            match known.as_ref().and_then(Reply::as_text) {
                Some(known) if known == text => Ok(()),
                None => Err(Fault::Valkey { code, message }),
                Some(_) => Err(Fault::Valkey {
                    code: OTHER_LIBRARY.into(),
                    message: format!("a function library named {NAME} is there, with another text"),
                }),
            }
        }
        Err(fault) => Err(fault),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_registers_exactly_the_functions_that_are_called_and_no_name_without_its_version() {
        assert!(TEXT.starts_with(&format!("#!lua name={NAME}\n")));
        let registered: Vec<&str> =
            TEXT.split("register_function").skip(1).filter_map(|rest| rest.split('\'').nth(1)).collect();
        let mut called: Vec<&str> = Function::ALL.iter().map(|function| function.name()).collect();
        let mut expected = registered.clone();
        called.sort_unstable();
        expected.sort_unstable();
        assert_eq!(called, expected);
        assert!(registered.iter().all(|name| name.starts_with(&format!("{NAME}_"))));
    }

    #[test]
    fn a_missing_library_has_a_code_of_its_own_and_a_call_that_had_begun_is_known() {
        let fault = |message: &str| Fault::Valkey { code: "ERR".into(), message: message.into() };
        assert!(matches!(named(fault("ERR Function not found")), Fault::Valkey { code, .. } if code == NO_FUNCTION));
        assert!(had_begun(&fault("WRONGTYPE no script: tidegate_1_incr, on @user_function:80.")));
        assert!(!had_begun(&fault("OOM command not allowed when used memory > 'maxmemory'.")));
    }
}
