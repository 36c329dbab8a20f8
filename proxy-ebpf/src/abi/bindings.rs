//! By what a socket finds its member again after a repair that could not keep the indices.

use super::{Addr, Be16, Member, Plain};

/// Key of BINDINGS: one endpoint of one service port, as a socket knows it whatever its index was. 24 bytes. Written by the
/// agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindingKey {
    /// The endpoint's address.
    pub addr: Addr,
    /// Index into SERVICES.
    pub service: u32,
    /// The endpoint's port.
    pub port: Be16,
    /// Zero.
    pub pad: u16,
}

impl BindingKey {
    /// The key of the endpoint `addr:port` of `service`.
    #[inline(always)]
    pub const fn new(service: u32, addr: Addr, port: Be16) -> Self {
        Self {
            addr,
            service,
            port,
            pad: 0,
        }
    }
}

/// Value of BINDINGS: its member. 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Index into MEMBERS.
    pub member: u32,
    /// The member's generation.
    pub generation: u32,
}

impl Binding {
    /// The entry of BINDINGS for the member at `index`.
    pub const fn entry(index: u32, member: &Member) -> (BindingKey, Self) {
        let binding = Self {
            member: index,
            generation: member.word.generation(),
        };
        let key = BindingKey::new(member.service, member.addr, member.port);
        (key, binding)
    }
}

plain! {
    BindingKey { addr: Addr, service: u32, port: Be16, pad: u16 } = 24;
    Binding { member: u32, generation: u32 } = 8;
}
