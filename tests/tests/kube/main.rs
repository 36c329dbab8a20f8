//! The agent and the real kube-proxy on one node: one after the other, and side by side.

mod beside;
mod cleanup;
mod cluster;
mod swap;
