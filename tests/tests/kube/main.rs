//! The agent with real components of Kubernetes: it follows an API server; and it shares a node with kube-proxy, one after
//! the other and side by side.

mod answers;
mod beside;
mod cleanup;
mod cluster;
mod config;
mod deploy;
mod differential;
mod pod;
mod source;
mod swap;
