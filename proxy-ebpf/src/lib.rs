//! What the kernel programs and the agent share: the layout of the maps ([`abi`]), the balancing decision ([`lb`]) and
//! what a socket remembers of it ([`peers`]).
//!
//! No dependencies and no allocation: the same code runs in the kernel, in unit tests and in `proxy-agent explain`.
#![no_std]

pub mod abi;
pub mod lb;
pub mod peers;
