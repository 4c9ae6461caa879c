//! Tests against real servers: each has its own Valkey and its own database, and waits for signals, never for time.

use tidegate_lab::{admin, harness, proxy, sink};

mod crash;
mod entries;
mod exclusive;
mod failover;
mod health;
mod memory;
mod metrics;
mod otlp;
mod outage;
mod permissions;
mod poison;
mod pooler;
mod probe;
mod producing;
mod real_parts;
mod reclaim;
mod reload;
mod replay;
mod repository;
mod security;
mod shards;
mod tables;
mod telemetry;
mod trimming;
mod turn;
mod upgrade;
mod verbs;
