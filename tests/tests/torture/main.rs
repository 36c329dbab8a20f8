//! Long runs under load, each bounded in time. Every server answers its own identity, and every answer is compared with
//! what was true at that moment: an answer of another Service, or of an endpoint that was removed a while ago, is a
//! failure like a connection that nobody answered.

mod churn;
mod connects;
mod growth;
mod outside;
mod stalls;
mod timeline;
mod udp;
