//! Tests against real servers: each has its own Valkey and its own database, and waits for signals, never for time.

use tidegate_lab::{admin, harness, proxy, sink};

mod cache;
mod cluster;
mod crash;
mod entries;
mod exclusive;
mod failover;
mod functions;
mod health;
mod hydration;
mod load;
mod managed;
mod memory;
mod metrics;
mod near;
mod otlp;
mod outage;
mod permissions;
mod poison;
mod pooler;
mod producing;
mod real_parts;
mod reclaim;
mod reload;
mod replay;
mod repository;
mod security;
mod sentinel;
mod shards;
mod streams;
mod tables;
mod telemetry;
mod trimming;
mod turn;
mod verbs;
