//! Stub.
#![allow(missing_docs)]
use std::time::Duration;
use secrecy::SecretString;
use crate::pipeline::Pipeline;
pub struct Config { pub valkey: Valkey, pub postgres: Postgres, pub run: Run, pub batch: Batch, pub reclaim: Reclaim, pub trim: Trim, pub compact: Compact, pub stop: StopConfig, pub pipelines: Vec<Pipeline> }
pub struct Valkey { pub url: SecretString, pub source: String }
pub struct Postgres { pub url: SecretString }
pub struct Run { pub workers: usize }
pub struct Batch { pub max_entries: usize, pub max_bytes: usize, pub read_count: usize, pub max_entry_bytes: usize }
pub struct Reclaim { pub dead_after: Duration, pub sweep_every: Duration, pub max_deliveries: u32 }
pub struct Trim { pub retention: Duration, pub every: Duration }
pub struct Compact { pub margin: Duration, pub every: Duration }
pub struct StopConfig { pub grace: Duration }
impl Valkey { pub fn address(&self) -> crate::valkey::Address { crate::valkey::Address { url: self.url.clone(), connect_timeout: Duration::from_secs(5), command_timeout: Duration::from_secs(5) } } }
impl Postgres { pub fn address(&self) -> crate::postgres::Address { crate::postgres::Address { url: self.url.clone(), connect_timeout: Duration::from_secs(5), statement_timeout: Duration::from_secs(10), lock_timeout: Duration::from_secs(5), idle_in_transaction_timeout: Duration::from_secs(10) } } }
pub fn stub() -> Config {
  let e = |k: &str, d: &str| std::env::var(k).unwrap_or(d.into());
  let n = |k: &str, d: usize| e(k, &d.to_string()).parse().unwrap();
  Config { valkey: Valkey{ url: e("VALKEY_URL","").into(), source: "main".into() }, postgres: Postgres { url: e("DATABASE_URL","").into() },
    run: Run { workers: n("W", 2) }, batch: Batch { max_entries: n("BE", 20000), max_bytes: 8<<20, read_count: n("RC", 1000), max_entry_bytes: 1<<20 },
    reclaim: Reclaim { dead_after: Duration::from_millis(n("DA", 1000) as u64), sweep_every: Duration::from_millis(500), max_deliveries: 8 },
    trim: Trim { retention: Duration::from_millis(n("RET", 3600_000) as u64), every: Duration::from_secs(1) }, compact: Compact { margin: Duration::from_millis(n("CM", 3600_000) as u64), every: Duration::from_secs(2) }, stop: StopConfig { grace: Duration::from_secs(25) }, pipelines: vec![Pipeline::counters()] }
}
