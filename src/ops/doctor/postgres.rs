//! PostgreSQL: what the doctor asks of it, of the ledger and of the pipelines' tables.
//!
//! Takes the database and what was seen; puts findings. Fails in no way: what cannot be asked is a finding.

use sqlx::{AssertSqlSafe, Row};

use super::valkey::connections;
use super::{Findings, Severity};
use crate::config::Config;
use crate::model::pipeline::{Identifier, Pipeline, Table};
use crate::ops::columns::{lasting, plural};
use crate::ops::observe::{Look, Servers};
use crate::postgres::Session;
use crate::retry::Fault;
use crate::target::{self, Weight};

/// The oldest version that is tested.
const TESTED_FROM: i32 = 150_000;
/// How near a value may be to the end of its type.
const HEADROOM: f64 = 0.9;

pub(super) async fn examine(
    config: &Config,
    pipelines: &[&Pipeline],
    servers: &Servers,
    look: &Look,
    findings: &mut Findings,
) {
    let books = match &look.books {
        Ok(books) => books,
        Err(fault) => return findings.unknown("D26", fault),
    };
    if let Err(fault) = server(servers, findings).await {
        findings.unknown("D22", &fault);
    }
    if books.missing_migrations > 0 {
        let evidence =
            format!("the database lacks {}", plural(books.missing_migrations as u64, "migration", "migrations"));
        return findings.of_server("D26", Severity::Error, evidence, "tidegate migrate");
    }
    findings.well("D26", "the schema is the one that this version needs");
    let is_workers = ledger(servers, findings).await.unwrap_or_else(|fault| {
        findings.unknown("D14", &fault);
        true
    });
    for pipeline in pipelines {
        if let Err(fault) = table(servers, pipeline, is_workers, findings).await {
            findings.unknown("D19", &fault);
        }
        registered(config, pipeline, servers, findings).await;
        let open: u64 = books
            .lanes
            .iter()
            .filter(|lane| lane.pipeline == pipeline.name)
            .flat_map(|lane| lane.letters.values())
            .sum();
        if open > 0 {
            let name = &pipeline.name;
            let fix = format!(
                "see why with `tidegate dead list --pipeline {name}`, correct that, then `tidegate dead redrive --pipeline {name}`, or discard them"
            );
            findings.of(
                pipeline,
                "D23",
                Severity::Warning,
                format!("{} open", plural(open, "dead letter is", "dead letters are")),
                fix,
            );
        }
        if let Some(pause) = books.pause_of(&pipeline.name) {
            let evidence = format!("paused for {}", lasting(pause.lasted));
            findings.of(pipeline, "D24", Severity::Warning, evidence, format!("tidegate resume {}", pipeline.name));
        }
    }
    findings.rest(&[
        ("D20", "nothing about the tables refuses or changes rows"),
        ("D23", "no dead letter is open"),
        ("D24", "no pipeline is paused"),
        ("D27", "updates of rows are as cheap as they can be"),
    ]);
}

/// Connections of everybody, whatever a role may see of them, and how many there may be beside those that are kept for superusers.
const CONNECTIONS: &str = "(select coalesce(sum(numbackends), 0) from pg_stat_database)::int8,
      current_setting('max_connections')::int8 - current_setting('superuser_reserved_connections')::int8";

/// Standbys: not those who copy the data once or are only connecting, and not subscribers of a publication, who are connected to a database. Where a
/// role may not see what a connection does it is taken for one.
const STANDBYS: &str = "(select count(*) from pg_stat_replication r join pg_stat_activity a on a.pid = r.pid
      where a.datid is null and coalesce(r.state, '') not in ('backup', 'startup'))";

/// What makes a database writable again where a setting forbids writing, which forbids changing the setting, too.
const MAKE_WRITABLE: &str = "(select 'set default_transaction_read_only = off; ' || case source
          when 'database' then format('alter database %I reset default_transaction_read_only', current_database())
          when 'user' then format('alter role %I reset default_transaction_read_only', current_user)
          when 'database user' then
              format('alter role %I in database %I reset default_transaction_read_only', current_user, current_database())
          else 'alter system set default_transaction_read_only = off; select pg_reload_conf()' end
      from pg_settings where name = 'default_transaction_read_only')";

async fn server(servers: &Servers, findings: &mut Findings) -> Result<(), Fault> {
    let query = format!(
        "select current_setting('server_version_num')::int, current_setting('server_version'), pg_is_in_recovery(),
                current_setting('transaction_read_only') = 'on', {STANDBYS}, current_setting('synchronous_standby_names'),
                current_setting('idle_session_timeout', true), {MAKE_WRITABLE}, {CONNECTIONS}"
    );
    let row = servers.database.run(async |c| sqlx::query(AssertSqlSafe(query)).fetch_one(c).await).await?;
    let get = |error: sqlx::Error| Fault::PostgresProtocol(error.to_string());
    let (number, version): (i32, String) = (row.try_get(0).map_err(get)?, row.try_get(1).map_err(get)?);
    let (is_standby, is_read_only): (bool, bool) = (row.try_get(2).map_err(get)?, row.try_get(3).map_err(get)?);
    let (standbys, names): (i64, String) = (row.try_get(4).map_err(get)?, row.try_get(5).map_err(get)?);
    let idle: Option<String> = row.try_get(6).map_err(get)?;
    let make_writable: String = row.try_get(7).map_err(get)?;
    let (open, most): (i64, i64) = (row.try_get(8).map_err(get)?, row.try_get(9).map_err(get)?);
    let fix = "raise max_connections, or lower postgres.connections; pg_stat_activity tells whose they are";
    connections("PostgreSQL", open.unsigned_abs(), most.unsigned_abs(), fix, findings);
    if number < TESTED_FROM {
        findings.of_server(
            "D6",
            Severity::Warning,
            format!("this is PostgreSQL {version}"),
            "use PostgreSQL 15 or newer",
        );
    } else {
        findings.well("D6", format!("PostgreSQL {version}"));
    }
    if is_standby {
        let evidence = "this PostgreSQL takes no writes: it is a standby";
        findings.of_server("D22", Severity::Error, evidence, "name the primary in postgres.url");
    } else if is_read_only {
        let evidence = "this PostgreSQL takes no writes: default_transaction_read_only is on";
        findings.of_server("D22", Severity::Error, evidence, make_writable);
    } else {
        standby(standbys, &names, findings);
    }
    if idle.as_deref().is_some_and(|idle| idle != "0" && !idle.is_empty()) {
        let evidence = format!("idle_session_timeout is {}", idle.unwrap_or_default());
        findings.of_server(
            "D11",
            Severity::Info,
            evidence,
            "nothing: idle sessions are asked for a sign of life before they are used",
        );
    }
    let is_pooled = servers.database.transact(async |session: &mut Session| Ok(session.is_pooled())).await?;
    if is_pooled {
        let fix = "nothing for the daemon; name PostgreSQL itself for `tidegate migrate`";
        findings.of_server("D18", Severity::Info, "a connection pooler stands between", fix);
    } else {
        findings.well("D18", "no pooler stands between");
    }
    Ok(())
}

fn standby(standbys: i64, names: &str, findings: &mut Findings) {
    match (standbys, names) {
        (0, "") => findings.well("D22", "there are no standbys"),
        (0, names) => findings.of_server(
            "D22",
            Severity::Error,
            format!("every commit waits for a standby (synchronous_standby_names is {names}), and none is connected"),
            "bring the standby back; or, to go on without it: alter system set synchronous_standby_names = ''; select pg_reload_conf()",
        ),
        (standbys, "") => findings.of_server(
            "D22",
            Severity::Warning,
            format!(
                "{} connected, and synchronous_standby_names is empty",
                plural(standbys as u64, "standby is", "standbys are")
            ),
            "alter system set synchronous_standby_names = 'ANY 1 (*)'; select pg_reload_conf(); from then on commits wait while no standby is there",
        ),
        _ => findings.well("D22", "a commit waits for a standby, and one is connected"),
    }
}

/// What to do about a right that a role lacks which is no worker's.
const NOT_THE_DAEMONS: &str = "nothing, if it is not the daemon's role; else";

/// Says whether the role is a worker's, as far as its rights tell it: only a worker's registers lanes.
async fn ledger(servers: &Servers, findings: &mut Findings) -> Result<bool, Fault> {
    let row = servers
        .database
        .run(async |c| {
            sqlx::query(
                "select exists (select from pg_constraint k join pg_index i on i.indexrelid = k.conindid
                                where k.conname = 'ledger_no_overlap' and k.conrelid = 'tidegate.ledger'::regclass
                                  and k.contype = 'x' and not k.condeferrable and i.indisvalid),
                        coalesce((select 'autovacuum_enabled=false' = any(reloptions) from pg_class where oid = 'tidegate.ledger'::regclass), false),
                        current_setting('autovacuum'),
                        (select n_dead_tup from pg_stat_user_tables where relid = 'tidegate.ledger'::regclass),
                        (select n_live_tup from pg_stat_user_tables where relid = 'tidegate.ledger'::regclass),
                        array(select p || ' on ' || t from unnest(array['tidegate.lanes', 'tidegate.ledger', 'tidegate.dead_letters']) t,
                              unnest(array['select', 'insert', 'update']) p where not has_table_privilege(t, p))",
            )
            .fetch_one(c)
            .await
        })
        .await?;
    let get = |error: sqlx::Error| Fault::PostgresProtocol(error.to_string());
    let has_constraint: bool = row.try_get(0).map_err(get)?;
    let (is_off, everywhere): (bool, String) = (row.try_get(1).map_err(get)?, row.try_get(2).map_err(get)?);
    let dead: i64 = row.try_get::<Option<i64>, _>(3).map_err(get)?.unwrap_or(0);
    let live: i64 = row.try_get::<Option<i64>, _>(4).map_err(get)?.unwrap_or(0);
    let lacks: Vec<String> = row.try_get(5).map_err(get)?;
    if has_constraint {
        findings.well("D14", "the constraint ledger_no_overlap is there and valid");
    } else {
        let fix = "alter table tidegate.ledger add constraint ledger_no_overlap exclude using gist (lane with =, ids with &&)";
        findings.of_server(
            "D14",
            Severity::Error,
            "the constraint ledger_no_overlap is missing, deferrable or not valid",
            fix,
        );
    }
    let is_workers = !lacks.iter().any(|right| right == "insert on tidegate.lanes");
    if !lacks.is_empty() {
        let fix = "grant it with the statements of docs/permissions.md";
        let (severity, fix) = match is_workers {
            true => (Severity::Error, fix.into()),
            false => (Severity::Info, format!("{NOT_THE_DAEMONS} {fix}")),
        };
        let evidence = format!("this role cannot run a worker: it lacks {}", lacks.join(", "));
        findings.of_server("D14", severity, evidence, fix);
    }
    if is_off || everywhere == "off" {
        let fix = "alter system set autovacuum = on; alter table tidegate.ledger reset (autovacuum_enabled)";
        findings.of_server("D15", Severity::Warning, "autovacuum does not run on tidegate.ledger", fix);
    } else if dead > 100_000 && dead > live {
        let evidence = format!("tidegate.ledger has {dead} dead rows beside {live} live ones");
        findings.of_server(
            "D15",
            Severity::Warning,
            evidence,
            "vacuum tidegate.ledger, and look for a transaction that is open for long",
        );
    } else {
        findings.well("D15", "autovacuum keeps up on tidegate.ledger");
    }
    Ok(is_workers)
}

/// Whether this configuration is the one that the ledger knows.
async fn registered(config: &Config, pipeline: &Pipeline, servers: &Servers, findings: &mut Findings) {
    let (source, name) = (&config.valkey.source, &pipeline.name);
    let query = "select distinct target, mapping from tidegate.lanes where source = $1 and pipeline = $2";
    let rows: Result<Vec<(String, Option<String>)>, Fault> =
        servers.database.run(async |c| sqlx::query_as(query).bind(source).bind(name).fetch_all(c).await).await;
    let rows = match rows {
        Ok(rows) => rows,
        Err(fault) => return findings.unknown("D17", &fault),
    };
    let (table, mapping) = (pipeline.table.to_string(), pipeline.mapping());
    match rows
        .iter()
        .find(|(target, registered)| *target != table || registered.as_ref().is_some_and(|r| *r != mapping))
    {
        Some((target, registered)) => {
            let evidence = format!(
                "registered with table {target} and {}; this configuration has table {table} and {mapping}",
                registered.as_deref().unwrap_or("no mapping")
            );
            let fix =
                "give all daemons the same configuration; after a table was renamed: `tidegate migrate --retarget`";
            findings.of(pipeline, "D17", Severity::Error, evidence, fix);
        }
        None if rows.is_empty() => {
            findings.well("D17", format!("{name} is not registered yet: the first daemon does that"))
        }
        None => findings.well("D17", format!("{name} is registered as it is configured")),
    }
}

async fn table(servers: &Servers, pipeline: &Pipeline, is_workers: bool, findings: &mut Findings) -> Result<(), Fault> {
    let examined = servers.database.run(async |c| target::examine(c, pipeline).await).await?;
    for (target, examined) in pipeline.targets().iter().zip(examined) {
        let table = &examined.table;
        for finding in &examined.findings {
            let is_others = finding.is_of_role && !is_workers;
            let (id, severity) = match finding.weight {
                Weight::Refusal if is_others => ("D19", Severity::Info),
                Weight::Refusal => ("D19", Severity::Error),
                Weight::Warning => ("D20", Severity::Warning),
                Weight::Advice => ("D27", Severity::Info),
            };
            let fix = finding.fix.clone().unwrap_or_else(|| "the finding says what to change".into());
            let fix = if is_others { format!("{NOT_THE_DAEMONS} {fix}") } else { fix };
            findings.of(pipeline, id, severity, format!("{table}: {}", finding.what), fix);
        }
        let Some(fit) = examined.fit else { continue };
        if fit.is_grouped {
            let kinds = fit.keys.join(", ");
            let evidence =
                format!("the keys of {table} are compared as {kinds}: PostgreSQL sorts and joins those of each batch");
            findings.of(pipeline, "D19", Severity::Info, evidence, "nothing; a key of type text is a little faster");
        } else {
            findings.well("D19", format!("{table} fits"));
        }
        for value in &target.values {
            headroom(servers, pipeline, table, &value.column, findings).await?;
        }
    }
    Ok(())
}

/// How near the largest values are to the end of their type.
async fn headroom(
    servers: &Servers,
    pipeline: &Pipeline,
    table: &Table,
    column: &Identifier,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let kind: Option<String> = servers
        .database
        .run(async |c| {
            sqlx::query_scalar(
                "select a.atttypid::regtype::text from pg_attribute a
                 where a.attrelid = format('%I.%I', $1::text, $2::text)::regclass and a.attname = $3 and not a.attisdropped",
            )
            .bind(table.schema.as_str())
            .bind(table.name.as_str())
            .bind(column.as_str())
            .fetch_optional(c)
            .await
        })
        .await?;
    let (end, wider) = match kind.as_deref() {
        Some("smallint") => (f64::from(i16::MAX), "bigint"),
        Some("integer") => (f64::from(i32::MAX), "bigint"),
        Some("bigint") => (i64::MAX as f64, "numeric"),
        _ => return Ok(()),
    };
    // Every name is validated and quoted. A sample: a table of millions of rows is not read for this.
    let sql = format!(
        "select max(abs({0}::float8)) from (select {0} from {1} limit 100000) s",
        column.quoted(),
        table.quoted()
    );
    let largest: Option<f64> =
        servers.database.run(async |c| sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(c).await).await?;
    if largest.is_some_and(|largest| largest > end * HEADROOM) {
        let evidence = format!("values of {} are near the end of {}", column, kind.unwrap_or_default());
        let fix = format!("alter table {} alter column {} type {wider}", table.quoted(), column.quoted());
        findings.of(pipeline, "D15", Severity::Warning, evidence, fix);
    }
    Ok(())
}
