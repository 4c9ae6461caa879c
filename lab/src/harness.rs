//! What every test stands on: its own Valkey, its own database, and the real program as a process.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tidegate::config::{Needs, Sources};
use tidegate::model::pipeline::Identifier;
use tidegate::ops::sandbox::{Postgres, Valkey};
use tidegate::postgres::schema;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::{OnceCell, mpsc};

use crate::rights;

/// The limit for anything that a test waits for; a test that is meant to fail need not wait for so long.
static LIMIT: LazyLock<Duration> = LazyLock::new(|| {
    let seconds = std::env::var("TIDEGATE_TEST_LIMIT").ok().and_then(|limit| limit.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
});

/// Names the control that is broken, in a tree with all controls' edits: for the tests and for every program they start.
pub const BROKEN: &str = "TIDEGATE_BROKEN";

pub const STREAM: &str = "flush:counters";
pub const GROUP: &str = "tidegate:counters";

/// The program: the one that cargo names to a test, else the one beside this program.
pub fn program() -> PathBuf {
    let beside = || std::env::current_exe().expect("this program's path").with_file_name("tidegate");
    std::env::var_os("CARGO_BIN_EXE_tidegate").map_or_else(beside, PathBuf::from)
}

/// One PostgreSQL for all tests of the process, each in a database of its own, copied from a migrated one.
static POSTGRES: OnceCell<Postgres> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

fn name(text: &str) -> Identifier {
    Identifier::parse(text).expect("a plain name")
}

async fn shared_postgres() -> &'static Postgres {
    let start = || async {
        let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
        postgres.create_database(&name("migrated"), None).await.expect("created");
        migrate(&postgres.url("migrated")).await;
        postgres
    };
    POSTGRES.get_or_init(start).await
}

pub async fn migrate(url: &str) {
    let url = if rights::are_least() { rights::of_migrator(url).await } else { url.to_owned() };
    let env = [("DATABASE_URL".to_owned(), url)].into();
    let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES).expect("valid");
    schema::apply(&loaded.config.postgres.address().expect("set")).await.expect("migrated");
}

/// A whole folder, with its owners.
pub fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(copied.success());
}

/// A standby that follows this PostgreSQL, which is restarted for it, with settings that are no less than the primary's. The primary waits for it if
/// `synchronous_standby_names` is set later.
pub async fn standby_of(primary: &mut Postgres, settings: &[&str]) -> Postgres {
    let mut standby = Postgres::start(settings).await.expect("PostgreSQL starts");
    primary.stop();
    standby.stop();
    copy(&primary.data(), &standby.data());
    std::fs::write(standby.data().join("standby.signal"), "").expect("written");
    let follows = format!("primary_conninfo = 'host=127.0.0.1 port={} user=postgres'\n", primary.port());
    std::fs::write(standby.data().join("postgresql.auto.conf"), follows).expect("written");
    primary.restart().await.expect("PostgreSQL comes back");
    standby.restart().await.expect("a standby");
    standby
}

/// A database that nobody else uses; `migrated` or empty.
pub async fn database(migrated: bool) -> String {
    let postgres = shared_postgres().await;
    let database = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let template = migrated.then(|| name("migrated"));
    postgres.create_database(&name(&database), template.as_ref()).await.expect("created");
    postgres.url(&database)
}

/// A Valkey with these arguments. Where programs run with the documented rights it knows the users, after a restart, too.
pub async fn valkey(arguments: &[&str]) -> Valkey {
    let users = if rights::are_least() { rights::of_new_server() } else { Vec::new() };
    let arguments: Vec<&str> = arguments.iter().copied().chain(users.iter().map(String::as_str)).collect();
    Valkey::start(&arguments).await.expect("Valkey starts")
}

/// Polls until a condition holds.
pub async fn eventually<T: std::fmt::Debug + PartialEq>(what: &str, expected: T, mut look: impl AsyncFnMut() -> T) {
    let met = async || {
        let found = look().await;
        if found == expected { Ok(()) } else { Err(format!("expected {expected:?}, found {found:?}")) }
    };
    eventually_found(what, met).await;
}

/// Polls until something is found, and gives it: the one place of the tests that waits by the clock, and fails at its limit.
pub async fn eventually_found<T>(what: &str, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = tokio::time::Instant::now() + *LIMIT;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(instead) => assert!(tokio::time::Instant::now() < deadline, "{what}: {instead} to the end"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A port on which nobody listens.
pub fn free_port() -> u16 {
    tidegate::ops::sandbox::free_port().expect("a free port")
}

/// Runs a program to its end: exit code, stdout, stderr.
pub async fn output(command: &mut Command) -> (i32, String, String) {
    let output = within_limit("the end of the program", command.output()).await.expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Waits for a signal, with a limit.
pub async fn within_limit<T>(what: &str, signal: impl Future<Output = T>) -> T {
    tokio::time::timeout(*LIMIT, signal).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

/// A Valkey, a database, and programs that run on them.
pub struct Lab {
    pub valkey: Valkey,
    pub database: String,
}

impl Lab {
    pub async fn new() -> Lab {
        Lab { valkey: valkey(&[]).await, database: database(true).await }
    }

    /// On a PostgreSQL of the test's own, which can be stopped, copied or set up in another way, in a migrated database of this name.
    pub async fn on(postgres: &Postgres, database: &str) -> Lab {
        postgres.create_database(&name(database), None).await.expect("created");
        migrate(&postgres.url(database)).await;
        Lab { valkey: valkey(&[]).await, database: postgres.url(database) }
    }

    /// A client that knows nothing of Tidegate.
    pub async fn client(&self) -> Client {
        Client::connect(self.valkey.port()).await
    }

    /// The port of the database's server.
    pub fn postgres_port(&self) -> u16 {
        self.database.rsplit(':').next().and_then(|rest| rest.split('/').next()?.parse().ok()).expect("a port")
    }

    /// The program with its defaults, on this lab's servers; as the administrator, or as the user and the role that the documents have for the verb
    /// ([`rights`]).
    pub fn program_by_default(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(arguments).env_clear().kill_on_drop(true).stdin(Stdio::null());
        command.env("VALKEY_URL", self.valkey.url()).env("DATABASE_URL", &self.database);
        if rights::are_least() {
            rights::make(self.valkey.port(), &self.database);
            let (user, role) = rights::of_verb(arguments);
            user.map(|user| command.env("VALKEY_URL", rights::as_user(&self.valkey.url(), user)));
            role.map(|role| command.env("DATABASE_URL", rights::as_role(&self.database, role)));
        }
        command.env("TIDEGATE__LOG__FORMAT", "json").env("TIDEGATE__ADMIN__LISTEN", "127.0.0.1:0");
        if let Some(control) = std::env::var_os(BROKEN) {
            command.env(BROKEN, control);
        }
        command
    }

    /// The program, with everything short, on this lab's servers.
    pub fn program(&self, arguments: &[&str]) -> Command {
        let mut command = self.program_by_default(arguments);
        for (key, value) in [
            ("LOG__LEVEL", "debug"),
            ("RUN__WORKERS", "1"),
            ("POSTGRES__STATEMENT_TIMEOUT", "900ms"),
            ("POSTGRES__LOCK_TIMEOUT", "600ms"),
            ("POSTGRES__IDLE_IN_TRANSACTION_TIMEOUT", "600ms"),
            ("RECLAIM__DEAD_AFTER", "1s"),
            ("RECLAIM__GONE_AFTER", "500ms"),
            ("RECLAIM__SWEEP_EVERY", "200ms"),
            ("EXCLUSIVE__LEASE", "500ms"),
            ("TRIM__EVERY", "200ms"),
            ("COMPACT__EVERY", "200ms"),
        ] {
            command.env(format!("TIDEGATE__{key}"), value);
        }
        if let Ok(delivery) = std::env::var("TIDEGATE_TEST_DELIVERY") {
            command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", delivery);
        }
        command
    }

    /// The program with time-outs that even a busy machine does not reach, for tests in which nothing may be interrupted. A deadlock is told by
    /// PostgreSQL itself, a second after it began.
    pub fn unhurried(&self, mut command: Command) -> Command {
        for key in ["STATEMENT", "LOCK", "IDLE_IN_TRANSACTION"] {
            command.env(format!("TIDEGATE__POSTGRES__{key}_TIMEOUT"), "4s");
        }
        for server in ["POSTGRES", "VALKEY"] {
            command.env(format!("TIDEGATE__{server}__CONNECT_TIMEOUT"), "20s");
        }
        command.env("TIDEGATE__RECLAIM__DEAD_AFTER", "5s");
        command
    }

    /// The program, reading alone.
    pub fn exclusive(&self, arguments: &[&str]) -> Command {
        let mut command = self.program(arguments);
        command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
        command
    }

    /// One field of the group, as XINFO GROUPS tells it.
    pub async fn group(&self, field: &str) -> Resp {
        let groups = self.client().await.call(&["XINFO", "GROUPS", STREAM]).await.array();
        let ours = |fields: &Vec<Resp>| fields.get(1) == Some(&Resp::Text(GROUP.into()));
        let fields = groups.into_iter().map(Resp::array).find(ours).expect("the group");
        let at = fields.iter().position(|name| *name == Resp::Text(field.into())).expect("the field");
        fields[at + 1].clone()
    }

    /// The daemon.
    pub fn daemon(&self) -> Daemon {
        Daemon::start(self.program(&["run"]))
    }

    /// The daemon through proxies, where ports are given.
    pub fn daemon_through(&self, valkey: Option<u16>, postgres: Option<u16>) -> Daemon {
        self.start_through(self.program(&["run"]), valkey, postgres)
    }

    /// This program through proxies, where ports are given.
    pub fn start_through(&self, mut command: Command, valkey: Option<u16>, postgres: Option<u16>) -> Daemon {
        for (name, of_server, port) in
            [("VALKEY_URL", self.valkey.port(), valkey), ("DATABASE_URL", self.postgres_port(), postgres)]
        {
            let Some(port) = port else { continue };
            let url = command.as_std().get_envs().find_map(|(of, url)| url.filter(|_| of == name)?.to_str());
            let url = url.expect("it leads to a server").replace(&of_server.to_string(), &port.to_string());
            command.env(name, url);
        }
        Daemon::start(command)
    }

    /// A fresh daemon settles everything that is left, flushed or buried, and ends well.
    pub async fn settle_everything(&self) -> Daemon {
        let mut daemon = Daemon::start(self.program(&["run", "--until-empty"]));
        let status = daemon.exit().await;
        assert!(matches!(status.code(), Some(0 | 65)), "{status}: {}", daemon.last_lines());
        daemon
    }

    pub async fn sql(&self) -> PgConnection {
        PgConnection::connect(&self.database).await.expect("connected")
    }

    /// One number.
    pub async fn number(&self, query: &str) -> i64 {
        let row = sqlx::query(AssertSqlSafe(query.to_owned())).fetch_one(&mut self.sql().await).await.expect(query);
        row.try_get::<Option<i64>, _>(0).expect("a bigint").unwrap_or(0)
    }

    pub async fn execute(&self, statement: &str) {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut self.sql().await).await.expect(statement);
    }

    /// The value of one counter in PostgreSQL; none if there is no row.
    pub async fn value(&self, id: &str) -> Option<i64> {
        let query = sqlx::query_scalar("select value from public.counters where id = $1").bind(id);
        query.fetch_optional(&mut self.sql().await).await.expect("readable")
    }

    /// Waits until a counter has a value.
    pub async fn await_value(&self, id: &str, value: i64) {
        eventually(id, Some(value), async || self.value(id).await).await;
    }

    /// How many entries are pending in the group.
    pub async fn pending(&self) -> i64 {
        match self.client().await.call(&["XPENDING", STREAM, GROUP]).await {
            Resp::Array(parts) => parts.first().and_then(Resp::int).unwrap_or(0),
            other => panic!("{other:?}"),
        }
    }

    /// What must always hold: nothing pending, ranges disjoint, and as many digests as entries.
    pub async fn assert_settled(&self) {
        eventually("pending", 0, async || self.pending().await).await;
        let overlaps = "select count(*) from tidegate.ledger a join tidegate.ledger b
            on a.lane = b.lane and a.ids && b.ids and a.ctid < b.ctid";
        assert_eq!(self.number(overlaps).await, 0, "ledger ranges overlap");
        let uneven = "select count(*) from tidegate.ledger where length(digests) <> 8 * entries";
        assert_eq!(self.number(uneven).await, 0, "digests and entries differ");
    }

    /// How many sessions daemons have in the database.
    pub async fn sessions(&self) -> i64 {
        let theirs = "datname = current_database() and application_name = 'tidegate'";
        self.number(&format!("select count(*) from pg_stat_activity where {theirs}")).await
    }

    /// The group has read everything; where one reads alone, it has also settled it.
    pub async fn await_no_lag(&self) {
        eventually("the group's lag", Resp::Int(0), async || self.group("lag").await).await;
    }

    /// How many entries the ledger holds.
    pub async fn in_ledger(&self) -> i64 {
        self.number("select coalesce(sum(entries), 0)::bigint from tidegate.ledger").await
    }
}

/// The program as a process; its log lines as events.
pub struct Daemon {
    child: Child,
    lines: mpsc::UnboundedReceiver<Value>,
    seen: Vec<Value>,
}

impl Daemon {
    pub fn start(mut command: Command) -> Daemon {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let (sender, lines) = mpsc::unbounded_channel();
        let stderr = child.stderr.take().expect("piped");
        tokio::spawn(async move {
            let mut reader = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = reader.next_line().await {
                let event = serde_json::from_str(&line).unwrap_or_else(|_| Value::from(line));
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Daemon { child, lines, seen: Vec::new() }
    }

    /// Waits for a line whose message begins so.
    pub async fn wait_for(&mut self, message: &str) -> Value {
        let is = |event: &Value| event["message"].as_str().is_some_and(|m| m.starts_with(message));
        if let Some(event) = self.seen.iter().find(|event| is(event)) {
            return event.clone();
        }
        let deadline = tokio::time::Instant::now() + *LIMIT;
        loop {
            let next = tokio::time::timeout_at(deadline, self.lines.recv()).await;
            let Ok(Some(event)) = next else { panic!("no line {message:?}; the last were {}", self.last_lines()) };
            self.seen.push(event.clone());
            if is(&event) {
                return event;
            }
        }
    }

    /// Waits for an event of this name that fits.
    pub async fn wait_for_event(&mut self, name: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let is = |event: &Value| event["event"] == name && fits(event);
        if let Some(event) = self.seen.iter().find(|event| is(event)) {
            return event.clone();
        }
        let deadline = tokio::time::Instant::now() + *LIMIT;
        loop {
            let next = tokio::time::timeout_at(deadline, self.lines.recv()).await;
            let Ok(Some(event)) = next else { panic!("no event {name}; the last lines were {}", self.last_lines()) };
            self.seen.push(event.clone());
            if is(&event) {
                return event;
            }
        }
    }

    /// Forgets the lines so far.
    pub fn forget(&mut self) {
        while self.lines.try_recv().is_ok() {}
        self.seen.clear();
    }

    /// How many lines begin so, up to now.
    pub fn count(&mut self, message: &str) -> usize {
        while let Ok(event) = self.lines.try_recv() {
            self.seen.push(event);
        }
        self.seen.iter().filter(|event| event["message"].as_str().is_some_and(|m| m.starts_with(message))).count()
    }

    /// The sum of a field over all lines that begin so.
    pub fn sum(&mut self, message: &str, field: &str) -> u64 {
        self.count(message);
        let lines = self.seen.iter().filter(|event| event["message"].as_str().is_some_and(|m| m.starts_with(message)));
        lines.filter_map(|event| event[field].as_u64()).sum()
    }

    /// Every line so far, as text.
    pub fn all_lines(&mut self) -> Vec<String> {
        self.count("");
        self.seen.iter().map(|line| line.to_string()).collect()
    }

    pub fn last_lines(&mut self) -> String {
        self.count("");
        let last = self.seen.len().saturating_sub(15);
        self.seen[last..].iter().map(|line| format!("\n  {line}")).collect()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid() as i32).expect("a process");
        kill_process(pid, signal).expect("signalled");
    }

    /// The most memory that it has ever held, in MiB, as the operating system tells.
    pub fn peak_mebibytes(&self) -> u64 {
        self.kibibytes("VmHWM:").div_ceil(1 << 10)
    }

    /// The same without the program's own code, which grows with the program and is large where it is not optimised.
    pub fn peak_mebibytes_of_data(&self) -> u64 {
        (self.kibibytes("VmHWM:") - self.kibibytes("RssFile:")).div_ceil(1 << 10)
    }

    fn kibibytes(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("told by the system");
        let told = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
        told.and_then(|kibibytes| kibibytes.trim().parse().ok()).expect("a number of kB")
    }

    /// Kills it where it stands.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("killed");
    }

    /// Its end, with every line that it has said.
    pub async fn exit(&mut self) -> ExitStatus {
        let status = within_limit("the end of the program", self.child.wait()).await.expect("waited for");
        within_limit("its last line", async {
            while let Some(event) = self.lines.recv().await {
                self.seen.push(event);
            }
        })
        .await;
        status
    }
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Resp {
    Text(Vec<u8>),
    Int(i64),
    Error(String),
    Array(Vec<Resp>),
    Nil,
}

impl Resp {
    pub fn int(&self) -> Option<i64> {
        match self {
            Resp::Int(n) => Some(*n),
            _ => None,
        }
    }

    pub fn text(&self) -> String {
        match self {
            Resp::Text(text) => String::from_utf8_lossy(text).into_owned(),
            other => panic!("no text: {other:?}"),
        }
    }

    pub fn array(self) -> Vec<Resp> {
        match self {
            Resp::Array(parts) => parts,
            other => panic!("no array: {other:?}"),
        }
    }
}

/// A plain client: the foreign producer.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub async fn connect(port: u16) -> Client {
        Client::try_connect(port).await.expect("connected")
    }

    pub async fn try_connect(port: u16) -> std::io::Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    pub async fn call<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> Resp {
        self.pipeline(&[arguments]).await.remove(0)
    }

    /// Many commands in one go.
    pub async fn pipeline<A: AsRef<[u8]>, C: AsRef<[A]>>(&mut self, commands: &[C]) -> Vec<Resp> {
        self.try_pipeline(commands).await.expect("answers")
    }

    /// Many commands in one go, where the server may be gone.
    pub async fn try_pipeline<A: AsRef<[u8]>, C: AsRef<[A]>>(&mut self, commands: &[C]) -> std::io::Result<Vec<Resp>> {
        let mut bytes = Vec::new();
        for command in commands {
            bytes.extend_from_slice(format!("*{}\r\n", command.as_ref().len()).as_bytes());
            for argument in command.as_ref() {
                let argument = argument.as_ref();
                bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
                bytes.extend_from_slice(argument);
                bytes.extend_from_slice(b"\r\n");
            }
        }
        self.stream.get_mut().write_all(&bytes).await?;
        let mut replies = Vec::new();
        for _ in commands {
            replies.push(Box::pin(self.reply()).await?);
        }
        Ok(replies)
    }

    async fn reply(&mut self) -> std::io::Result<Resp> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 || !line.ends_with('\n') {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let (kind, rest) = line.trim_end().split_at(1);
        Ok(match kind {
            "+" => Resp::Text(rest.into()),
            "-" => Resp::Error(rest.into()),
            ":" => Resp::Int(rest.parse().expect("a number")),
            "$" if rest == "-1" => Resp::Nil,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().expect("a length") + 2];
                self.stream.read_exact(&mut bytes).await?;
                bytes.truncate(bytes.len() - 2);
                Resp::Text(bytes)
            }
            "*" if rest == "-1" => Resp::Nil,
            "*" => {
                let mut parts = Vec::new();
                for _ in 0..rest.parse::<usize>().expect("a length") {
                    parts.push(Box::pin(self.reply()).await?);
                }
                Resp::Array(parts)
            }
            _ => panic!("{line:?}"),
        })
    }

    /// `INCRBY` and `XADD`, as an application does it.
    pub async fn add(&mut self, id: &str, amount: i64) -> String {
        let amount = amount.to_string();
        let counter = format!("counter:{id}");
        let commands: [Vec<&str>; 2] =
            [vec!["INCRBY", &counter, &amount], vec!["XADD", STREAM, "*", "id", id, "amount", &amount]];
        self.pipeline(&commands).await[1].text()
    }

    /// Many increments by one of the same counter.
    pub async fn add_many(&mut self, id: &str, times: usize) {
        let counter = format!("counter:{id}");
        let pair = [vec!["INCRBY", &counter, "1"], vec!["XADD", STREAM, "*", "id", id, "amount", "1"]];
        for chunk in vec![pair; times].chunks(1000) {
            self.pipeline(&chunk.concat()).await;
        }
    }
}
