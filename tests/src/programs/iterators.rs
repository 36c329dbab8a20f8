//! The iterators, read in the network namespace of the calling thread.

use std::io::Read as _;

use anyhow::{Context as _, ensure};
use proxy_agent::backends::ebpf::{links::Hook, sys, tables::hash};
use proxy_ebpf::abi::{Binding, Plain, SocketRecord};

use super::Programs;

impl Programs {
    /// Output of the iterators `list_tcp` and `list_udp` in the network namespace of the calling thread.
    pub fn list_sockets(&self) -> anyhow::Result<Vec<SocketRecord>> {
        let mut records = self.iterate(Hook::ListTcp)?;
        records.extend(self.iterate::<SocketRecord>(Hook::ListUdp)?);
        Ok(records)
    }

    /// Runs the iterator `kill_dead` in the network namespace of the calling thread.
    pub fn kill_dead(&self) -> anyhow::Result<()> {
        let records = self.iterate::<u64>(Hook::KillDead)?;
        ensure!(records.is_empty(), "{records:?}");
        Ok(())
    }

    /// Runs the iterator `bind_udp` in the network namespace of the calling thread, for these members.
    pub fn bind(&self, members: &[u32]) -> anyhow::Result<()> {
        let entry = |index: &u32| Binding::entry(*index, &self.tables.members.read(*index));
        let entries: Vec<_> = members.iter().map(entry).collect();
        hash(&self.fds, "BINDINGS")?.upsert(&entries)?;
        let records = self.iterate::<u64>(Hook::BindUdp)?;
        ensure!(records.is_empty(), "{records:?}");
        Ok(())
    }

    fn iterate<T: Plain>(&self, hook: Hook) -> anyhow::Result<Vec<T>> {
        let missing = || format!("{}: {:?}", hook.name(), self.loaded.left_out);
        let program = self.loaded.programs.get(&hook).with_context(missing)?;
        let link = sys::iter_link(program)?;
        let mut bytes = Vec::new();
        sys::iter_file(link)?.read_to_end(&mut bytes)?;
        let records = bytes.chunks_exact(size_of::<T>());
        ensure!(records.remainder().is_empty(), "{} bytes", bytes.len());
        Ok(records.map(sys::from_prefix).collect())
    }
}
