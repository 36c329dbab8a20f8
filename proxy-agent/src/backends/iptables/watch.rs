//! Tells when somebody else changed our rules, without reading them: `iptables -F` leaves the chains, so a canary chain, as
//! kube-proxy has one, does not see it.
//!
//! For the nft variant the kernel tells of every change, by chain. Legacy tables are replaced whole and silently, so the
//! shape of ours is asked for again and again: where each hook begins, how many entries and bytes. A report means that the
//! tables have to be read and compared; a missed change is found by the layer's audit.

use std::io;

use super::tables::Table;
use crate::{backends::Error, state::Family};

mod legacy;
mod nft;
mod watched;

pub use watched::Watched;

/// Follows the tables of the network namespace in which it was opened.
#[derive(Debug)]
struct Watch {
    source: Source,
    /// Seen, and not yet told.
    changed: bool,
}

#[derive(Debug)]
enum Source {
    Nft(nft::Watch),
    Legacy(legacy::Watch),
}

impl Watch {
    /// Begins with what the tables are now. They have to be read after this, or a change in between goes unseen.
    ///
    /// # Errors
    /// The kernel lacks what the variant needs, or CAP_NET_ADMIN is missing.
    pub fn open(is_nft: bool) -> Result<Self, Error> {
        let source = match is_nft {
            true => nft::Watch::open().map(Source::Nft),
            false => legacy::Watch::open().map(Source::Legacy),
        };
        Ok(Self {
            source: source.map_err(|cause| failed("open", cause))?,
            changed: false,
        })
    }

    /// Whether somebody else may have changed rules of ours since this was asked last. Costs microseconds, so ask several
    /// times a second.
    ///
    /// # Errors
    /// The kernel did not answer. Then nobody knows: read the tables.
    pub fn has_changed(&mut self) -> Result<bool, Error> {
        self.look()?;
        Ok(std::mem::take(&mut self.changed))
    }

    /// Call it before a change of our own.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.look()?;
        if let Source::Nft(watch) = &mut self.source {
            watch.pause();
        }
        Ok(())
    }

    /// Call it after a change of our own to one table; `written` says whether the table took it.
    ///
    /// Somebody who changed another table meanwhile is seen; the same table only in the nft variant.
    ///
    /// # Errors
    /// The kernel did not answer.
    pub fn resume(&mut self, family: Family, table: Table, written: bool) -> Result<(), Error> {
        let by_others = match &mut self.source {
            Source::Nft(watch) => watch.resume(u32::from(written)),
            Source::Legacy(watch) => watch.resume(family, table),
        };
        self.changed |= by_others.map_err(|cause| failed("read", cause))?;
        Ok(())
    }

    fn look(&mut self) -> Result<(), Error> {
        let by_others = match &mut self.source {
            Source::Nft(watch) => watch.look(),
            Source::Legacy(watch) => watch.look(),
        };
        self.changed |= by_others.map_err(|cause| failed("read", cause))?;
        Ok(())
    }
}

fn failed(action: &'static str, cause: io::Error) -> Error {
    Error::Kernel {
        action,
        object: "what tells of changes of the rules".to_owned(),
        cause,
        hint: "",
    }
}

#[cfg(test)]
mod tests;
