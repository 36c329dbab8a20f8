//! Scenarios: a cluster of network namespaces, the real agent, real connections. Each body runs in IPv4 and IPv6.

mod affinity;
mod bad_ground;
mod cluster_ip;
mod external;
mod files;
mod flows;
mod guard;
mod health_checks;
mod invalid;
mod lease;
mod many_endpoints;
mod node_port;
mod opt_out;
mod outputs;
mod packets;
mod policies;
mod programs_log;
mod reaper;
mod restart;
mod rules;
mod self_test;
mod swap;
mod topology;
mod udp;
mod untranslated;
mod verdicts;
