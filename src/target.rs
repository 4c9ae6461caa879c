//! Target: do a pipeline's tables fit what is written into them?
//!
//! Takes a pipeline; gives how each table's columns are to be written ([`Fit`]), or everything that does not fit, each with the statement
//! that corrects it ([`Unfit`]). Fails with what PostgreSQL says.
//!
//! `finding` is what is told; `catalog` asks PostgreSQL; `indexes` and `surroundings` judge what it says; `definition` makes a table; `outline` is for
//! making a pipeline from one. The types of columns are judged here.

mod catalog;
pub mod definition;
mod finding;
mod indexes;
mod outline;
mod surroundings;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

pub use self::finding::{Examined, Finding, Unfit, Weight};
pub use self::outline::{Outline, OutlineColumn, outline};
use crate::merge::Merge;
use crate::model::pipeline::{Identifier, Pipeline};
use crate::model::target::{KeyColumn, Kind, Target, ValueColumn, Write};

/// How a table's columns are written. All types are safe to stand in SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// The type, and the collation where it matters, by which each key is compared.
    pub keys: Vec<String>,
    /// The type of each value's column.
    pub values: Vec<String>,
    /// Whether PostgreSQL sorts the keys and makes them distinct, because their texts do not tell which are equal.
    pub is_grouped: bool,
    /// In which statements its rows are written.
    pub writing: Writing,
}

/// In which statements a table's rows are written, all in one transaction with the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writing {
    /// An upsert, as a part of the flush's statement or by itself, whichever is cheaper.
    Upsert,
    /// An upsert that is a statement of its own: a distributed table's may not be a part of a larger one.
    UpsertAlone,
    /// Rows that are there are updated before others are inserted, so that a CHECK on a value meets what comes of a delta and not the delta.
    UpdateThenInsert,
}

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

/// What is known of a column.
struct Column {
    /// Its name as SQL needs it.
    name: String,
    plain_name: String,
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
    /// Whether it has an expression that makes its value.
    is_generated: bool,
    /// Whether it always takes a number of its own.
    is_identity: bool,
    is_not_null: bool,
    /// The domains that refuse null, as SQL names them.
    not_null_domains: Vec<String>,
    has_default: bool,
    /// Whether its default is another one in each row.
    is_default_different: bool,
    /// The table's primary key, if the column is part of it.
    primary_key: Option<String>,
    can_select: bool,
    can_insert: bool,
    can_update: bool,
}

impl Column {
    fn refuses_null(&self) -> bool {
        self.is_not_null || !self.not_null_domains.is_empty()
    }

    /// The statements after which it takes null.
    fn allow_null(&self, table: &str) -> String {
        let domains = self.not_null_domains.iter().map(|domain| format!("alter domain {domain} drop not null"));
        let key = self.primary_key.iter().map(|key| format!("alter table {table} drop constraint {key}"));
        let own = self.is_not_null.then(|| format!("alter table {table} alter column {} drop not null", self.name));
        key.chain(own).chain(domains).collect::<Vec<_>>().join("; ")
    }
}

/// Makes sure that a pipeline's tables are what its configuration says; gives how each is written, in their order.
pub async fn check_tables(
    connection: &mut PgConnection,
    pipeline: &Pipeline,
) -> Result<Result<Vec<Fit>, Unfit>, sqlx::Error> {
    check(connection, pipeline, Depth::Refusals).await
}

/// The same for a role that only reads the tables.
pub async fn check_tables_that_are_read(
    connection: &mut PgConnection,
    pipeline: &Pipeline,
) -> Result<Result<Vec<Fit>, Unfit>, sqlx::Error> {
    check(connection, pipeline, Depth::Reading).await
}

async fn check(
    connection: &mut PgConnection,
    pipeline: &Pipeline,
    depth: Depth,
) -> Result<Result<Vec<Fit>, Unfit>, sqlx::Error> {
    let (mut fits, mut unfit) = (Vec::new(), Vec::new());
    for target in pipeline.targets() {
        let (fit, findings) = examine_table(connection, &target, depth).await?;
        match fit {
            Some(fit) => fits.push(fit),
            None => {
                let refusals = findings.into_iter().filter(|finding| finding.weight == Weight::Refusal);
                unfit.push((target.table, refusals.collect()));
            }
        }
    }
    Ok(if unfit.is_empty() { Ok(fits) } else { Err(Unfit(unfit)) })
}

/// Everything that can be said of a pipeline's tables, in their order.
pub async fn examine(connection: &mut PgConnection, pipeline: &Pipeline) -> Result<Vec<Examined>, sqlx::Error> {
    let mut examined = Vec::new();
    for target in pipeline.targets() {
        let (fit, mut findings) = examine_table(connection, &target, Depth::Everything).await?;
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.weight));
        examined.push(Examined { table: target.table, fit, findings });
    }
    Ok(examined)
}

/// How deep a table is looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// For what cannot be written by whoever has the right to. This role only reads.
    Reading,
    /// For what cannot be written. No lock of the table is waited for, so a daemon starts while somebody holds one.
    Refusals,
    /// For warnings and advice, too.
    Everything,
}

async fn examine_table(
    connection: &mut PgConnection,
    target: &Target,
    depth: Depth,
) -> Result<(Option<Fit>, Vec<Finding>), sqlx::Error> {
    let deletes = target.write == Write::DeleteZero;
    let Some(relation) = catalog::relation(connection, &target.table, deletes).await? else {
        return Ok((None, vec![surroundings::missing(target)]));
    };
    if let Some(finding) = surroundings::unsuitable(&relation) {
        return Ok((None, vec![finding]));
    }
    let columns = find_columns(connection, relation.oid).await?;
    let indexes = catalog::indexes(connection, relation.oid).await?;
    let mut findings: Vec<Finding> =
        surroundings::rights(target, &relation, &columns, depth == Depth::Reading).into_iter().collect();
    findings.extend(surroundings::dangers(target, &relation));
    findings.extend(of_columns(target, &relation.name, &columns));
    let column = |name: &Identifier| columns.iter().find(|column| column.plain_name == name.as_str());
    if target.keys.iter().all(|key| column(&key.column).is_some()) {
        findings.extend(indexes::findings(target, &relation, &columns, &indexes));
    }
    if depth == Depth::Everything {
        let constraints = catalog::constraints(connection, relation.oid).await?;
        let written = (true, target.write != Write::Insert, deletes);
        let triggers = catalog::triggers(connection, relation.oid, written).await?;
        findings.extend(surroundings::constraints(target, &relation, &constraints));
        findings.extend(surroundings::triggers(&triggers));
        findings.extend(surroundings::upkeep(target, &relation));
    }
    if findings.iter().any(|finding| finding.weight == Weight::Refusal) {
        return Ok((None, findings));
    }
    let keys: Vec<(String, bool)> =
        target.keys.iter().filter_map(|key| Some(key_type(key.kind(), column(&key.column)?))).collect();
    let values: Vec<&str> = target.values.iter().map(|value| value.column.as_str()).collect();
    let writing = match relation.is_distributed {
        true => Writing::UpsertAlone,
        false if target.write == Write::Insert => Writing::Upsert,
        false if catalog::has_check(connection, relation.oid, &values).await? => Writing::UpdateThenInsert,
        false => Writing::Upsert,
    };
    let fit = Fit {
        writing,
        is_grouped: keys.iter().any(|(_, is_grouped)| *is_grouped),
        keys: keys.into_iter().map(|(sql_type, _)| sql_type).collect(),
        // Without a length or a scale, so that a value that does not fit is refused and not cut off.
        values: target.values.iter().filter_map(|value| Some(column(&value.column)?.plain_type.clone())).collect(),
    };
    Ok((Some(fit), findings))
}

/// What of a table's columns does not fit.
fn of_columns(target: &Target, table: &str, columns: &[Column]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let column = |name: &Identifier| columns.iter().find(|column| column.plain_name == name.as_str());
    let wanted = definition::columns(target);
    for (name, definition) in &wanted {
        match column(name) {
            None => {
                // Rows that are there have no key yet.
                let definition = definition.strip_suffix(" not null").unwrap_or(definition);
                let what = format!("it has no column {name}: add it, or name another one in the pipeline");
                findings.push(Finding::refusal(what, format!("alter table {table} add column {definition}")));
            }
            Some(column) if column.is_generated => findings.push(Finding::refusal(
                format!("column {} is generated, so it cannot be written", column.name),
                format!("alter table {table} alter column {} drop expression", column.name),
            )),
            Some(column) if column.is_identity => findings.push(Finding::refusal(
                format!("column {} is generated always as identity, so it cannot be written", column.name),
                format!("alter table {table} alter column {} set generated by default", column.name),
            )),
            Some(_) => {}
        }
    }
    for key in &target.keys {
        let sentence = column(&key.column).and_then(|column| unfit_key(key, column));
        findings.extend(sentence.map(|sentence| Finding::of_sentence(&sentence)));
    }
    for value in &target.values {
        let sentence = column(&value.column).and_then(|column| unfit_value(value, column, table));
        findings.extend(sentence.map(|sentence| Finding::of_sentence(&sentence)));
        if let Some(version) = value.by.as_ref().and_then(column)
            && let Some(wanted) = value.merge.needs_version().filter(|wanted| *wanted != version.sql_type)
        {
            let Column { name, sql_type, .. } = version;
            findings.push(Finding::refusal(
                format!("column {name} has type {sql_type}, and a version needs {wanted}"),
                format!("alter table {table} alter column {name} type {wanted} using null"),
            ));
        }
        let is_optional = value.field.as_ref().is_some_and(|field| field.is_optional) && !value.merge.is_additive();
        let refusing = [Some(&value.column), value.by.as_ref()].into_iter().flatten().filter_map(column);
        for column in refusing.filter(|column| is_optional && column.refuses_null()) {
            findings.push(Finding::refusal(
                format!(
                    "column {} must not be null, and the first entry of a row may lack the field {}",
                    column.name,
                    value.field.as_ref().map_or("", |field| &field.name)
                ),
                column.allow_null(table),
            ));
        }
    }
    if let Some(updated_at) = target.updated_at.as_ref().and_then(column)
        && !["timestamptz", "timestamp"].contains(&updated_at.base.as_str())
    {
        let Column { name, sql_type, .. } = updated_at;
        findings.push(Finding::refusal(
            format!("column {name} has type {sql_type}, which is no time"),
            format!("alter table {table} alter column {name} type timestamptz using now()"),
        ));
    }
    for other in columns.iter().filter(|column| column.refuses_null() && !column.has_default && !column.is_generated) {
        if !wanted.iter().any(|(name, _)| name.as_str() == other.plain_name) {
            findings.push(Finding::refusal(
                format!(
                    "column {} must not be null and has no default, so no row could be inserted: name it in the pipeline, give it a default, \
                     or allow null",
                    other.name
                ),
                other.allow_null(table),
            ));
        }
    }
    // One finding of a column that two values share.
    let mut told: Vec<Finding> = Vec::new();
    for finding in findings {
        if !told.contains(&finding) {
            told.push(finding);
        }
    }
    told
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
    let kind = value.kind();
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
            if held < 0 {
                return Some(format!("column {name} has type {sql_type}, which rounds: {}", retype("numeric")));
            }
            let rounds = scale.is_none_or(|scale| i32::from(scale) > held);
            rounds.then(|| {
                format!("column {name} has type {sql_type}, which rounds: write a field of type numeric({held}) in values, or {}", retype("numeric"))
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

async fn find_columns(connection: &mut PgConnection, oid: i64) -> Result<Vec<Column>, sqlx::Error> {
    let rows = sqlx::query(
        "with recursive base as (
             select a.attrelid, a.attnum, a.atttypid as type, a.atttypmod as modifier
             from pg_attribute a
             where a.attrelid = $1::int8::oid and a.attnum > 0 and not a.attisdropped
             union all
             select b.attrelid, b.attnum, t.typbasetype, t.typtypmod
             from base b join pg_type t on t.oid = b.type and t.typtype = 'd')
         select quote_ident(a.attname) as name, a.attname::text as plain_name, t.typname::text as base, t.typtype::text = 'e' as is_enum,
                format_type(b.type, b.modifier) as sql_type, format_type(b.type, -1) as plain_type,
                case when t.typname = 'numeric' and b.modifier > 0
                     then (((b.modifier - 4) & 2047) # 1024) - 1024 end as scale,
                (select format('%I.%I', cn.nspname, co.collname) from pg_collation co
                 join pg_namespace cn on cn.oid = co.collnamespace
                 where co.oid = a.attcollation and not co.collisdeterministic) as collation,
                a.attgenerated <> '' as is_generated, a.attidentity = 'a' as is_identity, a.attnotnull as is_not_null,
                array(select format('%I.%I', dn.nspname, d.typname) from base x join pg_type d on d.oid = x.type and d.typnotnull
                      join pg_namespace dn on dn.oid = d.typnamespace where x.attnum = a.attnum) as not_null_domains,
                a.atthasdef or a.attidentity <> '' or coalesce(top.typdefault is not null, false) as has_default,
                a.attidentity <> '' or a.attgenerated = '' and coalesce(pg_get_expr(df.adbin, 0) ~ '(nextval|uuid|random|clock_timestamp)', false) as is_default_different,
                (select quote_ident(k.conname) from pg_constraint k
                 where k.conrelid = a.attrelid and k.contype = 'p' and a.attnum = any(k.conkey)) as primary_key,
                has_column_privilege(a.attrelid, a.attnum, 'select') as can_select,
                has_column_privilege(a.attrelid, a.attnum, 'insert') as can_insert,
                has_column_privilege(a.attrelid, a.attnum, 'update') as can_update
         from base b
         join pg_type t on t.oid = b.type and t.typtype <> 'd'
         join pg_attribute a on a.attrelid = b.attrelid and a.attnum = b.attnum
         join pg_type top on top.oid = a.atttypid
         left join pg_attrdef df on df.adrelid = a.attrelid and df.adnum = a.attnum
         order by a.attnum",
    )
    .bind(oid)
    .fetch_all(connection)
    .await?;
    let column = |row: &PgRow| {
        Ok(Column {
            name: row.try_get("name")?,
            plain_name: row.try_get("plain_name")?,
            base: row.try_get("base")?,
            is_enum: row.try_get("is_enum")?,
            sql_type: row.try_get("sql_type")?,
            plain_type: row.try_get("plain_type")?,
            scale: row.try_get("scale")?,
            collation: row.try_get("collation")?,
            is_generated: row.try_get("is_generated")?,
            is_identity: row.try_get("is_identity")?,
            is_not_null: row.try_get("is_not_null")?,
            not_null_domains: row.try_get("not_null_domains")?,
            has_default: row.try_get("has_default")?,
            is_default_different: row.try_get("is_default_different")?,
            primary_key: row.try_get("primary_key")?,
            can_select: row.try_get("can_select")?,
            can_insert: row.try_get("can_insert")?,
            can_update: row.try_get("can_update")?,
        })
    };
    rows.iter().map(column).collect()
}
