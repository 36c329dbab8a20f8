//! The benches: both sides in one run, the ratio and its interval, a JSON report, and exit code 2 for a missed target.

pub mod cluster;
pub mod connect;
pub mod conntrack;
pub mod engine;
pub mod memory;
pub mod packets;
pub mod proxies;
pub mod report;
pub mod rules;
pub mod start;
pub mod update;
