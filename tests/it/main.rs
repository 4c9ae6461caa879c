//! Tests against real servers: each has its own Valkey and its own database, and waits for signals, never for time.

#![expect(unreachable_pub, reason = "everything here is for this one binary")]

mod crash;
mod entries;
mod failover;
mod harness;
mod outage;
mod permissions;
mod poison;
mod producing;
mod proxy;
mod replay;
mod repository;
mod security;
mod tables;
mod telemetry;
mod trimming;
mod verbs;
