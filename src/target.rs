//! Target: does a pipeline's table fit what is written into it?
//!
//! Takes a pipeline; gives how its keys must be ordered ([`KeyOrder`]), or everything that does not fit, each with the statement
//! that mends it ([`Unfit`]). Fails with what PostgreSQL says.

use std::fmt;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::model::pipeline::{Identifier, Pipeline};

/// How a table's keys are ordered, and which of them are equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyOrder {
    /// By their bytes: the worker sorts and coalesces them.
    Bytes,
    /// As this SQL type and collation do: PostgreSQL sorts and coalesces them. The text is safe to stand in SQL.
    Typed(String),
}

/// Everything that does not fit, one sentence each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    table: String,
    findings: Vec<String>,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {} does not fit: {}", self.table, self.findings.join("; "))
    }
}

impl std::error::Error for Unfit {}

/// Types whose text, equality and order make them usable as keys.
const KEY_TYPES: [&str; 18] = [
    "text",
    "varchar",
    "bpchar",
    "citext",
    "uuid",
    "int2",
    "int4",
    "int8",
    "numeric",
    "date",
    "timestamp",
    "timestamptz",
    "time",
    "inet",
    "cidr",
    "macaddr",
    "bool",
    "bytea",
];
/// Types that hold every sum of whole numbers exactly, or refuse it.
const VALUE_TYPES: [&str; 4] = ["int2", "int4", "int8", "numeric"];

/// What is known of the table.
struct Table {
    kind: String,
    rules: Vec<String>,
    is_row_security_active: bool,
    is_unlogged: bool,
    lacks: Vec<String>,
}

/// What is known of a column.
struct Column {
    name: String,
    /// The base type's name, domains resolved.
    base: String,
    is_enum: bool,
    /// The base type as SQL writes it, with its modifier.
    sql_type: String,
    /// The scale of a numeric, if it has one.
    scale: Option<i32>,
    /// The collation, if it is not deterministic.
    collation: Option<String>,
    is_generated: bool,
    is_required: bool,
}

/// Makes sure that a pipeline's table is what its configuration says.
pub async fn check_table(
    connection: &mut PgConnection,
    pipeline: &Pipeline,
) -> Result<Result<KeyOrder, Unfit>, sqlx::Error> {
    let table = pipeline.table.to_string();
    let unfit = |findings: Vec<String>| Ok(Err(Unfit { table: table.clone(), findings }));
    let Some(found) = find_table(connection, pipeline).await? else {
        return unfit(vec!["it does not exist: create it, or run `tidegate migrate` for the default one".into()]);
    };
    match found.kind.as_str() {
        "r" | "p" => {}
        "v" => return unfit(vec!["it is a view: name the table behind it".into()]),
        "m" => return unfit(vec!["it is a materialized view: name a table".into()]),
        "f" => {
            return unfit(vec!["it is a foreign table: its rows and the ledger could not be committed as one".into()]);
        }
        _ => return unfit(vec!["it is no table".into()]),
    }
    let columns = find_columns(connection, pipeline).await?;
    let mut findings = Vec::new();
    if !found.lacks.is_empty() {
        let rights = found.lacks.join(", ");
        findings.push(format!("this role lacks the right to {rights}: grant {rights} on {table} to the role"));
    }
    findings.extend(found.rules.iter().map(|rule| {
        format!("rule {rule} may drop or redirect rows: drop rule {rule} on {table}, and use a trigger if you need one")
    }));
    if found.is_unlogged {
        findings
            .push(format!("it, or a partition, is not logged and empty after a crash: alter table {table} set logged"));
    }
    if found.is_row_security_active {
        findings.push(
            "row security applies to this role and may hide rows: alter role … bypassrls, or use another role".into(),
        );
    }
    let column = |name: &Identifier| columns.iter().find(|column| column.name == name.as_str());
    let wanted = [Some(&pipeline.key), Some(&pipeline.value), pipeline.updated_at.as_ref()];
    for name in wanted.into_iter().flatten() {
        match column(name) {
            None => findings.push(format!("it has no column {name}: add it, or name another one in the pipeline")),
            Some(column) if column.is_generated => {
                findings.push(format!("column {name} is generated: name a column that can be written"));
            }
            Some(_) => {}
        }
    }
    if let Some(key) = column(&pipeline.key) {
        if !KEY_TYPES.contains(&key.base.as_str()) && !key.is_enum {
            findings.push(format!(
                "the key's column {} has type {}, which cannot be a key: use text",
                key.name, key.sql_type
            ));
        }
        if !has_unique_index(connection, pipeline).await? {
            let name = &key.name;
            findings.push(format!("it has no unique index on {name} alone: create unique index on {table} ({name})"));
        }
    }
    if let Some(value) = column(&pipeline.value) {
        let (name, sql_type) = (&value.name, &value.sql_type);
        if !VALUE_TYPES.contains(&value.base.as_str()) {
            findings.push(format!(
                "column {name} has type {sql_type}, which does not hold every sum exactly: alter table {table} alter column \
                 {name} type bigint"
            ));
        } else if value.scale.is_some_and(|scale| scale < 0) {
            findings.push(format!(
                "column {name} has type {sql_type}, which rounds whole numbers: alter table {table} alter column {name} type numeric"
            ));
        }
    }
    if let Some(updated_at) = pipeline.updated_at.as_ref().and_then(column)
        && !["timestamptz", "timestamp"].contains(&updated_at.base.as_str())
    {
        findings.push(format!(
            "column {} has type {}, which is no time: alter table {table} alter column {} type timestamptz using now()",
            updated_at.name, updated_at.sql_type, updated_at.name
        ));
    }
    for other in columns.iter().filter(|column| column.is_required) {
        if !wanted.into_iter().flatten().any(|name| name.as_str() == other.name) {
            findings.push(format!(
                "column {0} must not be null and has no default, so no row could be inserted: alter table {table} alter column {0} \
                 set default …",
                other.name
            ));
        }
    }
    if findings.is_empty() { Ok(Ok(column(&pipeline.key).map_or(KeyOrder::Bytes, key_order))) } else { unfit(findings) }
}

/// Texts are equal when their bytes are, unless the collation says otherwise; everything else is PostgreSQL's to say.
fn key_order(key: &Column) -> KeyOrder {
    match (key.base.as_str(), &key.collation) {
        ("text" | "varchar", None) => KeyOrder::Bytes,
        ("text" | "varchar", Some(collation)) => KeyOrder::Typed(format!("text collate {collation}")),
        // Without its length, so that a text that is too long is refused and not cut off.
        ("bpchar", None) => KeyOrder::Typed("bpchar".into()),
        ("bpchar", Some(collation)) => KeyOrder::Typed(format!("bpchar collate {collation}")),
        _ => KeyOrder::Typed(key.sql_type.clone()),
    }
}

async fn find_table(connection: &mut PgConnection, pipeline: &Pipeline) -> Result<Option<Table>, sqlx::Error> {
    let row = sqlx::query(
        "select c.relkind::text as kind, row_security_active(c.oid) as row_security,
                exists (select from pg_partition_tree(c.oid) p join pg_class leaf on leaf.oid = p.relid
                        where leaf.relpersistence <> 'p') or c.relpersistence <> 'p' as unlogged,
                array(select r.rulename::text from pg_rewrite r where r.ev_class = c.oid and r.rulename <> '_RETURN') as rules,
                array(select p from unnest(array['select', 'insert', 'update']) p
                      where not has_table_privilege(c.oid, p)) as lacks
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = $1 and c.relname = $2",
    )
    .bind(pipeline.table.schema.as_str())
    .bind(pipeline.table.name.as_str())
    .fetch_optional(connection)
    .await?;
    let table = |row: PgRow| {
        Ok(Table {
            kind: row.try_get("kind")?,
            rules: row.try_get("rules")?,
            is_row_security_active: row.try_get("row_security")?,
            is_unlogged: row.try_get("unlogged")?,
            lacks: row.try_get("lacks")?,
        })
    };
    row.map(table).transpose()
}

async fn find_columns(connection: &mut PgConnection, pipeline: &Pipeline) -> Result<Vec<Column>, sqlx::Error> {
    let rows = sqlx::query(
        "with recursive base as (
             select a.attrelid, a.attnum, a.atttypid as type, a.atttypmod as modifier
             from pg_attribute a
             where a.attrelid = format('%I.%I', $1, $2)::regclass and a.attnum > 0 and not a.attisdropped
             union all
             select b.attrelid, b.attnum, t.typbasetype, t.typtypmod
             from base b join pg_type t on t.oid = b.type and t.typtype = 'd')
         select a.attname::text as name, t.typname::text as base, t.typtype::text = 'e' as is_enum,
                format_type(b.type, b.modifier) as sql_type,
                case when t.typname = 'numeric' and b.modifier > 0
                     then (((b.modifier - 4) & 2047) # 1024) - 1024 end as scale,
                (select format('%I.%I', cn.nspname, co.collname) from pg_collation co
                 join pg_namespace cn on cn.oid = co.collnamespace
                 where co.oid = a.attcollation and not co.collisdeterministic) as collation,
                a.attgenerated <> '' or a.attidentity = 'a' as is_generated,
                (a.attnotnull or (select typnotnull from pg_type where oid = a.atttypid))
                    and not a.atthasdef and a.attidentity = '' as is_required
         from base b
         join pg_type t on t.oid = b.type and t.typtype <> 'd'
         join pg_attribute a on a.attrelid = b.attrelid and a.attnum = b.attnum
         order by a.attnum",
    )
    .bind(pipeline.table.schema.as_str())
    .bind(pipeline.table.name.as_str())
    .fetch_all(connection)
    .await?;
    let column = |row: &PgRow| {
        Ok(Column {
            name: row.try_get("name")?,
            base: row.try_get("base")?,
            is_enum: row.try_get("is_enum")?,
            sql_type: row.try_get("sql_type")?,
            scale: row.try_get("scale")?,
            collation: row.try_get("collation")?,
            is_generated: row.try_get("is_generated")?,
            is_required: row.try_get("is_required")?,
        })
    };
    rows.iter().map(column).collect()
}

async fn has_unique_index(connection: &mut PgConnection, pipeline: &Pipeline) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (
             select from pg_index i
             join pg_class c on c.oid = i.indrelid join pg_namespace n on n.oid = c.relnamespace
             join pg_attribute a on a.attrelid = c.oid and a.attnum = i.indkey[0]
             where n.nspname = $1 and c.relname = $2 and a.attname = $3
               and i.indisunique and i.indisvalid and i.indimmediate and i.indnkeyatts = 1 and i.indpred is null)",
    )
    .bind(pipeline.table.schema.as_str())
    .bind(pipeline.table.name.as_str())
    .bind(pipeline.key.as_str())
    .fetch_one(connection)
    .await
}
