//! What the writer of the socket layer's maps needs of them: implemented by the kernel's maps and by a simulation that
//! checks the invariants of the update order after each write.

use proxy_ebpf::{
    abi::{
        Addr, FrontendKey, FrontendValue, Member, MemberWord, Name, Policy, Service, SetWord, Slot,
    },
    lb::Scope,
};

use crate::backends::Error;

/// Service of a free member that no program has ever seen, whatever its generation: in a new map whose generations begin
/// behind those that sockets may still name.
pub const UNSEEN: u32 = u32::MAX;

/// Entries per map: what there is, or what is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// SERVICES, NAMES and STATS.
    pub services: u32,
    /// SLOTS.
    pub slots: u32,
    /// MEMBERS.
    pub members: u32,
    /// FRONTENDS.
    pub frontends: u32,
    /// VIPS.
    pub vips: u32,
    /// LOCAL_ADDRS.
    pub addresses: u32,
}

/// The maps FRONTENDS, VIPS, LOCAL_ADDRS, SERVICES, NAMES, SLOTS and MEMBERS.
///
/// Writes to arrays go through a mapping and cannot fail; an index at or beyond [`Store::capacity`] is a bug and panics.
/// The words of [`Store::commit_set`], [`Store::commit_policy`] and [`Store::commit_member`] are stored with release order.
pub trait Store {
    /// Entries that fit now.
    fn capacity(&self) -> Capacity;

    /// Makes room for `need`, keeping every entry and index: the generation swap. Does nothing where there is room. Whoever
    /// asks has added what it wants beside today's entries: maps need not be larger than this.
    ///
    /// # Errors
    /// The kernel refuses (ENOMEM); everything is as it was.
    fn reserve(&mut self, need: &Capacity) -> Result<(), Error>;

    /// Says that the maps hold a complete state: from now on the programs use them.
    ///
    /// # Errors
    /// A hook could not be attached or moved; those before it are.
    fn publish(&mut self) -> Result<(), Error>;

    /// SERVICES at `index`.
    fn service(&self, index: u32) -> Service;
    /// NAMES at `index`.
    fn name(&self, index: u32) -> Name;
    /// SLOTS at `index`.
    fn slot(&self, index: u32) -> Slot;
    /// MEMBERS at `index`.
    fn member(&self, index: u32) -> Member;

    /// Writes a whole entry of SERVICES; only while no frontend leads to it.
    fn write_service(&mut self, index: u32, service: &Service);
    /// Writes NAMES.
    fn write_name(&mut self, index: u32, name: &Name);
    /// Writes SLOTS from `base` on; only where no set word that a reader may hold leads.
    fn write_slots(&mut self, base: u32, slots: &[Slot]);
    /// Writes a whole entry of MEMBERS, its word last; only while the entry is free.
    fn write_member(&mut self, index: u32, member: &Member);
    /// The commit point of a backend set.
    fn commit_set(&mut self, service: u32, scope: Scope, word: SetWord);
    /// Affinity and policies; after both set words.
    fn commit_policy(&mut self, service: u32, policy: Policy);
    /// State bits and generation of a member.
    fn commit_member(&mut self, member: u32, word: MemberWord);

    /// All of FRONTENDS.
    ///
    /// # Errors
    /// The kernel could not be read.
    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, Error>;
    /// All of VIPS.
    ///
    /// # Errors
    /// The kernel could not be read.
    fn vips(&self) -> Result<Vec<Addr>, Error>;
    /// All of LOCAL_ADDRS.
    ///
    /// # Errors
    /// The kernel could not be read.
    fn addresses(&self) -> Result<Vec<(Addr, u32)>, Error>;

    /// Inserts or replaces.
    ///
    /// # Errors
    /// The kernel refused; those before it went in.
    fn upsert_frontends(&mut self, entries: &[(FrontendKey, FrontendValue)]) -> Result<(), Error>;
    /// Deletes; a missing entry is no error.
    ///
    /// # Errors
    /// The kernel refused; those before it are gone.
    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), Error>;
    /// As [`Store::upsert_frontends`].
    ///
    /// # Errors
    /// As there.
    fn upsert_vips(&mut self, vips: &[Addr]) -> Result<(), Error>;
    /// As [`Store::delete_frontends`].
    ///
    /// # Errors
    /// As there.
    fn delete_vips(&mut self, vips: &[Addr]) -> Result<(), Error>;
    /// As [`Store::upsert_frontends`].
    ///
    /// # Errors
    /// As there.
    fn upsert_addresses(&mut self, entries: &[(Addr, u32)]) -> Result<(), Error>;
    /// As [`Store::delete_frontends`].
    ///
    /// # Errors
    /// As there.
    fn delete_addresses(&mut self, addresses: &[Addr]) -> Result<(), Error>;

    /// Starts a grace period (the kernel's RCU, then one second) and returns its number; does not wait.
    fn start_grace(&mut self) -> u64;
    /// The highest number whose grace period, and that of all before it, is over.
    fn grace_over(&self) -> u64;
    /// Waits for a grace period: only when nothing free is left.
    fn wait_grace(&mut self, number: u64);
}
