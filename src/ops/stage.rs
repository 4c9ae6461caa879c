//! A stage for verbs that show or measure: a pipeline of their own, on private servers or on given ones, where they take away
//! what they made.
//!
//! Takes the servers; gives a table, a stream, and worker processes that know of nothing else. Fails with what a server says.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;

use secrecy::{ExposeSecret, SecretString};
use sqlx::AssertSqlSafe;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::sandbox::{Postgres, Valkey};
use crate::config::{Config, Needs, Sources, load};
use crate::model::names;
use crate::model::pipeline::{Delivery, Identifier, Pipeline, Table};
use crate::postgres::Database;
use crate::postgres::schema;
use crate::valkey;

/// Whatever went wrong, for people to read.
pub type Trouble = Box<dyn std::error::Error + Send + Sync>;

/// The servers: private ones end with this, borrowed ones stay.
#[derive(Debug)]
pub struct Servers {
    valkey_url: SecretString,
    database_url: SecretString,
    private: Option<(Valkey, Postgres)>,
}

impl Servers {
    /// Somebody's own.
    pub fn borrowed(valkey_url: SecretString, database_url: SecretString) -> Servers {
        Servers { valkey_url, database_url, private: None }
    }

    /// Private ones, migrated: Valkey with these arguments, PostgreSQL with these settings.
    pub async fn private(arguments: &[&str], settings: &[&str]) -> Result<Servers, Trouble> {
        let (valkey, postgres) = (Valkey::start(arguments).await?, Postgres::start(settings).await?);
        postgres.create_database(&Identifier::parse(DATABASE)?, None).await?;
        let (valkey_url, database_url) = (valkey.url().into(), postgres.url(DATABASE).into());
        Ok(Servers { valkey_url, database_url, private: Some((valkey, postgres)) })
    }

    /// Whether they were there before.
    pub fn are_borrowed(&self) -> bool {
        self.private.is_none()
    }

    /// How somebody can look into private ones.
    pub fn how_to_look(&self) -> String {
        let look = |(valkey, postgres): &(Valkey, Postgres)| {
            format!("valkey-cli -p {}        psql {}", valkey.port(), postgres.url(DATABASE))
        };
        self.private.as_ref().map_or_else(String::new, look)
    }
}

/// The database on a private server.
const DATABASE: &str = "demo";

/// A pipeline of its own, with its table, and what its workers are started with.
#[derive(Debug)]
pub struct Stage {
    /// The configuration of its workers.
    pub config: Config,
    /// Where Valkey is.
    pub valkey: valkey::Endpoint,
    /// PostgreSQL, over one connection.
    pub database: Database,
    /// The pipeline.
    pub pipeline: Pipeline,
    environment: BTreeMap<String, String>,
}

/// Workers of a stage tell what this process was told to tell, and to whom.
fn about_telemetry() -> impl Iterator<Item = (String, String)> {
    let texts =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    texts
        .filter(|(name, _)| ["OTEL_", "TIDEGATE__TELEMETRY__", "TIDEGATE__ADMIN__"].iter().any(|p| name.starts_with(p)))
}

impl Stage {
    /// Sets one for this purpose, of so many shards. `settings` are variables for its workers.
    pub async fn set(
        purpose: &str,
        servers: &Servers,
        (delivery, shards): (Delivery, &str),
        settings: &[(&str, &str)],
    ) -> Result<Stage, Trouble> {
        let own = format!("tidegate_{purpose}_{:08x}", rand::random::<u32>());
        // With a hash tag, so that in a cluster counters and stream lie in one slot; each of several shards gets one by itself.
        let stream = if shards == "1" { format!("flush:{{{own}}}") } else { format!("flush:{own}") };
        let variable = format!("TIDEGATE__PIPELINES__{}", own.to_uppercase());
        let environment: BTreeMap<String, String> = [
            ("VALKEY_URL", servers.valkey_url.expose_secret()),
            ("DATABASE_URL", servers.database_url.expose_secret()),
            ("TIDEGATE__LOG__FORMAT", "json"),
            ("TIDEGATE__LOG__LEVEL", "info"),
            // Several of them on one machine.
            ("TIDEGATE__ADMIN__LISTEN", "127.0.0.1:0"),
            (&format!("{variable}__STREAM"), &stream),
            (&format!("{variable}__TABLE"), &format!("public.{own}")),
            (&format!("{variable}__DELIVERY"), delivery.word()),
            (&format!("{variable}__SHARDS"), shards),
        ]
        .into_iter()
        .chain(settings.iter().copied())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain(about_telemetry())
        .collect();
        let sources = Sources { env: environment.clone(), ..Sources::default() };
        let config = load(&sources, Needs::BOTH)?.config;
        let valkey = config.valkey.address()?.of_stream(&stream);
        let postgres = config.postgres.address()?;
        schema::apply(&postgres).await?;
        let pipeline = config.pipelines.first().cloned().ok_or("no pipeline")?;
        let stage = Stage { config, valkey, database: Database::new(postgres, 1), pipeline, environment };
        let create = format!("create table {} (like public.counters including all)", stage.table());
        stage.execute(create).await?;
        Ok(stage)
    }

    /// The streams.
    pub fn streams(&self) -> Vec<String> {
        self.pipeline.shards().into_iter().map(|shard| shard.stream).collect()
    }

    /// The table's name for SQL.
    pub fn table(&self) -> String {
        let Table { schema, name } = &self.pipeline.table;
        format!("{}.{}", schema.quoted(), name.quoted())
    }

    /// A worker process. Each event of its log goes to `hear`.
    pub fn worker(&self, hear: impl Fn(&serde_json::Value) + Send + 'static) -> std::io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run").env_clear().envs(&self.environment).kill_on_drop(true);
        // Not in this process's group: Ctrl-C is for the verb, which then ends its workers.
        command.process_group(0).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stderr = child.stderr.take();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr?).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                hear(&serde_json::from_str(&line).unwrap_or_default());
            }
            Some(())
        });
        Ok(child)
    }

    /// Runs statements.
    pub async fn execute(&self, sql: String) -> Result<(), Trouble> {
        self.database.run(async |c| sqlx::raw_sql(AssertSqlSafe(sql)).execute(c).await).await?;
        Ok(())
    }

    /// Takes away what was made on borrowed servers: the stream, these keys, the table, its rows in the ledger.
    pub async fn clear(&self, keys: impl IntoIterator<Item = String>) -> Result<(), Trouble> {
        let connection = valkey::Connection::open(&self.valkey, "tidegate:clear").await?;
        // What a worker that was killed has said of itself.
        let (streams, name) = (self.streams(), &self.pipeline.name);
        let presence: Vec<String> = streams.iter().map(|stream| names::presence(stream, name)).collect();
        connection.call(valkey::Command::new("UNLINK").args(streams).args(presence).args(keys)).await?;
        let of_lane = "lane in (select lane from tidegate.lanes where pipeline =";
        // The name is one of our own making: letters, digits, underscores.
        let name = &self.pipeline.name;
        self.execute(format!(
            "drop table if exists {}; delete from tidegate.ledger where {of_lane} '{name}');
             delete from tidegate.dead_letters where {of_lane} '{name}'); delete from tidegate.lanes where pipeline = '{name}';
             delete from tidegate.pauses where pipeline = '{name}'",
            self.table()
        ))
        .await
    }
}

/// A line on stdout.
pub fn say(line: &str) {
    // A verb that nobody listens to any more still cleans up.
    let _ = writeln!(std::io::stdout(), "{line}");
}
