//! Catalog: what PostgreSQL's catalog says of a pipeline's table.
//!
//! Takes a pipeline; gives the table's description, or nothing if there is no relation of that name. Fails with what
//! PostgreSQL says. What it means is decided in [`super`].

use sqlx::Row;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgConnection, PgRow};

use crate::model::pipeline::Pipeline;

/// A relation. Names that end up in statements for people are quoted where SQL asks for it.
#[derive(Debug, Clone)]
pub(super) struct Relation {
    /// `pg_class.relkind`.
    pub(super) kind: String,
    /// Schema and name.
    pub(super) sql_name: String,
    /// The role that asks.
    pub(super) role: String,
    /// Whether the role may use the schema.
    pub(super) schema_usage: bool,
    /// Whether it, or a partition, is not in the write-ahead log.
    pub(super) unlogged: bool,
    /// Whether a partition is a foreign table.
    pub(super) foreign_partitions: bool,
    /// Whether row security applies to the role.
    pub(super) row_security: bool,
    /// Its rules.
    pub(super) rules: Vec<String>,
    /// Columns that are not the pipeline's, NOT NULL and without a default.
    pub(super) mandatory: Vec<String>,
    /// The pipeline's columns, as far as they exist.
    pub(super) columns: Vec<Column>,
    /// Unique indexes that involve the key's column, or an expression.
    pub(super) indexes: Vec<Index>,
}

/// A column of the pipeline.
#[derive(Debug, Clone)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) sql_name: String,
    /// Its type as it was declared, a domain by its own name.
    pub(super) declared: String,
    /// The type below all domains, with its schema.
    pub(super) base: String,
    /// That type's modifier; -1 if it has none.
    pub(super) typmod: i32,
    /// What a key is cast to, so that equal keys become equal values.
    pub(super) cast: String,
    pub(super) generated: bool,
    pub(super) identity_always: bool,
    pub(super) insert: bool,
    pub(super) update: bool,
    pub(super) select: bool,
}

/// A unique index.
#[derive(Debug, Clone)]
pub(super) struct Index {
    pub(super) name: String,
    /// Why an upsert by the key cannot use it; none if it can.
    pub(super) flaw: Option<&'static str>,
    /// Whether its collation takes keys for equal only if their bytes are.
    pub(super) deterministic: bool,
    /// Its collation, with schema; none for types without one and for the database's own.
    pub(super) collation: Option<String>,
}

impl Index {
    pub(super) fn is_usable(&self) -> bool {
        self.flaw.is_none()
    }
}

/// Reads it.
pub(super) async fn relation(
    connection: &mut PgConnection,
    pipeline: &Pipeline,
) -> Result<Option<Relation>, sqlx::Error> {
    let columns = [Some(&pipeline.key), Some(&pipeline.value), pipeline.updated_at.as_ref()];
    let columns: Vec<&str> = columns.into_iter().flatten().map(|name| name.as_str()).collect();
    let Some(row) = sqlx::query(
        "select c.oid, c.relkind::text, quote_ident(n.nspname) || '.' || quote_ident(c.relname), quote_ident(current_user),
                has_schema_privilege(n.oid, 'usage'),
                c.relpersistence <> 'p' or coalesce(parts.unlogged, false), coalesce(parts.foreign_tables, false),
                c.relkind in ('r', 'p') and row_security_active(c.oid),
                array(select quote_ident(r.rulename) from pg_rewrite r
                      where r.ev_class = c.oid and r.rulename <> '_RETURN' order by 1),
                array(select quote_ident(a.attname) from pg_attribute a join pg_type t on t.oid = a.atttypid
                      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attname <> all($3)
                        and (a.attnotnull or t.typnotnull) and not a.atthasdef and t.typdefault is null
                        and a.attidentity = '' and a.attgenerated = ''
                      order by a.attnum)
         from pg_class c
         join pg_namespace n on n.oid = c.relnamespace
         cross join lateral (
             select bool_or(p.relpersistence <> 'p') as unlogged, bool_or(p.relkind = 'f') as foreign_tables
             from pg_partition_tree(c.oid) t join pg_class p on p.oid = t.relid where t.isleaf) parts
         where n.nspname = $1 and c.relname = $2",
    )
    .bind(pipeline.table.schema.as_str())
    .bind(pipeline.table.name.as_str())
    .bind(&columns)
    .fetch_optional(&mut *connection)
    .await?
    else {
        return Ok(None);
    };
    let oid: Oid = row.try_get(0)?;
    Ok(Some(Relation {
        kind: row.try_get(1)?,
        sql_name: row.try_get(2)?,
        role: row.try_get(3)?,
        schema_usage: row.try_get(4)?,
        unlogged: row.try_get(5)?,
        foreign_partitions: row.try_get(6)?,
        row_security: row.try_get(7)?,
        rules: row.try_get(8)?,
        mandatory: row.try_get(9)?,
        columns: columns_of(connection, oid, &columns).await?,
        indexes: indexes_of(connection, oid, pipeline.key.as_str()).await?,
    }))
}

/// The columns of these names. A domain is followed down to the type it rests on.
///
/// A cast says its type with the modifier, so that `numeric(9, 2)` or `timestamp(0)` round before keys are compared. Four
/// types are cast to without it: there a cast would cut a key off in silence, where the column itself refuses it.
async fn columns_of(connection: &mut PgConnection, table: Oid, names: &[&str]) -> Result<Vec<Column>, sqlx::Error> {
    let rows = sqlx::query(
        "select a.attname::text, quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
                n.nspname || '.' || t.typname, b.typmod,
                case when n.nspname = 'pg_catalog' and t.typname not in ('varchar', 'bpchar', 'bit', 'varbit')
                     then format_type(t.oid, b.typmod)
                     else quote_ident(n.nspname) || '.' || quote_ident(t.typname) end,
                a.attgenerated <> '', a.attidentity = 'a',
                has_column_privilege(a.attrelid, a.attnum, 'insert'),
                has_column_privilege(a.attrelid, a.attnum, 'update'),
                has_column_privilege(a.attrelid, a.attnum, 'select')
         from pg_attribute a
         cross join lateral (
             with recursive below (type, typmod) as (
                 select a.atttypid, a.atttypmod
                 union all
                 select d.typbasetype, d.typtypmod from below join pg_type d on d.oid = below.type
                 where d.typtype = 'd')
             select below.type, below.typmod from below join pg_type x on x.oid = below.type where x.typtype <> 'd') b
         join pg_type t on t.oid = b.type
         join pg_namespace n on n.oid = t.typnamespace
         where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped and a.attname = any($2)",
    )
    .bind(table)
    .bind(names)
    .fetch_all(connection)
    .await?;
    let column = |row: &PgRow| {
        Ok(Column {
            name: row.try_get(0)?,
            sql_name: row.try_get(1)?,
            declared: row.try_get(2)?,
            base: row.try_get(3)?,
            typmod: row.try_get(4)?,
            cast: row.try_get(5)?,
            generated: row.try_get(6)?,
            identity_always: row.try_get(7)?,
            insert: row.try_get(8)?,
            update: row.try_get(9)?,
            select: row.try_get(10)?,
        })
    };
    rows.iter().map(column).collect()
}

/// The unique indexes that are on the key's column, alone or not, or on an expression.
async fn indexes_of(connection: &mut PgConnection, table: Oid, key: &str) -> Result<Vec<Index>, sqlx::Error> {
    let rows = sqlx::query(
        "select i.indexrelid::regclass::text, i.indexprs is not null, i.indpred is not null, i.indnkeyatts > 1,
                not i.indimmediate, not i.indisvalid,
                coalesce(o.collisdeterministic, true),
                case when o.oid <> 'pg_catalog.\"default\"'::regcollation
                     then quote_ident(n.nspname) || '.' || quote_ident(o.collname) end
         from pg_index i
         join pg_attribute a on a.attrelid = i.indrelid and a.attname = $2
         left join pg_collation o on o.oid = i.indcollation[0]
         left join pg_namespace n on n.oid = o.collnamespace
         where i.indrelid = $1 and i.indisunique and (a.attnum = any(i.indkey::int2[]) or i.indexprs is not null)
         order by i.indexrelid",
    )
    .bind(table)
    .bind(key)
    .fetch_all(connection)
    .await?;
    let index = |row: &PgRow| {
        let flaws =
            ["it is on an expression", "it is partial", "it has more columns", "it is deferrable", "it is invalid"];
        let mut flaw = None;
        for (n, sentence) in flaws.into_iter().enumerate() {
            if row.try_get(1 + n)? {
                flaw = flaw.or(Some(sentence));
            }
        }
        Ok(Index { name: row.try_get(0)?, flaw, deterministic: row.try_get(6)?, collation: row.try_get(7)? })
    };
    rows.iter().map(index).collect()
}
