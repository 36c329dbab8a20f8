//! A kube-proxy replacement: watches Services and EndpointSlices, compiles them into kernel state, and then only
//! reconciles. Every packet is forwarded by the kernel.
//!
//! Data flows one way: [`sources`] → [`model`] → [`compile`] → [`state`] → [`plan`] → [`backends`] → kernel.

pub mod backends;
pub mod cli;
pub mod compile;
pub mod config;
pub mod daemon;
pub mod debug;
pub mod events;
pub mod health;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod sources;
pub mod state;
pub mod sync;
