//! Sockets after a repair that could not keep the indices: they name members by index, and are led to the new ones.
//!
//! Only a program can write the storage of other processes' sockets, and only an iterator sees all of them. It is pinned
//! for the reaper, which reads it in each network namespace and unpins it.

use proxy_ebpf::abi::{Binding, Member, MemberWord, meta_flags};

use super::{
    super::{
        dir::pin_over,
        links::Hook,
        load::Object,
        refused::refused,
        sys,
        tables::{Fds, handle, hash},
    },
    KernelStore,
};
use crate::backends::Error;

/// What is to be done next so that sockets find their members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Nothing: they do.
    Already,
    /// The reaper has to read [`Hook::BindUdp`] in each network namespace, and to unpin it.
    Asked,
    /// Wait for that.
    Waiting,
    /// They do from now on: those of dead members can be destroyed again.
    Done,
}

impl KernelStore {
    /// Leads sockets to their members where a repair lost the indices. To be called after a complete sync, and again until
    /// there is nothing left to do.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn bind_sockets(&mut self) -> Result<Bound, Error> {
        let is_bound = self
            .current
            .as_ref()
            .is_none_or(|current| current.tables.meta().flags & meta_flags::UNBOUND == 0);
        if is_bound {
            return Ok(Bound::Already);
        }
        if !self.binding {
            self.binding = self.pin_binder()?;
            if self.binding {
                return Ok(Bound::Asked);
            }
        }
        if self.dir.links()?.join(Hook::BindUdp.name()).exists() {
            return Ok(Bound::Waiting);
        }
        self.binding = false;
        if let Some(current) = &self.current {
            current.change_meta(|meta| meta.flags &= !meta_flags::UNBOUND);
        }
        tracing::info!("UDP sockets name their backends by the new indices");
        Ok(Bound::Done)
    }

    /// Pins the iterator over a table of today's members; false where this kernel cannot run it.
    fn pin_binder(&self) -> Result<bool, Error> {
        let Some(current) = &self.current else {
            return Ok(false);
        };
        let members = &current.tables.members;
        let serving = (0..members.len())
            .map(|index| (index, members.read::<Member>(index)))
            .filter(|(_, member)| member.word.bits() & MemberWord::SERVING != 0);
        let entries: Vec<_> = serving
            .map(|(index, member)| Binding::entry(index, &member))
            .collect();
        let object = Object::embedded(self.constants)?;
        let mut maps = Fds::new();
        for name in object.maps().keys() {
            let map = match (object.constants(name), name.as_str()) {
                (Some(bytes), _) => object.create_constants(name, bytes)?,
                (None, "BINDINGS") => object.create(name, entries.len().max(1) as u32)?,
                (None, _) => handle(&current.fds, name)?,
            };
            maps.insert(name.clone(), map);
        }
        hash(&maps, "BINDINGS")?.upsert(&entries)?;
        let loaded = object.load_some(&maps, &[Hook::BindUdp])?;
        let Some(program) = loaded.programs.get(&Hook::BindUdp) else {
            return Ok(false);
        };
        let link = sys::iter_link(program)
            .map_err(|error| refused("attach", format_args!("{}", Hook::BindUdp.name()), error))?;
        pin_over(&self.dir.links()?.join(Hook::BindUdp.name()), link)?;
        Ok(true)
    }
}
