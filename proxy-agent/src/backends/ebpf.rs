//! The socket layer: Services as eBPF maps, translated at connect() and sendmsg().

pub mod store;
