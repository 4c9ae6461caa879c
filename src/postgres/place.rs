//! Place: which PostgreSQL, and which of its databases, one is connected to.

use super::Database;

/// The same for everybody who is connected to one database, by whatever way; a standby that is promoted, or a copy of its files, keeps it.
const PLACE: &str = "select system_identifier || '/' || current_database() from pg_control_system()";

/// `system identifier/database`. None while it does not answer, and where the role may not ask.
pub async fn place(database: &Database) -> Option<String> {
    database.run(async |connection| sqlx::query_scalar(PLACE).fetch_one(connection).await).await.ok()
}
