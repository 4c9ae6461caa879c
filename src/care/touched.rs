//! Touched: rows that a trigger has noted are invalidated in the cache.
//!
//! Takes both servers; empties `tidegate.touched_rows`, a page at a time. The rows are invalidated before the page's deletion is committed, so a kill in
//! between invalidates them again and forgets none; several processes share the work, for each skips what another one has locked. It fails with what a
//! server says; then the rows wait.

use std::time::{Duration, Instant};

use sqlx::Row;
use tracing::info;

use crate::functions::{Call, Function};
use crate::postgres::Database;
use crate::retry::{Fault, Incident};
use crate::shutdown::Stop;
use crate::telemetry::contract::Metrics;
use crate::valkey::{self, Links};

/// The name of its connection.
const NAME: &str = "tidegate:touched";
/// Rows in one transaction.
const PAGE: i64 = 500;

/// What it is made of.
#[derive(Debug, Clone)]
pub struct Touched {
    /// Where Valkey is.
    pub valkey: valkey::Endpoint,
    /// PostgreSQL.
    pub database: Database,
    /// How often it looks.
    pub every: Duration,
    /// Where it counts.
    pub metrics: std::sync::Arc<Metrics>,
}

impl Touched {
    /// Invalidates until it is told to stop.
    pub async fn run(self, stop: Stop) {
        let mut incident = Incident::default();
        while !stop.is_asked() {
            let Err(fault) = self.session(&stop).await else { return };
            let response = incident.met(&fault, Instant::now());
            if incident.is_news(response.judgement.verdict, Instant::now()) {
                info!(%fault, advice = response.judgement.advice, "touched rows are not invalidated for now");
            }
            tokio::select! {
                () = tokio::time::sleep(response.wait) => {}
                () = stop.asked() => {}
            }
        }
    }

    async fn session(&self, stop: &Stop) -> Result<(), Fault> {
        // In a cluster each row is on the primary of its slot.
        let mut links = Links::to(&self.valkey, NAME);
        while !stop.is_asked() {
            if self.page(&mut links).await? < PAGE {
                tokio::select! {
                    () = tokio::time::sleep(self.every) => {}
                    () = stop.asked() => {}
                }
            }
        }
        Ok(())
    }

    /// Invalidates a page of rows; gives how many there were.
    async fn page(&self, links: &mut Links) -> Result<i64, Fault> {
        let mut refused = None;
        let exchange = async |session: &mut crate::postgres::Session| {
            let mut transaction = session.begin().await?;
            let rows = sqlx::query(
                "with page as (select n from tidegate.touched_rows order by n limit $1 for update skip locked)
                 delete from tidegate.touched_rows t using page where t.n = page.n returning t.cache, t.id",
            )
            .bind(PAGE)
            .fetch_all(&mut *transaction)
            .await?;
            for row in &rows {
                let (cache, id): (String, String) = (row.try_get(0)?, row.try_get(1)?);
                let row = format!("cache:{cache}:{{{id}}}");
                let call = Call::new(Function::Invalidate, [row.clone(), format!("tidegate:load:{cache}:{{{id}}}")]);
                let invalidated = match links.of_stream(&row).await {
                    Ok(link) => call.send_surely(link.commands()).await.map(drop),
                    Err(fault) => Err(fault),
                };
                if let Err(fault) = invalidated {
                    refused = Some(fault);
                    transaction.rollback().await?;
                    return Ok(0);
                }
            }
            transaction.commit().await?;
            Ok(rows.len() as i64)
        };
        let count = self.database.transact(exchange).await?;
        self.metrics.rows_invalidated(count.unsigned_abs());
        refused.map_or(Ok(count), Err)
    }
}
