//! Tests against real servers: each has its own Valkey and its own database, and waits for signals, never for time.

use tidegate_lab::{harness, proxy};

mod cluster;
mod crash;
mod entries;
mod exclusive;
mod failover;
mod memory;
mod outage;
mod permissions;
mod poison;
mod pooler;
mod producing;
mod reclaim;
mod replay;
mod repository;
mod security;
mod sentinel;
mod shards;
mod tables;
mod telemetry;
mod trimming;
mod turn;
mod verbs;
