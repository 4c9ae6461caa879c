//! Tests against real servers: each has its own Valkey and its own database, and waits for signals, never for time.

use tidegate_lab::{harness, proxy};

mod audit;
mod contract;
mod crash;
mod dead;
mod doctor;
mod entries;
mod exclusive;
mod failover;
mod looking;
mod measuring;
mod memory;
mod migrate;
mod outage;
mod pausing;
mod permissions;
mod poison;
mod pooler;
mod producing;
mod reclaim;
mod replay;
mod repository;
mod running;
mod security;
mod settings;
mod shards;
mod status;
mod tables;
mod telemetry;
mod top;
mod trimming;
mod turn;
mod walkthrough;
