//! What an agent in the other mode left in the kernel: taken away when this one serves every Service.

use crate::backends::{
    Error,
    ebpf::kernel::Left,
    iptables::{self, host::Host},
};

/// What may be left.
pub enum Former {
    /// Hooks of a socket layer, if its directory is there.
    Hooks(Option<Left>),
    /// Rules of a packet layer.
    Rules,
}

impl Former {
    /// Takes away what would go on translating.
    pub fn leave(self) {
        let left = match self {
            Self::Hooks(None) => return,
            Self::Hooks(Some(left)) => left.stop_translating(),
            Self::Rules => remove_rules(),
        };
        if let Err(error) = left {
            tracing::error!(
                error = format!("{error:#}"),
                "what the former mode left in the kernel stays; `cleanup` removes it"
            );
        }
    }
}

fn remove_rules() -> Result<(), Error> {
    // Without the tools nobody can have made any.
    let Ok(host) = Host::find() else {
        return Ok(());
    };
    let removed = iptables::remove_own(host)?;
    if removed > 0 {
        tracing::info!(
            chains = removed,
            "the rules of the packet layer are removed"
        );
    }
    Ok(())
}
