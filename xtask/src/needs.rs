//! What a machine must have before the other commands work: what for, whether it is there, and what brings it.

use std::{fs, path::Path};

use crate::{
    arch,
    process::{self, Workspace},
    toolchain::Toolchain,
    tools,
};

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Compiling the eBPF programs and the agent.
    Build,
    /// Loading the programs: tests, demo and benches.
    Kernel,
    /// The real servers and clients of the demo and of the scenarios.
    Scenarios,
    /// The Kubernetes components that the scenarios run beside the agent.
    Kubernetes,
    /// Judging the code without running it.
    Lint,
    /// Type-checking for another processor.
    Arch,
}

/// One thing that a machine must have.
#[derive(Debug)]
pub struct Need {
    /// What it is called.
    pub name: &'static str,
    /// Who asks for it.
    pub purpose: Purpose,
    /// The end of a sentence that begins with the name.
    pub why: &'static str,
    /// How to see whether it is there.
    probe: Probe,
    /// What brings it.
    pub source: Source,
}

#[derive(Debug)]
enum Probe {
    /// A compiler of [`Toolchain::detect`].
    Compiler,
    /// A standard library for [`arch::OTHER`].
    Library,
    /// A program that answers `--version`.
    Version,
    /// A program in PATH.
    Program,
    /// [`tools::probe`].
    Tools,
    /// The text of a file under /proc, judged.
    File(&'static str, fn(&str) -> Result<String, String>),
}

/// What brings a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Debian's packages, or rustup.
    Compiler,
    /// Built from its source against LLVM's packages, or its published binary.
    Linker,
    /// Debian's package of the source, or rustup.
    Library,
    /// This Debian package.
    Package(&'static str),
    /// A line for the shell, of root.
    Root(&'static str),
    /// A line for the shell, of anybody.
    Shell(&'static str),
    /// Something that only its owner can do to a machine.
    Owner(&'static str),
}

impl Source {
    /// Whether Debian may have it as a package.
    pub fn may_be_packaged(self) -> bool {
        match self {
            Self::Compiler | Self::Linker | Self::Library | Self::Package(_) => true,
            Self::Root(_) | Self::Shell(_) | Self::Owner(_) => false,
        }
    }
}

/// Everything, in the order in which it is brought.
pub const NEEDS: &[Need] = &[
    Need {
        name: "eBPF compiler",
        purpose: Purpose::Build,
        why: "compiles the eBPF programs",
        probe: Probe::Compiler,
        source: Source::Compiler,
    },
    Need {
        name: "bpf-linker",
        purpose: Purpose::Build,
        why: "links the eBPF programs",
        probe: Probe::Version,
        source: Source::Linker,
    },
    Need {
        name: "root",
        purpose: Purpose::Kernel,
        why: "alone may load eBPF programs and make network namespaces",
        probe: Probe::File("/proc/self/status", root),
        source: Source::Owner(
            "run the same as root, for example: sudo -E env \"PATH=$PATH\" cargo xtask …",
        ),
    },
    Need {
        name: "kernel",
        purpose: Purpose::Kernel,
        why: "has what the socket layer aims at since 6.1",
        probe: Probe::File("/proc/sys/kernel/osrelease", kernel),
        source: Source::Owner("boot a newer kernel"),
    },
    Need {
        name: "BTF",
        purpose: Purpose::Kernel,
        why: "tells the programs where the kernel's structures have their fields",
        probe: Probe::File("/sys/kernel/btf/vmlinux", |_| {
            Ok("/sys/kernel/btf/vmlinux".into())
        }),
        source: Source::Owner("boot a kernel that was built with CONFIG_DEBUG_INFO_BTF=y"),
    },
    Need {
        name: "BPF JIT",
        purpose: Purpose::Kernel,
        why: "makes the programs several times faster",
        probe: Probe::File("/proc/sys/net/core/bpf_jit_enable", jit),
        source: Source::Root("sysctl -w net.core.bpf_jit_enable=1"),
    },
    Need {
        name: "cgroup v2",
        purpose: Purpose::Kernel,
        why: "is what the socket programs are attached to",
        probe: Probe::File("/proc/mounts", |mounts| mounted(mounts, "cgroup2", None)),
        source: Source::Root("mkdir -p /run/cgroup2 && mount -t cgroup2 cgroup2 /run/cgroup2"),
    },
    Need {
        name: "bpffs",
        purpose: Purpose::Kernel,
        why: "keeps maps and links while the agent is away",
        probe: Probe::File("/proc/mounts", |mounts| {
            mounted(mounts, "bpf", Some("/sys/fs/bpf"))
        }),
        source: Source::Root("mount -t bpf bpf /sys/fs/bpf"),
    },
    program(
        "ip",
        "makes network namespaces, links and routes",
        "iproute2",
    ),
    program("nsenter", "enters network namespaces", "util-linux"),
    program("curl", "is the HTTP client", "curl"),
    program("dig", "is the DNS client", "bind9-dnsutils"),
    program("dnsmasq", "is the DNS server", "dnsmasq-base"),
    program("busybox", "is the HTTP server", "busybox"),
    program(
        "iptables",
        "holds the rules of the packet layer",
        "iptables",
    ),
    program("ipset", "holds the clients of sessions", "ipset"),
    program("conntrack", "shows the kernel's connections", "conntrack"),
    program(
        "nft",
        "holds the rules of a kube-proxy in mode nftables",
        "nftables",
    ),
    Need {
        name: "Go",
        purpose: Purpose::Kubernetes,
        why: "builds the components of Kubernetes for the tests",
        probe: Probe::Tools,
        source: Source::Owner(
            "install Go 1.26 or newer (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a folder that holds them",
        ),
    },
    Need {
        name: "containerd",
        purpose: Purpose::Kubernetes,
        why: "runs the pods of the tests' real nodes",
        probe: Probe::Program,
        source: Source::Package("containerd"),
    },
    Need {
        name: "CNI plugins",
        purpose: Purpose::Kubernetes,
        why: "connect those pods to their node",
        probe: Probe::File("/usr/lib/cni/bridge", |_| Ok("/usr/lib/cni".into())),
        source: Source::Package("containernetworking-plugins"),
    },
    Need {
        name: "library source",
        purpose: Purpose::Arch,
        why: "makes the standard library to type-check for aarch64",
        probe: Probe::Library,
        source: Source::Library,
    },
    Need {
        name: "aarch64-linux-gnu-gcc",
        purpose: Purpose::Arch,
        why: "compiles what the TLS library has in C and assembler for aarch64",
        probe: Probe::Program,
        source: Source::Package("gcc-aarch64-linux-gnu"),
    },
    Need {
        name: "aarch64 C headers",
        purpose: Purpose::Arch,
        why: "belong to that compiler",
        probe: Probe::File("/usr/aarch64-linux-gnu/include/stdint.h", |_| {
            Ok("/usr/aarch64-linux-gnu/include".into())
        }),
        source: Source::Package("libc6-dev-arm64-cross"),
    },
    Need {
        name: "cargo-deny",
        purpose: Purpose::Lint,
        why: "checks the dependencies' licences and sources",
        probe: Probe::Version,
        source: Source::Shell("cargo install cargo-deny --version 0.20.2 --locked"),
    },
];

const fn program(name: &'static str, why: &'static str, package: &'static str) -> Need {
    Need {
        name,
        purpose: Purpose::Scenarios,
        why,
        probe: Probe::Program,
        source: Source::Package(package),
    }
}

impl Need {
    /// What was found, or what is wrong.
    pub fn probe(&self, workspace: &Workspace) -> Result<String, String> {
        match self.probe {
            Probe::Compiler => Toolchain::detect(workspace)
                .map(|found| found.to_string())
                .map_err(|e| e.to_string()),
            Probe::Library => arch::library(workspace),
            Probe::Version => process::answer(workspace.command(self.name).arg("--version"))
                .map(|version| version.trim().to_owned())
                .ok_or_else(|| "not in PATH, or it does not start".into()),
            Probe::Tools => tools::probe(workspace),
            Probe::Program => process::in_path(self.name)
                .map(|file| file.display().to_string())
                .ok_or_else(|| "not in PATH".into()),
            Probe::File(path, judge) => match fs::metadata(path) {
                // BTF is megabytes of binary, and being there is all that matters.
                Ok(_) if Path::new(path).starts_with("/sys") => judge(""),
                Ok(_) => judge(&fs::read_to_string(path).unwrap_or_default()),
                Err(error) => Err(format!("{path}: {error}")),
            },
        }
    }
}

/// The effective user, second number of the line `Uid:`.
fn root(status: &str) -> Result<String, String> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .unwrap_or_default();
    match line.split_whitespace().nth(1) {
        Some("0") => Ok("user 0".into()),
        Some(user) => Err(format!("this is user {user}")),
        None => Err("the user is not known".into()),
    }
}

fn kernel(release: &str) -> Result<String, String> {
    let mut numbers = release
        .trim()
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 1) => Ok(release.trim().into()),
        (_, _) => Err(format!(
            "this is {:?}, and 6.1 or newer is needed",
            release.trim()
        )),
    }
}

fn jit(setting: &str) -> Result<String, String> {
    match setting.trim() {
        "0" => Err("switched off".into()),
        setting => Ok(format!("bpf_jit_enable = {setting}")),
    }
}

/// Looks for a file system, anywhere or at `place`. Hybrid hierarchies have cgroup v2 beside v1, so no place is assumed.
fn mounted(mounts: &str, kind: &str, place: Option<&str>) -> Result<String, String> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find(|(at, found)| *found == kind && place.is_none_or(|place| place == *at))
        .map(|(at, _)| at.to_owned())
        .ok_or_else(|| match place {
            Some(place) => format!("not mounted at {place}"),
            None => "not mounted".into(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\n\
        cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn cgroup_v2_is_found_in_a_hybrid_hierarchy() {
        assert_eq!(
            mounted(HYBRID, "cgroup2", None),
            Ok("/sys/fs/cgroup/unified".into())
        );
    }

    #[test]
    fn bpffs_counts_only_at_its_usual_place() {
        let elsewhere = "bpf /run/bpf bpf rw 0 0\n";
        assert_eq!(
            mounted(elsewhere, "bpf", Some("/sys/fs/bpf")),
            Err("not mounted at /sys/fs/bpf".into())
        );
        let usual = "none /sys/fs/bpf bpf rw 0 0\n";
        assert_eq!(
            mounted(usual, "bpf", Some("/sys/fs/bpf")),
            Ok("/sys/fs/bpf".into())
        );
    }

    #[test]
    fn the_effective_user_decides_about_root() {
        assert!(root("Name:\txtask\nUid:\t1000\t0\t0\t0\n").is_ok());
        assert_eq!(
            root("Uid:\t0\t1000\t0\t0\n"),
            Err("this is user 1000".into())
        );
    }

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, new_enough) in [
            ("5.4.0-42-generic", false),
            ("6.1.0-18-amd64", true),
            ("6.18.44-fc-v657\n", true),
            ("5.19", false),
            ("", false),
        ] {
            assert_eq!(kernel(release).is_ok(), new_enough, "{release}");
        }
    }
}
