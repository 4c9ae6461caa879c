//! Outline: a table's columns and what makes its rows unique, for making a pipeline from it.
//!
//! Takes a table's name; gives its [`Outline`]. Fails with what PostgreSQL says.

use sqlx::postgres::PgConnection;

use super::{Column, catalog, find_columns};
use crate::model::pipeline::Table;
use crate::model::target::Kind;

/// A table as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// Its columns, in their order.
    pub columns: Vec<OutlineColumn>,
    /// The columns of each unique index that an upsert may name; the primary key's first.
    pub unique: Vec<Vec<String>>,
}

/// A column as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlineColumn {
    /// Its name, without quotes.
    pub name: String,
    /// Its type, as SQL writes it.
    pub sql_type: String,
    /// How a field that feeds it is best read.
    pub kind: Kind,
    /// Whether PostgreSQL makes its value: generated, an identity, or a default that is another one in each row.
    pub is_made: bool,
    /// Whether it must not be null.
    pub refuses_null: bool,
    /// Whether it has a default.
    pub has_default: bool,
}

/// A table as it is; none if there is no such table or view.
pub async fn outline(connection: &mut PgConnection, table: &Table) -> Result<Option<Outline>, sqlx::Error> {
    let Some(relation) = catalog::relation(connection, table, false).await? else { return Ok(None) };
    let columns = find_columns(connection, relation.oid).await?;
    let mut indexes = catalog::indexes(connection, relation.oid).await?;
    indexes.retain(|index| {
        let is_plain = !index.is_partial && !index.columns.iter().any(String::is_empty);
        index.is_unique && index.is_valid && index.is_immediate && !index.compares_otherwise && is_plain
    });
    indexes.sort_by_key(|index| index.constraint.as_ref().is_none_or(|(_, kind)| kind != "p"));
    let unique = indexes.into_iter().map(|index| index.columns).collect();
    Ok(Some(Outline { columns: columns.iter().map(OutlineColumn::of).collect(), unique }))
}

impl OutlineColumn {
    fn of(column: &Column) -> OutlineColumn {
        let kind = match column.base.as_str() {
            "int2" | "int4" | "int8" => Kind::Bigint,
            "numeric" => Kind::Numeric(column.scale.and_then(|scale| u16::try_from(scale).ok())),
            "uuid" => Kind::Uuid,
            "date" => Kind::Date,
            "timestamptz" => Kind::Timestamptz,
            "bool" => Kind::Boolean,
            "bytea" => Kind::Bytea,
            "inet" => Kind::Inet,
            "jsonb" => Kind::Jsonb,
            // PostgreSQL reads a text as whatever the column is.
            _ => Kind::Text,
        };
        OutlineColumn {
            name: column.plain_name.clone(),
            sql_type: column.sql_type.clone(),
            kind,
            is_made: column.is_generated || column.is_identity || column.is_default_different,
            refuses_null: column.refuses_null(),
            has_default: column.has_default,
        }
    }
}
