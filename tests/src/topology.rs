//! A cluster made of network namespaces: nodes joined by VXLAN as flannel does it, pods behind a bridge on each.
//!
//! ```text
//!   pod web-1        pod web-2                          pod web-3
//!   eth0 10.244.1.2  eth0 10.244.1.3                    eth0 10.244.2.2
//!     |                |                                  |
//!   cni0 10.244.1.1 ---+  node a                        cni0 10.244.2.1   node b
//!   flannel.1 10.244.1.0 - - - - - VXLAN 1 - - - - - -  flannel.1 10.244.2.0
//!   eth0 192.168.77.11                                  eth0 192.168.77.12
//!     |                                                   |
//!     +------------ br0 192.168.77.1, switch -------------+   answers "unreachable" for all else
//! ```
//! The same in IPv6: fd00:10:244:X::/64 and fd00:192:168:77::/64.

mod links;
mod pod;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;

use crate::{
    janitor::{self, Janitor},
    names::{self, Suffix},
    peer::Peer,
    place::Place,
};

/// Address of the switch: what is there, all nodes reach.
pub const SWITCH: &str = "192.168.77.1";

/// A cluster; dropping it removes everything.
#[derive(Debug)]
pub struct Topology {
    name: String,
    suffix: Suffix,
    nodes: Vec<Node>,
    // Last: it kills what the others own.
    janitor: Janitor,
}

/// A node: a handle, cheap to clone.
#[derive(Clone, Debug)]
pub struct Node(Arc<NodeParts>);

#[derive(Debug)]
struct NodeParts {
    name: String,
    suffix: Suffix,
    number: u8,
    pods: Mutex<u8>,
    host: Host,
}

/// A pod: a handle, cheap to clone.
#[derive(Clone, Debug)]
pub struct Pod(Arc<PodParts>);

#[derive(Debug)]
struct PodParts {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    host: Host,
}

/// A place with at most one helper process.
#[derive(Debug)]
struct Host {
    place: Place,
    peer: Mutex<Option<Peer>>,
}

impl Host {
    fn peer(&self) -> anyhow::Result<Peer> {
        let mut peer = self.peer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = &*peer {
            return Ok(peer.clone());
        }
        Ok(peer.insert(Peer::start(&self.place)?).clone())
    }
}

impl Topology {
    /// An empty cluster; `name` is for messages. Removes what dead processes left first.
    ///
    /// # Errors
    /// No root, no cgroup v2, no iproute2.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        janitor::sweep()?;
        Self::with_suffix(name, Suffix::take()?)
    }

    /// One with a fixed name, which no sweep removes.
    ///
    /// # Errors
    /// As [`Topology::new`], or it exists.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        janitor::sweep()?;
        Self::with_suffix(name, Suffix::take_named(name)?)
    }

    fn with_suffix(name: &str, suffix: Suffix) -> anyhow::Result<Self> {
        let janitor = Janitor::start(&suffix)?;
        let topology = Self {
            name: name.to_owned(),
            suffix,
            nodes: Vec::new(),
            janitor,
        };
        names::ensure_bpffs()?;
        make_dir(&topology.suffix.cgroup()?)?;
        make_dir(&topology.suffix.bpf_dir())?;
        links::make_switch(&topology.suffix)?;
        Ok(topology)
    }

    /// Adds a node.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn node(&mut self, name: &str) -> anyhow::Result<Node> {
        let number = u8::try_from(self.nodes.len() + 1)?;
        let place = Place {
            name: name.to_owned(),
            netns: Path::new(names::NETNS_DIR).join(self.suffix.netns(name)),
            cgroup: self.suffix.cgroup()?.join(name).join("host"),
        };
        make_dir(&place.cgroup)?;
        make_dir(&self.suffix.bpf_dir().join(name))?;
        let node = Node(Arc::new(NodeParts {
            name: name.to_owned(),
            suffix: self.suffix.clone(),
            number,
            pods: Mutex::new(0),
            host: Host {
                place,
                peer: Mutex::default(),
            },
        }));
        links::make_node(&self.suffix, &node)?;
        for other in &self.nodes {
            links::join(&self.suffix, &node, other)?;
            links::join(&self.suffix, other, &node)?;
        }
        self.nodes.push(node.clone());
        Ok(node)
    }

    /// Adds a machine outside the cluster, 192.168.77.100. There is at most one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn outsider(&self) -> anyhow::Result<Pod> {
        let place = Place {
            name: "outsider".to_owned(),
            netns: Path::new(names::NETNS_DIR).join(self.suffix.netns("outsider")),
            cgroup: self.suffix.cgroup()?.join("outsider"),
        };
        make_dir(&place.cgroup)?;
        let outsider = Pod(Arc::new(PodParts {
            v4: Ipv4Addr::new(192, 168, 77, 100),
            v6: Ipv6Addr::new(0xfd00, 0x192, 0x168, 0x77, 0, 0, 0, hextet(100)),
            host: Host {
                place,
                peer: Mutex::default(),
            },
        }));
        links::make_outsider(&self.suffix, &outsider)?;
        Ok(outsider)
    }

    /// The switch, for servers that all nodes reach at [`SWITCH`].
    ///
    /// # Errors
    /// Its cgroup cannot be made.
    pub fn switch_place(&self) -> anyhow::Result<Place> {
        let place = Place {
            name: "switch".to_owned(),
            netns: Path::new(names::NETNS_DIR).join(self.suffix.netns("switch")),
            cgroup: self.suffix.cgroup()?.join("switch"),
        };
        make_dir(&place.cgroup)?;
        Ok(place)
    }

    /// Where logs, manifests and configuration go.
    pub fn state_dir(&self) -> PathBuf {
        self.suffix.state_dir()
    }

    /// What the names of its parts have in common.
    pub fn suffix(&self) -> &Suffix {
        &self.suffix
    }

    /// Leaves everything in place when dropped.
    pub fn keep(&mut self) {
        self.janitor.dismiss();
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                eprintln!(
                    "{}: {} was {}",
                    self.name,
                    node.name(),
                    node.place().nsenter()
                );
            }
        }
    }
}

impl Node {
    /// Its name: also the agent's `--node-name`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Where its host processes run.
    pub fn place(&self) -> &Place {
        &self.0.host.place
    }

    /// The helper process among its host processes.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn peer(&self) -> anyhow::Result<Peer> {
        self.0.host.peer()
    }

    /// The cgroup above all its processes: the agent's `--cgroup`.
    pub fn cgroup(&self) -> PathBuf {
        self.place()
            .cgroup
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default()
    }

    /// The agent's `--bpf-dir`: exists, with nothing in it.
    pub fn bpf_dir(&self) -> PathBuf {
        self.0.suffix.bpf_dir().join(self.name())
    }

    /// For logs and the like.
    pub fn state_dir(&self) -> PathBuf {
        self.0.suffix.state_dir()
    }

    /// Its address on the underlay.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 77, 10 + self.0.number)
    }

    /// Its address on the underlay.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(
            0xfd00,
            0x192,
            0x168,
            0x77,
            0,
            0,
            0,
            hextet(10 + self.0.number),
        )
    }

    /// Its address in one of both families.
    pub fn address(&self, v6: bool) -> IpAddr {
        if v6 {
            self.v6().into()
        } else {
            self.v4().into()
        }
    }

    /// The third byte of its pods' addresses.
    pub fn number(&self) -> u8 {
        self.0.number
    }

    /// What a command prints in its namespace.
    ///
    /// # Errors
    /// It cannot be run, or fails.
    pub fn output(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = self.place().command(program)?.args(args).output();
        let output = output.with_context(|| format!("cannot run {program}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{program} {args:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Adds a pod: the first gets address .2, the next .3.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pod(&self, name: &str) -> anyhow::Result<Pod> {
        let last = {
            let mut pods = self.0.pods.lock().unwrap_or_else(PoisonError::into_inner);
            *pods += 1;
            *pods + 1
        };
        let place = Place {
            name: name.to_owned(),
            netns: Path::new(names::NETNS_DIR)
                .join(self.0.suffix.netns(&format!("{}-{name}", self.name()))),
            cgroup: self.cgroup().join(format!("pod-{name}")),
        };
        make_dir(&place.cgroup)?;
        let number = self.0.number;
        let pod = Pod(Arc::new(PodParts {
            v4: Ipv4Addr::new(10, 244, number, last),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, hextet(number), 0, 0, 0, hextet(last)),
            host: Host {
                place,
                peer: Mutex::default(),
            },
        }));
        links::make_pod(self, &pod, last)?;
        Ok(pod)
    }

    /// A place of its own below this node's cgroup, in the node's namespace: `peer` processes that need another cgroup.
    ///
    /// # Errors
    /// The cgroup cannot be made.
    pub fn place_in(&self, cgroup: &str) -> anyhow::Result<Place> {
        let place = Place {
            cgroup: self.cgroup().join(cgroup),
            ..self.place().clone()
        };
        make_dir(&place.cgroup)?;
        Ok(place)
    }

    /// Runs `ip -batch` in its namespace.
    ///
    /// # Errors
    /// One of the lines failed.
    pub fn ip(&self, lines: &str) -> anyhow::Result<()> {
        links::batch("ip", &self.0.suffix.netns(self.name()), lines)
    }
}

/// `number` as it is written in decimal, for addresses that people read: 12 becomes `:12`.
fn hextet(number: u8) -> u16 {
    let number = u16::from(number);
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

fn make_dir(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}
