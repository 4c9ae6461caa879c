//! The declaration of the configuration: every section, every key, and how keys relate to each other.
//!
//! To add a key, add its field here, then write the document and the chart's schema with `TIDEGATE_UPDATE_DOCS=1 cargo test
//! --lib config::`.
//! A new section is also a field of [`Config`] and a heading in `docs/configuration.md`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

use super::accept::Until;
use super::key::{Key, Section, sections};
use super::kind::Kind::*;
use super::setting::choice;
use super::settings::Settings;
use crate::flow::reclaim::ALONE_AFTER;
use crate::model::pipeline::{Delivery, Identifier, Mode, Table};
use crate::model::target::{KeyColumn, ValueColumn, Write};

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}
const FIVE_MINUTES: Duration = Duration::from_secs(300);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const YEAR: Duration = Duration::from_secs(365 * 86_400);
const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;

sections! {
    /// Where the streams are.
    ValkeySection at "valkey" {
        /// Where the streams are. `VALKEY_URL` sets the same key; empty means none.
        url: Option<SecretString> = "", ValkeyUrl;
        /// A file that contains `valkey.url`, for mounted secrets; empty means none.
        url_file: Option<PathBuf> = "", Path;
        /// Names this Valkey deployment in the ledger. Two deployments that flush into one database need different names,
        /// or they would share ranges of ids.
        source: String = "main", Name;
        /// The limit for opening a connection.
        connect_timeout: Duration = "5s", Time(ms(1)..=FIVE_MINUTES);
        /// The limit for one command. A command that blocks has this long on top of its blocking time: a silent server must
        /// not hold a worker.
        command_timeout: Duration = "5s", Time(ms(1)..=FIVE_MINUTES);
    }

    /// Where the tables are.
    PostgresSection at "postgres" {
        /// Where the tables are. `DATABASE_URL` sets the same key; empty means none.
        url: Option<SecretString> = "", PostgresUrl;
        /// A file that contains `postgres.url`, for mounted secrets; empty means none.
        url_file: Option<PathBuf> = "", Path;
        /// The most connections that one process opens. Its workers and caretakers share them, however many streams there
        /// are.
        connections: usize = "8", Count("connections", 1..=1000);
        /// The limit for opening a connection.
        connect_timeout: Duration = "5s", Time(ms(1)..=FIVE_MINUTES);
        /// The server's limit for one statement. A flush must end before its worker is taken for dead.
        statement_timeout: Duration = "10s", Time(ms(1)..=HOUR);
        /// The server's limit for one wait for a lock: a worker that waits for a busy row gives up and tries again.
        lock_timeout: Duration = "5s", Time(ms(1)..=HOUR);
        /// The server ends a transaction whose client is silent for this long: a stopped worker must not block its peers.
        idle_in_transaction_timeout: Duration = "10s", Time(ms(1)..=HOUR);
    }

    /// The process.
    RunSection at "run" {
        /// Workers of each pipeline. One prepares a batch while another flushes; more of them help only where they do not
        /// update the same rows.
        workers: usize = "2", Count("workers", 1..=256);
    }

    /// What one transaction flushes.
    BatchSection at "batch" {
        /// The most entries that one transaction flushes. More cost memory, and work that a failure repeats; fewer cost
        /// throughput.
        max_entries: usize = "40000", Count("entries", 1..=1_000_000);
        /// The most bytes that one batch holds in memory, whatever the size of its entries.
        max_bytes: usize = "8MiB", Bytes(1..=GIB);
        /// Entries requested in one read. Larger replies cost more for each entry, not less.
        read_count: usize = "1000", Count("entries", 1..=1_000_000);
        /// A larger entry becomes a dead letter, so that no single entry can fill a batch.
        max_entry_bytes: usize = "1MiB", Bytes(1..=GIB);
    }

    /// When pending entries of other consumers are taken.
    ReclaimSection at "reclaim" {
        /// A consumer that is silent for this long is taken for dead, and its pending entries are reclaimed.
        dead_after: Duration = "30s", Time(ms(300)..=DAY);
        /// A consumer whose connection to the server no longer exists is reclaimed after this long.
        gone_after: Duration = "2s", Time(ms(100)..=DAY);
        /// How often workers look for entries to reclaim.
        sweep_every: Duration = "500ms", Time(ms(10)..=DAY);
        /// An entry that was tried alone and whose process died before the flush was sent, so often that its deliveries
        /// reached this, is buried. The minimum is above the delivery from which an entry is tried alone.
        max_deliveries: u64 = "8", Count("deliveries", ALONE_AFTER + 1..=1000);
    }

    /// Who reads a stream whose pipeline has `delivery = "exclusive"`.
    ExclusiveSection at "exclusive" {
        /// How long a process may read a stream alone without saying that it lives. When it dies, another one takes over after
        /// this long at the most; when it stops, at once.
        lease: Duration = "2s", Time(ms(200)..=FIVE_MINUTES);
    }

    /// When settled entries leave the stream.
    TrimSection at "trim" {
        /// How long settled entries stay in the stream, so that they can be replayed; `0s` means not at all.
        retention: Duration = "1h", Time(Duration::ZERO..=YEAR);
        /// How often settled entries older than that are removed.
        every: Duration = "10s", Time(ms(10)..=DAY);
    }

    /// When rows of the ledger are merged.
    CompactSection at "compact" {
        /// Ledger rows younger than this are never merged: longer than a stopped worker can stay suspended.
        margin: Duration = "1h", Time(ms(300)..=YEAR);
        /// How often older ledger rows are merged.
        every: Duration = "10s", Time(ms(10)..=DAY);
    }

    /// What is kept of entries that cannot be applied.
    DeadLettersSection at "dead_letters" {
        /// A dead letter larger than this keeps its digest, its length and the beginning of each field.
        max_bytes: usize = "1MiB", Bytes(KIB..=GIB);
    }

    /// How the process stops.
    StopSection at "stop" {
        /// How long a stop may take to settle what the process holds. Keep it below the supervisor's kill delay
        /// (Kubernetes: 30s).
        grace: Duration = "25s", Time(ms(1)..=DAY);
    }

    /// What is logged, and how.
    LogSection at "log" {
        /// `text` for people, `json` for log collectors.
        format: LogFormat = "text", Choice(LogFormat::WORDS);
        /// A level, or levels by module, such as `info,tidegate::flow=debug`.
        level: String = "info", Filter;
    }

    /// The port for metrics and health, in plain HTTP.
    AdminSection at "admin" {
        /// Where `/metrics`, `/live`, `/ready` and `/startup` are served; empty means nowhere. On another address than the loopback's anybody
        /// who reaches the port can read them. While another process has the port, the daemon works without and tries again.
        listen: Option<SocketAddr> = "127.0.0.1:9464", Listen;
        /// Names, separated by commas, that a request's `Host` may have beside `localhost` and any IP address. Others are refused, so that no web
        /// page can make a browser ask this port under a name of its own.
        hosts: Option<String> = "", Hosts;
        /// An actor that is at one step for so much longer than its time-outs allow is stuck: `/live` fails then. An outage of a server is none.
        stuck_after: Duration = "5m", Time(Duration::from_secs(1)..=DAY);
        /// The console, a page at `/console` (docs/console.md). `off`: there is none. `open`: whoever reaches the port may read it, the contents of
        /// dead letters included; changes need the token. `locked`: reading needs the token, too.
        console: ConsoleAccess = "off", Choice(ConsoleAccess::WORDS);
        /// Whoever sends this token may make changes in the console: pause and resume, redrive and discard, start an audit. Empty means that nobody
        /// may.
        token: Option<SecretString> = "", Token;
        /// A file that contains `admin.token`, for mounted secrets; empty means none. It is read again at a reload.
        token_file: Option<PathBuf> = "", Path;
    }

    /// What is told to an OpenTelemetry collector. A key that is left at its default leaves the matter to the standard variable `OTEL_*`, if it
    /// is set; a key that is set wins over it.
    TelemetrySection at "telemetry" {
        /// Where a collector takes OTLP, such as `http://collector:4318`; empty means what `OTEL_EXPORTER_OTLP_ENDPOINT` says, and if that is not set
        /// either nothing is exported. Over HTTP, `/v1/metrics`, `/v1/traces` and `/v1/logs` are appended.
        endpoint: Option<String> = "", HttpUrl;
        /// How OTLP is spoken; `auto` means what `OTEL_EXPORTER_OTLP_PROTOCOL` says, otherwise `http/protobuf`.
        protocol: OtlpProtocol = "auto", Choice(OtlpProtocol::WORDS);
        /// A file with headers for the collector, `name=value` a line, for credentials; empty means what `OTEL_EXPORTER_OTLP_HEADERS` says.
        headers_file: Option<PathBuf> = "", Path;
        /// A file with certificates (PEM) of authorities to trust for the collector beside the system's; empty means what
        /// `OTEL_EXPORTER_OTLP_CERTIFICATE` says.
        certificate_file: Option<PathBuf> = "", Path;
        /// Whether metrics are exported. `OTEL_METRICS_EXPORTER=none` switches them off, too.
        metrics: bool = "true", Switch;
        /// Whether traces are exported. `OTEL_TRACES_EXPORTER=none` switches them off, too.
        traces: bool = "true", Switch;
        /// Whether the log is exported, beside stderr. `OTEL_LOGS_EXPORTER=none` switches it off, too.
        logs: bool = "true", Switch;
        /// One batch in so many is traced, at random; `0` means what `OTEL_TRACES_SAMPLER` says, otherwise one in 100.
        trace_one_in: u64 = "0", Count("batches", 0..=1_000_000_000);
        /// Whether metrics have the label `stream`, too. A pipeline with thousands of shards then has thousands of series of each metric. The streams of an
        /// `exclusive` pipeline are read and flushed together, so they are counted together, under the name of the first: for them it changes nothing.
        per_stream: bool = "false", Switch;
    }

    /// Counters that Tidegate answers for: pipelines with `mode = "managed"`.
    ManagedSection at "managed" {
        /// How long a counter whose deltas are all in PostgreSQL stays in Valkey when nobody adds to it. Until then it may be evicted at any
        /// time, and is brought back when it is needed.
        ttl: Duration = "6h", Time(ms(1000)..=YEAR);
        /// How often settled counters are looked for at the most. Until one is found it cannot be evicted.
        sweep_every: Duration = "50ms", Time(ms(1)..=FIVE_MINUTES);
        /// How many counters one call of Valkey settles, at 3 µs each: it serves nobody else meanwhile.
        sweep_batch: usize = "500", Count("counters", 1..=10_000);
    }

    /// Rows that applications cache in Valkey.
    CacheSection at "cache" {
        /// How often rows that the trigger `tidegate.touched` has noted are looked for and invalidated; `0s`: never.
        touched_every: Duration = "0s", Time(Duration::ZERO..=FIVE_MINUTES);
    }

    /// A finding of `tidegate doctor` with which the daemon starts although it would refuse to, for a while.
    #[derive(PartialEq)]
    Acceptance at "doctor.accept.<n>" {
        /// The finding, by its number. Only what loses data can be accepted, and keeps the daemon from starting otherwise.
        finding: String = required, Finding;
        /// Until when. At the start it must not be over, nor more than 90 days ahead. When it runs out the daemon goes on, and says so; it does
        /// not start again.
        until: Until = required, Until;
        /// Why, for those who meet it in the log, in `tidegate status` and in `tidegate doctor`.
        reason: String = required, Sentence;
    }

    /// Which stream feeds which table.
    PipelineSection at "pipelines.<name>" {
        /// The stream to read.
        stream: String = "flush:counters" for counters, Text;
        /// How many streams there are. With more than one they are `<stream>:{0}`, `<stream>:{1}` and so on, and a producer chooses by the
        /// key (docs/sharding.md).
        shards: u16 = "1", Count("streams", 1..=10_000);
        /// The table to write, as `schema.table`; a table alone is in `public`.
        table: Table = "public.counters" for counters, TableName;
        /// The column that identifies a row; it needs a unique index of its own.
        key_column: Identifier = "id", Column;
        /// The column that a delta is merged into.
        value_column: Identifier = "value", Column;
        /// The column that takes the time of the last flush; empty means none.
        updated_at_column: Option<Identifier> = "updated_at", OptionalColumn;
        /// The entry's field that has the row's key.
        key_field: String = "id", Text;
        /// The entry's field that has the delta.
        value_field: String = "amount", Text;
        /// Key columns, where a row has other keys than one text: `column: type` or `column = field: type`, or the beginning of a stretch of
        /// time, `column = day(field, zone)` (docs/tables.md). Empty: key_column from key_field.
        keys: Vec<KeyColumn> = "", Keys;
        /// Value columns, where a row has others than one sum: `column = operator(field)`, separated by commas (docs/tables.md). Empty:
        /// value_column is the sum of value_field.
        values: Vec<ValueColumn> = "", Values;
        /// `merge`: rows are inserted or merged. `insert`: those that are there stay as they are. `delete_zero`: rows are deleted when all
        /// their values, which must be sums and counts, are zero.
        write: Write = "merge", Choice(Write::WORDS);
        /// The pipeline whose entries feed this table, too: both tables are written in one transaction, with one place in the ledger and
        /// one consumer group (docs/tables.md). Empty: this pipeline reads its own stream.
        with: Option<String> = "", OptionalName;
        /// `group`: any number of workers share the stream, and Valkey keeps a mark for each entry until it is settled.
        /// `exclusive`: one process at a time reads it, at a fraction of the cost for Valkey.
        delivery: Delivery = "group", Choice(Delivery::WORDS);
        /// `plain`: producers keep the counters in Valkey. `managed`: Tidegate answers for them, so that they may be evicted
        /// (docs/reading.md); it takes effect once `tidegate adopt` has been run, where the stream has entries already.
        mode: Mode = "plain", Choice(Mode::WORDS);
        /// What the names of the counters in Valkey begin with: `<counter_prefix>:<key>`.
        counter_prefix: String = "counter", Text;
    }
}

/// Who may read the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleAccess {
    /// Nobody: it is not served.
    Off,
    /// Whoever reaches the port.
    Open,
    /// Whoever has the token.
    Locked,
}

/// Who reads the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// People.
    Text,
    /// Log collectors.
    Json,
}

/// How OTLP is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// As the environment says.
    Auto,
    /// Protocol buffers over HTTP.
    Http,
    /// gRPC.
    Grpc,
}

choice! { OtlpProtocol: "auto" => OtlpProtocol::Auto, "http/protobuf" => OtlpProtocol::Http, "grpc" => OtlpProtocol::Grpc }
choice! { ConsoleAccess: "off" => ConsoleAccess::Off, "open" => ConsoleAccess::Open, "locked" => ConsoleAccess::Locked }
choice! { LogFormat: "text" => LogFormat::Text, "json" => LogFormat::Json }
choice! { Delivery: "group" => Delivery::Group, "exclusive" => Delivery::Exclusive }
choice! { Mode: "plain" => Mode::Plain, "managed" => Mode::Managed }
choice! { Write: "merge" => Write::Merge, "insert" => Write::Insert, "delete_zero" => Write::DeleteZero }

/// Two keys whose values must keep an order.
#[derive(Debug)]
pub(super) struct Relation {
    pub(super) lesser: &'static str,
    pub(super) order: Order,
    pub(super) greater: &'static str,
    /// What goes wrong otherwise.
    pub(super) reason: &'static str,
}

/// How the lesser value relates to the greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Below,
    AtMost,
}

const fn relation(lesser: &'static str, order: Order, greater: &'static str, reason: &'static str) -> Relation {
    Relation { lesser, order, greater, reason }
}

/// Every relation between keys.
#[rustfmt::skip] // a table, one relation a row
pub(super) const RELATIONS: &[Relation] = &[
    relation("postgres.statement_timeout", Order::Below, "reclaim.dead_after",
        "a worker in the middle of a flush would be taken for dead"),
    relation("postgres.lock_timeout", Order::AtMost, "postgres.statement_timeout",
        "it could never take effect"),
    relation("postgres.idle_in_transaction_timeout", Order::Below, "reclaim.dead_after",
        "a dead worker's transaction would still block the workers that reclaim its entries"),
    relation("reclaim.gone_after", Order::AtMost, "reclaim.dead_after",
        "a consumer without a connection would be reclaimed later than a silent one"),
    relation("reclaim.sweep_every", Order::AtMost, "reclaim.dead_after",
        "dead consumers would be found long after their time"),
    relation("batch.read_count", Order::AtMost, "batch.max_entries",
        "one read would overfill a batch"),
    relation("batch.max_entry_bytes", Order::AtMost, "batch.max_bytes",
        "an accepted entry would not fit into any batch"),
    relation("dead_letters.max_bytes", Order::AtMost, "batch.max_bytes",
        "one dead letter would hold more memory than a batch may"),
    relation("postgres.statement_timeout", Order::Below, "stop.grace",
        "a stop could not wait for the last flush"),
    relation("reclaim.dead_after", Order::AtMost, "compact.margin",
        "rows would be merged that a reclaimed entry still needs"),
];
