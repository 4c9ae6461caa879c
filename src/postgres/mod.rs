//! Talking to PostgreSQL: a bounded number of connections, their sessions pinned down, their errors told apart.

mod connections;
mod endpoint;
#[cfg(feature = "daemon")]
mod place;
pub mod schema;
mod session;
#[cfg(feature = "daemon")]
mod shown;

pub use connections::Database;
pub use endpoint::{Endpoint, refusal};
#[cfg(feature = "daemon")]
pub use place::place;
pub use session::{Session, Transaction};
