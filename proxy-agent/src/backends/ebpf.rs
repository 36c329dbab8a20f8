//! The socket layer: Services as eBPF maps, translated at connect() and sendmsg().

pub mod kernel;
pub mod maps;
pub mod refused;
pub mod store;
pub mod sys;
pub mod tables;
pub mod view;
