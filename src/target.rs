//! Target: do a pipeline's tables fit what is written into them?
//!
//! Takes a pipeline; gives how each table's columns are to be written ([`Fit`]), or everything that does not fit, each with the statement
//! that mends it ([`Unfit`]). Fails with what PostgreSQL says.

use std::fmt;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::merge::Merge;
use crate::model::pipeline::{Identifier, Pipeline};
use crate::model::target::{KeyColumn, Kind, Target, ValueColumn};

/// How a table's columns are written. All types are safe to stand in SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// The type, and the collation where it matters, by which each key is compared.
    pub keys: Vec<String>,
    /// The type of each value's column.
    pub values: Vec<String>,
    /// Whether PostgreSQL sorts the keys and makes them distinct, because their texts do not tell which are equal.
    pub is_grouped: bool,
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
const KEY_TYPES: [&str; 21] = [
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
    "timetz",
    "interval",
    "inet",
    "cidr",
    "macaddr",
    "macaddr8",
    "bool",
    "bytea",
];
/// Types that hold every sum of whole numbers exactly, or refuse it.
const WHOLE_TYPES: [&str; 4] = ["int2", "int4", "int8", "numeric"];

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
    /// The same without its modifier.
    plain_type: String,
    /// The scale of a numeric, if it has one.
    scale: Option<i32>,
    /// The collation, if it is not deterministic.
    collation: Option<String>,
    is_generated: bool,
    is_required: bool,
}

/// Makes sure that a pipeline's tables are what its configuration says; gives how each is written, in their order.
pub async fn check_tables(
    connection: &mut PgConnection,
    pipeline: &Pipeline,
) -> Result<Result<Vec<Fit>, Unfit>, sqlx::Error> {
    let mut fits = Vec::new();
    for target in pipeline.targets() {
        match check_table(connection, &target).await? {
            Ok(fit) => fits.push(fit),
            Err(unfit) => return Ok(Err(unfit)),
        }
    }
    Ok(Ok(fits))
}

async fn check_table(connection: &mut PgConnection, target: &Target) -> Result<Result<Fit, Unfit>, sqlx::Error> {
    let table = target.table.to_string();
    let unfit = |findings: Vec<String>| Ok(Err(Unfit { table: table.clone(), findings }));
    let Some(found) = find_table(connection, target).await? else {
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
    let columns = find_columns(connection, target).await?;
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
    let wanted = target.columns();
    for name in &wanted {
        match column(name) {
            None => findings.push(format!("it has no column {name}: add it, or name another one in the pipeline")),
            Some(column) if column.is_generated => {
                findings.push(format!("column {name} is generated: name a column that can be written"));
            }
            Some(_) => {}
        }
    }
    for key in &target.keys {
        findings.extend(column(&key.column).and_then(|column| unfit_key(key, column)));
    }
    let has_keys = target.keys.iter().all(|key| column(&key.column).is_some());
    if has_keys && !has_unique_index(connection, target).await? {
        let names = target.keys.iter().map(|key| key.column.as_str()).collect::<Vec<_>>().join(", ");
        findings.push(format!("it has no unique index on {names} alone: create unique index on {table} ({names})"));
    }
    for value in &target.values {
        findings.extend(column(&value.column).and_then(|column| unfit_value(value, column, &table)));
        if let Some(version) = value.by.as_ref().and_then(column)
            && let Some(wanted) = value.merge.needs_version().filter(|wanted| *wanted != version.sql_type)
        {
            let Column { name, sql_type, .. } = version;
            findings.push(format!(
                "column {name} has type {sql_type}, and a version needs {wanted}: alter table {table} alter column {name} type {wanted} using null"
            ));
        }
    }
    if let Some(updated_at) = target.updated_at.as_ref().and_then(column)
        && !["timestamptz", "timestamp"].contains(&updated_at.base.as_str())
    {
        findings.push(format!(
            "column {} has type {}, which is no time: alter table {table} alter column {} type timestamptz using now()",
            updated_at.name, updated_at.sql_type, updated_at.name
        ));
    }
    for other in columns.iter().filter(|column| column.is_required) {
        if !wanted.iter().any(|name| name.as_str() == other.name) {
            findings.push(format!(
                "column {0} must not be null and has no default, so no row could be inserted: alter table {table} alter column {0} \
                 set default …",
                other.name
            ));
        }
    }
    if !findings.is_empty() {
        return unfit(findings);
    }
    let keys: Vec<(String, bool)> =
        target.keys.iter().filter_map(|key| Some(key_type(key.kind(), column(&key.column)?))).collect();
    Ok(Ok(Fit {
        is_grouped: keys.iter().any(|(_, is_grouped)| *is_grouped),
        keys: keys.into_iter().map(|(sql_type, _)| sql_type).collect(),
        // Without a length or a scale, so that a value that does not fit is refused and not cut off.
        values: target.values.iter().filter_map(|value| Some(column(&value.column)?.plain_type.clone())).collect(),
    }))
}

/// What a key of this kind may be stored as, beside what PostgreSQL reads from text by itself.
fn unfit_key(key: &KeyColumn, column: &Column) -> Option<String> {
    let (name, sql_type, kind) = (&column.name, &column.sql_type, key.kind());
    if kind == Kind::Text {
        let is_usable = KEY_TYPES.contains(&column.base.as_str()) || column.is_enum;
        return (!is_usable)
            .then(|| format!("the key's column {name} has type {sql_type}, which cannot be a key: use text"));
    }
    let wanted = types_of(kind);
    (!wanted.contains(&column.base.as_str()))
        .then(|| format!("the key's column {name} has type {sql_type}, and the pipeline sends a {kind}: alter it to {}, or write another type in keys", wanted[0]))
}

/// The types that hold what such a field sends.
fn types_of(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Text => &["text", "varchar", "bpchar", "citext"],
        Kind::Bigint => &["int8", "int4", "int2", "numeric"],
        Kind::Numeric(_) => &["numeric"],
        Kind::Uuid => &["uuid"],
        Kind::Date => &["date"],
        Kind::Timestamptz => &["timestamptz"],
        Kind::Boolean => &["bool"],
        Kind::Bytea => &["bytea"],
        Kind::Inet => &["inet"],
        Kind::Jsonb => &["jsonb"],
    }
}

/// Why a value's column cannot take what its operator makes.
fn unfit_value(value: &ValueColumn, column: &Column, table: &str) -> Option<String> {
    let Column { name, sql_type, base, .. } = column;
    let kind = value.field.as_ref().map_or(Kind::Bigint, |field| field.kind);
    let retype = |wanted: &str| format!("alter table {table} alter column {name} type {wanted}");
    match (value.merge, kind) {
        (Merge::Count, _) | (Merge::Sum | Merge::Min | Merge::Max, Kind::Bigint) => {
            if !WHOLE_TYPES.contains(&base.as_str()) {
                return Some(format!(
                    "column {name} has type {sql_type}, which does not hold every sum exactly: {}",
                    retype("bigint")
                ));
            }
            let rounds = column.scale.is_some_and(|scale| scale < 0);
            rounds.then(|| {
                format!("column {name} has type {sql_type}, which rounds whole numbers: {}", retype("numeric"))
            })
        }
        (Merge::Distinct, _) => (base != "bytea")
            .then(|| format!("column {name} has type {sql_type}, and a sketch is a bytea: {}", retype("bytea"))),
        (_, Kind::Numeric(scale)) => {
            if base != "numeric" {
                return Some(format!(
                    "column {name} has type {sql_type}, and the pipeline sends a numeric: {}",
                    retype("numeric")
                ));
            }
            let held = column.scale?;
            let rounds = scale.is_none_or(|scale| i32::from(scale) > held);
            rounds.then(|| {
                format!("column {name} has type {sql_type}, which rounds: write {kind} of at most {held} digits, as numeric({}), in values, or {}", held.max(0), retype("numeric"))
            })
        }
        // PostgreSQL reads a text as whatever the column is.
        (Merge::Last | Merge::First | Merge::SetIfNull, Kind::Text) => rounded(value, column, retype),
        (_, kind) => {
            let wanted = types_of(kind);
            if wanted.contains(&base.as_str()) {
                return rounded(value, column, retype);
            }
            Some(format!("column {name} has type {sql_type}, and the pipeline sends a {kind}: {}", retype(wanted[0])))
        }
    }
}

/// A column that would silently hold another value than the one that is sent.
fn rounded(value: &ValueColumn, column: &Column, retype: impl Fn(&str) -> String) -> Option<String> {
    let Column { name, sql_type, plain_type, base, scale, .. } = column;
    match (base.as_str(), value.field.as_ref().map(|field| field.kind)) {
        ("char" | "name", _) => {
            Some(format!("column {name} has type {sql_type}, which cuts off what is longer: {}", retype("text")))
        }
        // Digits before the point alone are rounded only where the scale is negative.
        ("numeric", Some(Kind::Bigint)) if scale.is_none_or(|scale| scale >= 0) => None,
        ("numeric", Some(Kind::Text)) if sql_type != plain_type => Some(format!(
            "column {name} has type {sql_type}, which rounds: write a field of type numeric({}) in values, or {}",
            scale.unwrap_or_default().max(0),
            retype(plain_type)
        )),
        ("numeric" | "time" | "timetz" | "timestamp" | "timestamptz" | "interval", _) if sql_type != plain_type => {
            Some(format!("column {name} has type {sql_type}, which rounds: {}", retype(plain_type)))
        }
        _ => None,
    }
}

/// How keys of a column are compared, and whether PostgreSQL must say which of them are equal. Texts are equal when their bytes are, unless the collation
/// says otherwise; what was read as its own kind has one spelling, unless the column rounds it.
fn key_type(kind: Kind, key: &Column) -> (String, bool) {
    match (key.base.as_str(), &key.collation) {
        ("text" | "varchar", None) => ("text".into(), false),
        ("text" | "varchar", Some(collation)) => (format!("text collate {collation}"), true),
        // Without its length, so that a text that is too long is refused and not cut off.
        ("bpchar", None) => ("bpchar".into(), true),
        ("bpchar", Some(collation)) => (format!("bpchar collate {collation}"), true),
        _ => (key.sql_type.clone(), kind == Kind::Text || key.sql_type != key.plain_type),
    }
}

async fn find_table(connection: &mut PgConnection, target: &Target) -> Result<Option<Table>, sqlx::Error> {
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
    .bind(target.table.schema.as_str())
    .bind(target.table.name.as_str())
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

async fn find_columns(connection: &mut PgConnection, target: &Target) -> Result<Vec<Column>, sqlx::Error> {
    let rows = sqlx::query(
        "with recursive base as (
             select a.attrelid, a.attnum, a.atttypid as type, a.atttypmod as modifier
             from pg_attribute a
             where a.attrelid = format('%I.%I', $1, $2)::regclass and a.attnum > 0 and not a.attisdropped
             union all
             select b.attrelid, b.attnum, t.typbasetype, t.typtypmod
             from base b join pg_type t on t.oid = b.type and t.typtype = 'd')
         select a.attname::text as name, t.typname::text as base, t.typtype::text = 'e' as is_enum,
                format_type(b.type, b.modifier) as sql_type, format_type(b.type, -1) as plain_type,
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
    .bind(target.table.schema.as_str())
    .bind(target.table.name.as_str())
    .fetch_all(connection)
    .await?;
    let column = |row: &PgRow| {
        Ok(Column {
            name: row.try_get("name")?,
            base: row.try_get("base")?,
            is_enum: row.try_get("is_enum")?,
            sql_type: row.try_get("sql_type")?,
            plain_type: row.try_get("plain_type")?,
            scale: row.try_get("scale")?,
            collation: row.try_get("collation")?,
            is_generated: row.try_get("is_generated")?,
            is_required: row.try_get("is_required")?,
        })
    };
    rows.iter().map(column).collect()
}

async fn has_unique_index(connection: &mut PgConnection, target: &Target) -> Result<bool, sqlx::Error> {
    let names: Vec<&str> = target.keys.iter().map(|key| key.column.as_str()).collect();
    sqlx::query_scalar(
        "select exists (
             select from pg_index i
             join pg_class c on c.oid = i.indrelid join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = $1 and c.relname = $2
               and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indnkeyatts = cardinality($3::text[])
               and (select array_agg(a.attname::text order by a.attname::text) from pg_attribute a
                    where a.attrelid = c.oid and a.attnum = any((i.indkey::int2[])[0 : i.indnkeyatts - 1]))
                   = (select array_agg(name order by name) from unnest($3::text[]) as k (name)))",
    )
    .bind(target.table.schema.as_str())
    .bind(target.table.name.as_str())
    .bind(names)
    .fetch_one(connection)
    .await
}
