//! Catalog: what PostgreSQL's catalogs tell of a table, beside its columns.
//!
//! Takes a table's name or its number; gives facts, every name in them as SQL needs it. Fails with what PostgreSQL says.

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::model::pipeline::Table;

/// The table itself and, where it is partitioned, its partitions.
pub(super) struct Relation {
    pub(super) oid: i64,
    /// Its name.
    pub(super) name: String,
    pub(super) schema: String,
    /// As `pg_class.relkind` has it.
    pub(super) kind: String,
    /// Who asks.
    pub(super) role: String,
    pub(super) is_schema_usable: bool,
    pub(super) is_temporary: bool,
    pub(super) is_row_security_active: bool,
    /// Row security is active although the role owns the table.
    pub(super) is_row_security_forced: bool,
    pub(super) can_delete: bool,
    /// It, or its partitions, that are empty after a crash.
    pub(super) not_logged: Vec<String>,
    /// Citus has distributed it over servers.
    pub(super) is_distributed: bool,
    /// Its partitions on other servers.
    pub(super) foreign: Vec<String>,
    /// Tables that inherit from it and are no partitions.
    pub(super) children: Vec<String>,
    /// Rules for INSERT and UPDATE.
    pub(super) rules: Vec<String>,
    /// Rules for DELETE.
    pub(super) rules_of_delete: Vec<String>,
    /// The columns by which it, or a partition, is partitioned; an empty text stands for an expression.
    pub(super) partitioned_by: Vec<String>,
    /// It, or partitions, in which some rows have no place.
    pub(super) without_default: Vec<String>,
    /// It, or partitions, of which not all remainders of the hash are there.
    pub(super) without_remainder: Vec<String>,
    /// It, or partitions, whose pages are filled to the last byte.
    pub(super) full: Vec<String>,
    /// It, or partitions, that autovacuum leaves alone.
    pub(super) never_vacuumed: Vec<String>,
    /// It, or partitions, of a million rows and more that are vacuumed as small ones are.
    pub(super) large: Vec<String>,
    /// It, or partitions, that publish updates or deletes and have nothing by which a subscriber finds the row.
    pub(super) without_identity: Vec<String>,
}

pub(super) async fn relation(
    connection: &mut PgConnection,
    table: &Table,
    deletes: bool,
) -> Result<Option<Relation>, sqlx::Error> {
    let row = sqlx::query(
        "with self as (
             select c.*, n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = $1 and c.relname = $2),
         tree as (
             select t.oid, t.relkind, t.relpersistence, t.relreplident, t.reltuples, t.reloptions, format('%I.%I', tn.nspname, t.relname) as name
             from pg_class t join pg_namespace tn on tn.oid = t.relnamespace
             where t.oid in (select s.oid from self s union select p.relid from self s, pg_partition_tree(s.oid) p)),
         options as (
             select tree.oid, o.option_name as name, o.option_value as value from tree, pg_options_to_table(tree.reloptions) o)
         select s.oid::int8 as oid, format('%I.%I', s.nspname, s.relname) as name, quote_ident(s.nspname) as schema,
                s.relkind::text as kind, quote_ident(current_user) as role,
                has_schema_privilege(s.relnamespace, 'usage') as schema_usable,
                s.relpersistence = 't' as temporary,
                row_security_active(s.oid) as row_security,
                s.relforcerowsecurity and pg_has_role(s.relowner, 'usage') as forced,
                has_table_privilege(s.oid, 'delete') as can_delete,
                array(select t.name from tree t where t.relkind = 'r' and t.relpersistence = 'u' order by 1) as not_logged,
                array(select t.name from tree t where t.relkind = 'f' order by 1) as foreign,
                array(select format('%I.%I', cn.nspname, c.relname)
                      from pg_inherits h join pg_class c on c.oid = h.inhrelid join pg_namespace cn on cn.oid = c.relnamespace
                      where h.inhparent = s.oid and not c.relispartition order by 1) as children,
                array(select quote_ident(r.rulename) from pg_rewrite r
                      where r.ev_class = s.oid and r.ev_type in ('2', '3') and r.ev_enabled in ('O', 'A') order by 1) as rules,
                array(select quote_ident(r.rulename) from pg_rewrite r
                      where r.ev_class = s.oid and r.ev_type = '4' and r.ev_enabled in ('O', 'A') order by 1) as rules_of_delete,
                array(select distinct coalesce(a.attname::text, '')
                      from tree t join pg_partitioned_table p on p.partrelid = t.oid
                      cross join unnest(p.partattrs::int2[]) as k (number)
                      left join pg_attribute a on a.attrelid = t.oid and a.attnum = k.number and k.number > 0 order by 1) as partitioned_by,
                array(select t.name from tree t join pg_partitioned_table p on p.partrelid = t.oid
                      where p.partstrat in ('r', 'l') and p.partdefid = 0 order by 1) as without_default,
                array(select t.name from tree t join pg_partitioned_table p on p.partrelid = t.oid
                      where p.partstrat = 'h' and coalesce((
                          select sum(1 / substring(pg_get_expr(c.relpartbound, 0) from 'modulus (\\d+)')::numeric)
                          from pg_inherits h join pg_class c on c.oid = h.inhrelid where h.inhparent = t.oid), 0) < 0.999999
                      order by 1) as without_remainder,
                array(select t.name from tree t where t.relkind = 'r' and not exists (
                          select from options o where o.oid = t.oid and o.name = 'fillfactor' and o.value::int < 100) order by 1) as \"full\",
                array(select t.name from tree t join options o on o.oid = t.oid
                      where o.name = 'autovacuum_enabled' and not o.value::boolean order by 1) as never_vacuumed,
                array(select t.name from tree t where t.relkind = 'r' and t.reltuples >= 1e6 and not exists (
                          select from options o where o.oid = t.oid and o.name = 'autovacuum_vacuum_scale_factor') order by 1) as large,
                array(select t.name from tree t
                      where t.relkind = 'r' and t.relpersistence = 'p'
                        and (t.relreplident = 'n' or t.relreplident = 'd'
                             and not exists (select from pg_index i where i.indrelid = t.oid and i.indisprimary))
                        and exists (
                            select from pg_publication p where (p.pubupdate or p.pubdelete and $3) and (
                                p.puballtables
                                or exists (select from pg_publication_rel r join tree x on x.oid = r.prrelid where r.prpubid = p.oid)
                                or exists (select from pg_publication_namespace r where r.pnpubid = p.oid and r.pnnspid = s.relnamespace)))
                      order by 1) as without_identity
         from self s",
    )
    .bind(table.schema.as_str())
    .bind(table.name.as_str())
    .bind(deletes)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let is_distributed = is_distributed(connection, row.try_get("oid")?).await?;
    let read = |row: PgRow| {
        Ok(Relation {
            oid: row.try_get("oid")?,
            name: row.try_get("name")?,
            schema: row.try_get("schema")?,
            kind: row.try_get("kind")?,
            role: row.try_get("role")?,
            is_schema_usable: row.try_get("schema_usable")?,
            is_temporary: row.try_get("temporary")?,
            is_row_security_active: row.try_get("row_security")?,
            is_row_security_forced: row.try_get("forced")?,
            can_delete: row.try_get("can_delete")?,
            is_distributed,
            not_logged: row.try_get("not_logged")?,
            foreign: row.try_get("foreign")?,
            children: row.try_get("children")?,
            rules: row.try_get("rules")?,
            rules_of_delete: row.try_get("rules_of_delete")?,
            partitioned_by: row.try_get("partitioned_by")?,
            without_default: row.try_get("without_default")?,
            without_remainder: row.try_get("without_remainder")?,
            full: row.try_get("full")?,
            never_vacuumed: row.try_get("never_vacuumed")?,
            large: row.try_get("large")?,
            without_identity: row.try_get("without_identity")?,
        })
    };
    read(row).map(Some)
}

/// Whether Citus is there and has distributed the table.
async fn is_distributed(connection: &mut PgConnection, oid: i64) -> Result<bool, sqlx::Error> {
    const CATALOG: &str = "select to_regclass('pg_catalog.pg_dist_partition') is not null";
    if !sqlx::query_scalar(CATALOG).fetch_one(&mut *connection).await? {
        return Ok(false);
    }
    sqlx::query_scalar("select exists (select from pg_catalog.pg_dist_partition where logicalrelid = $1::int8::oid)")
        .bind(oid)
        .fetch_one(connection)
        .await
}

/// An index.
pub(super) struct Index {
    pub(super) name: String,
    /// The constraint that it stands for, and its kind as `pg_constraint.contype` has it.
    pub(super) constraint: Option<(String, String)>,
    pub(super) is_unique: bool,
    pub(super) is_exclusion: bool,
    pub(super) is_valid: bool,
    pub(super) is_immediate: bool,
    pub(super) is_partial: bool,
    /// Whether null equals null in it.
    pub(super) is_null_a_value: bool,
    /// Whether what is equal for one of its columns is not what is equal for the index.
    pub(super) compares_otherwise: bool,
    /// Whether a change of one of its columns costs an entry in every index of the table.
    pub(super) prevents_hot: bool,
    /// Its key columns, plain; an empty text stands for an expression.
    pub(super) columns: Vec<String>,
    /// All columns that it looks at.
    pub(super) touches: Vec<String>,
}

pub(super) async fn indexes(connection: &mut PgConnection, oid: i64) -> Result<Vec<Index>, sqlx::Error> {
    let rows = sqlx::query(
        "select format('%I.%I', xn.nspname, x.relname) as name, k.name as constraint_name, k.kind as constraint_kind,
                i.indisunique as is_unique, i.indisexclusion as is_exclusion, i.indisvalid and i.indisready as is_valid,
                i.indimmediate as is_immediate, i.indpred is not null as is_partial, i.indnullsnotdistinct as nulls_equal,
                m.amname <> 'brin' or current_setting('server_version_num')::int < 160000 as prevents_hot,
                array(select coalesce(a.attname::text, '')
                      from unnest(i.indkey::int2[]) with ordinality as u (number, place)
                      left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.number and u.number > 0
                      where u.place <= i.indnkeyatts order by u.place) as columns,
                array(select a.attname::text from pg_attribute a
                      where a.attrelid = i.indrelid and a.attnum > 0 and (a.attnum = any(i.indkey::int2[]) or exists (
                          select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = i.indexrelid
                              and d.refclassid = 'pg_class'::regclass and d.refobjid = i.indrelid and d.refobjsubid = a.attnum))
                      order by a.attnum) as touches,
                exists (
                    select from unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[]) with ordinality
                        as u (number, opclass, coll, place)
                    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.number
                    join pg_opclass oc on oc.oid = u.opclass
                    left join pg_collation ic on ic.oid = u.coll left join pg_collation ac on ac.oid = a.attcollation
                    where u.place <= i.indnkeyatts and (
                        u.coll <> a.attcollation
                            and not (coalesce(ic.collisdeterministic, true) and coalesce(ac.collisdeterministic, true))
                        or (select o.amopopr from pg_amop o
                            where o.amopfamily = oc.opcfamily and o.amoplefttype = oc.opcintype and o.amoprighttype = oc.opcintype
                              and o.amopstrategy = 3)
                        is distinct from
                           (select o.amopopr from pg_opclass df join pg_amop o on o.amopfamily = df.opcfamily
                            where df.opcmethod = oc.opcmethod and df.opcdefault and df.opcintype = oc.opcintype
                              and o.amoplefttype = df.opcintype and o.amoprighttype = df.opcintype and o.amopstrategy = 3))) as otherwise
         from pg_index i
         join pg_class x on x.oid = i.indexrelid join pg_namespace xn on xn.oid = x.relnamespace join pg_am m on m.oid = x.relam
         left join lateral (
             select quote_ident(k.conname) as name, k.contype::text as kind from pg_constraint k
             where k.conindid = i.indexrelid and k.conrelid = i.indrelid and k.contype in ('p', 'u', 'x') limit 1) k on true
         where i.indrelid = $1::int8::oid
         order by x.relname",
    )
    .bind(oid)
    .fetch_all(connection)
    .await?;
    let read = |row: &PgRow| {
        let constraint: (Option<String>, Option<String>) =
            (row.try_get("constraint_name")?, row.try_get("constraint_kind")?);
        Ok(Index {
            name: row.try_get("name")?,
            constraint: constraint.0.zip(constraint.1),
            is_unique: row.try_get("is_unique")?,
            is_exclusion: row.try_get("is_exclusion")?,
            is_valid: row.try_get("is_valid")?,
            is_immediate: row.try_get("is_immediate")?,
            is_partial: row.try_get("is_partial")?,
            is_null_a_value: row.try_get("nulls_equal")?,
            compares_otherwise: row.try_get("otherwise")?,
            prevents_hot: row.try_get("prevents_hot")?,
            columns: row.try_get("columns")?,
            touches: row.try_get("touches")?,
        })
    };
    rows.iter().map(read).collect()
}

/// A CHECK of the table or of a column's domain, or a foreign key.
pub(super) struct Constraint {
    /// `c`, `d` for a domain's CHECK, `f`, or `r` for a foreign key of another table that refers to this one.
    pub(super) kind: String,
    pub(super) name: String,
    /// What it belongs to: a table, or a domain.
    pub(super) owner: String,
    pub(super) definition: String,
    /// The columns of the table that it looks at, plain.
    pub(super) columns: Vec<String>,
}

pub(super) async fn constraints(connection: &mut PgConnection, oid: i64) -> Result<Vec<Constraint>, sqlx::Error> {
    let rows = sqlx::query(
        "select case when k.contype = 'f' and k.confrelid = $1::int8::oid and k.conrelid <> k.confrelid then 'r' else k.contype::text end as kind,
                quote_ident(k.conname) as name, format('%I.%I', n.nspname, t.relname) as owner, pg_get_constraintdef(k.oid) as definition,
                array(select a.attname::text from pg_attribute a
                      where a.attrelid = $1::int8::oid
                        and a.attnum = any(case when k.conrelid = $1::int8::oid then k.conkey else k.confkey end)) as columns
         from pg_constraint k join pg_class t on t.oid = k.conrelid join pg_namespace n on n.oid = t.relnamespace
         where k.conparentid = 0 and (k.contype in ('c', 'f') and k.conrelid = $1::int8::oid or k.contype = 'f' and k.confrelid = $1::int8::oid)
           and coalesce(to_jsonb(k) ->> 'conenforced', 'true') = 'true'
         union all
         select 'd', quote_ident(k.conname), format('%I.%I', n.nspname, d.typname), pg_get_constraintdef(k.oid), array[a.attname::text]
         from pg_attribute a join pg_type d on d.oid = a.atttypid and d.typtype = 'd' join pg_namespace n on n.oid = d.typnamespace
         join pg_constraint k on k.contypid = d.oid and k.contype = 'c'
         where a.attrelid = $1::int8::oid and a.attnum > 0 and not a.attisdropped
         order by 2",
    )
    .bind(oid)
    .fetch_all(connection)
    .await?;
    let read = |row: &PgRow| {
        Ok(Constraint {
            kind: row.try_get("kind")?,
            name: row.try_get("name")?,
            owner: row.try_get("owner")?,
            definition: row.try_get("definition")?,
            columns: row.try_get("columns")?,
        })
    };
    rows.iter().map(read).collect()
}

/// Whether a CHECK of the table, of a partition or of a domain looks at one of these columns, or at one that is made of others.
pub(super) async fn has_check(connection: &mut PgConnection, oid: i64, columns: &[&str]) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "with tree as (select $1::int8::oid as oid union select relid from pg_partition_tree($1::int8::oid::regclass)),
         looked_at as (
             select a.attrelid, a.attnum, a.atttypid, a.attname = any($2) as is_value
             from pg_attribute a join tree on tree.oid = a.attrelid
             where a.attnum > 0 and not a.attisdropped and (a.attname = any($2) or a.attgenerated <> ''))
         select exists (
             select from looked_at l join pg_constraint k on k.conrelid = l.attrelid and k.contype = 'c' and l.attnum = any(k.conkey))
           or exists (
             with recursive domains as (
                 select l.atttypid as oid from looked_at l where l.is_value
                 union select d.typbasetype from domains x join pg_type d on d.oid = x.oid and d.typtype = 'd')
             select from domains d join pg_constraint k on k.contypid = d.oid and k.contype = 'c')",
    )
    .bind(oid)
    .bind(columns)
    .fetch_one(connection)
    .await
}

/// The triggers that run before a row is written, each with its table: of the table and of its partitions.
pub(super) async fn triggers(
    connection: &mut PgConnection,
    oid: i64,
    (inserts, updates, deletes): (bool, bool, bool),
) -> Result<Vec<(String, String)>, sqlx::Error> {
    // The bits of pg_trigger.tgtype.
    let events: i32 = if inserts { 4 } else { 0 } | if deletes { 8 } else { 0 } | if updates { 16 } else { 0 };
    sqlx::query_as(
        "select quote_ident(g.tgname), format('%I.%I', n.nspname, t.relname)
         from pg_trigger g join pg_class t on t.oid = g.tgrelid join pg_namespace n on n.oid = t.relnamespace
         where t.oid in (select $1::int8::oid union select relid from pg_partition_tree($1::int8::oid::regclass))
           and not g.tgisinternal and g.tgparentid = 0 and g.tgenabled in ('O', 'A') and g.tgtype & 3 = 3 and g.tgtype & $2 <> 0
         order by 2, 1",
    )
    .bind(oid)
    .bind(events)
    .fetch_all(connection)
    .await
}
