//! A program of somebody else on a cgroup: it refuses what goes to one address, or sends it to another.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::Path,
};

use anyhow::{Context, bail, ensure};
use proxy_agent::backends::ebpf::{
    links::{Hook, Place},
    sys::{self, ProgSpec},
};

/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR` (include/uapi/linux/bpf.h).
const SOCK_ADDR: u32 = 18;

/// Offsets in `struct bpf_sock_addr` (include/uapi/linux/bpf.h), whose addresses and ports are in network byte order.
mod offset {
    pub const USER_IP4: i16 = 4;
    pub const USER_IP6: i16 = 8;
    pub const USER_PORT: i16 = 24;
}

/// Opcodes (include/uapi/linux/bpf_common.h, bpf.h), all on 32 bits.
mod code {
    pub const LOAD: u8 = 0x61;
    pub const STORE: u8 = 0x63;
    pub const MOVE: u8 = 0xb4;
    pub const JUMP_NOT_EQUAL: u8 = 0x56;
    pub const EXIT: u8 = 0x95;
}

/// Context, verdict, and a register for everything else.
const CONTEXT: u8 = 1;
const VERDICT: u8 = 0;
const SCRATCH: u8 = 2;

/// What it does to whoever names the address.
#[derive(Clone, Copy, Debug)]
pub enum Meddling {
    /// The call ends with EPERM.
    Refuse,
    /// The call goes on with this address, of the same family, and the same port.
    Redirect(IpAddr),
}

/// An attached program; gone when dropped.
#[derive(Debug)]
pub struct Foreign {
    link: OwnedFd,
}

impl Foreign {
    /// Attaches one after all that are attached to `cgroup` already.
    ///
    /// # Errors
    /// `hook` is an iterator, or the kernel refuses.
    pub fn attach(
        cgroup: &Path,
        hook: Hook,
        at: SocketAddr,
        meddling: Meddling,
    ) -> anyhow::Result<Self> {
        let Place::Cgroup(place) = hook.place() else {
            bail!("{} is not attached to a cgroup", hook.name());
        };
        let mut consequence = Vec::new();
        match meddling {
            Meddling::Refuse => consequence.push(sys::insn(code::MOVE, VERDICT, 0)),
            Meddling::Redirect(to) => {
                ensure!(
                    to.is_ipv4() == at.is_ipv4(),
                    "{to} is of another family than {at}"
                );
                for (offset, word) in words(to) {
                    let mut store = sys::insn(code::STORE, CONTEXT, 0);
                    store.off = offset;
                    store.set_src_reg(SCRATCH);
                    consequence.extend([sys::insn(code::MOVE, SCRATCH, word), store]);
                }
            }
        }
        let mut conditions = words(at.ip());
        conditions.push((offset::USER_PORT, i32::from(at.port().to_be())));
        let mut insns = vec![sys::insn(code::MOVE, VERDICT, 1)];
        for (number, (offset, word)) in conditions.iter().enumerate() {
            let mut load = sys::insn(code::LOAD, SCRATCH, 0);
            load.off = *offset;
            load.set_src_reg(CONTEXT);
            let mut skip = sys::insn(code::JUMP_NOT_EQUAL, SCRATCH, *word);
            // Over the other conditions, of two instructions each, and over what is done when all of them hold.
            let others = conditions.len() - 1 - number;
            skip.off = i16::try_from(2 * others + consequence.len())?;
            insns.extend([load, skip]);
        }
        insns.append(&mut consequence);
        insns.push(sys::insn(code::EXIT, 0, 0));
        let spec = ProgSpec {
            name: "foreign",
            prog_type: SOCK_ADDR,
            attach_type: place,
            attach_btf_id: 0,
            insns: &insns,
            license: c"GPL",
            debug: None,
        };
        let program = sys::prog_load(&spec)
            .map_err(|(error, log)| anyhow::Error::from(error).context(log))
            .context("cannot load a foreign program")?;
        let cgroup = File::open(cgroup).with_context(|| format!("no {}", cgroup.display()))?;
        let link = sys::link_create(program, cgroup, place)
            .with_context(|| format!("cannot attach a foreign {}", hook.name()))?;
        Ok(Self { link })
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // The kernel would do it when the handle is closed, but later. It can fail only when the cgroup is gone.
        drop(sys::link_detach(&self.link));
    }
}

/// An address as the context holds it: offset and value of each word.
fn words(ip: IpAddr) -> Vec<(i16, i32)> {
    match ip {
        IpAddr::V4(v4) => vec![(offset::USER_IP4, i32::from_ne_bytes(v4.octets()))],
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            let (words, _) = octets.as_chunks::<4>();
            (offset::USER_IP6..)
                .step_by(4)
                .zip(words.iter().map(|word| i32::from_ne_bytes(*word)))
                .collect()
        }
    }
}
