//! The agent with real components of Kubernetes: it follows an API server; it shares a node with kube-proxy, one after the
//! other and side by side; and it is a pod of real nodes.

mod access;
mod answers;
mod beside;
mod cleanup;
mod cluster;
mod config;
mod deploy;
mod differential;
mod events;
mod migration;
mod nodes;
mod pod;
mod service_cidrs;
mod source;
