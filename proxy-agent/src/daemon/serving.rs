//! The layers at work: which there are, and what each is started with.

use std::{collections::BTreeSet, path::PathBuf, process::ExitStatus, sync::Arc};

use tokio::sync::{oneshot, watch};

use super::{
    Error,
    exclude::Exclusions,
    feed::Feeds,
    layer::LayerThread,
    mode::{Layers, Opened},
    packet, programs_log,
    reaper::Reaper,
    servers, socket, start,
};
use crate::{
    backends::ebpf::kernel::Left,
    cli::{Global, Run},
    metrics::{Metrics, Voice},
};

/// What only a socket layer needs.
pub struct ForSockets {
    /// Ends sockets; none where no socket layer was asked for.
    pub reaper: Option<Reaper>,
    /// Pods that it shall leave alone, by their unique ids; none if nobody asks.
    pub opted_out: Option<watch::Receiver<BTreeSet<String>>>,
}

/// The layers at work, and what belongs to them.
pub struct Serving {
    /// One or two.
    pub layers: Vec<LayerThread>,
    /// With a socket layer: whose sockets it serves, and the end of the reaper.
    pub sockets: Option<(PathBuf, oneshot::Receiver<std::io::Result<ExitStatus>>)>,
    /// What a former mode left in the kernel: taken away after the first sync.
    pub former: Option<Left>,
}

impl Serving {
    /// Starts a thread for each layer.
    ///
    /// # Errors
    /// One cannot be started.
    pub fn start(
        global: &Global,
        args: &Run,
        Opened { layers, reason }: Opened,
        ForSockets { reaper, opted_out }: ForSockets,
        feeds: &mut Feeds,
        metrics: &Arc<Metrics>,
        give_way: watch::Sender<bool>,
    ) -> Result<Self, Error> {
        match layers {
            Layers::Packets(host, former) => {
                let counts = metrics.layer("packet", Voice::Node);
                let feed = feeds.add(&counts);
                let tools = packet::Tools::Found(host);
                let layer = packet::start(tools, args, feed, counts, metrics, give_way)?;
                servers::tell_mode("off", "iptables", reason, metrics);
                Ok(Self {
                    layers: vec![layer],
                    sockets: None,
                    former,
                })
            }
            Layers::Sockets(store, tools) => {
                if args.log_programs {
                    programs_log::start(global.bpf_dir.join("links")).map_err(start("a thread"))?;
                }
                let cgroup = store.cgroup().to_owned();
                let exclusions =
                    Exclusions::new(cgroup.clone(), &args.socket_exclude_cgroup, opted_out);
                let reaper = reaper.ok_or(Error::Reaper)?;
                let (requests, ended) = reaper.split().map_err(start("the reaper"))?;
                // The slower layer speaks.
                let voice = match tools {
                    Some(_) => Voice::Own,
                    None => Voice::Node,
                };
                let counts = metrics.layer("socket", voice);
                let feed = feeds.add(&counts);
                let packets = tools.map(|tools| {
                    let counts = metrics.layer("packet", Voice::Node);
                    let feed = feeds.add(&counts);
                    packet::start(tools, args, feed, counts, metrics, give_way)
                });
                let packets = packets.transpose()?;
                let terms = socket::Terms {
                    reason,
                    lease: args.socket_lease,
                    packets: packets.as_ref().map(LayerThread::status),
                };
                let layer =
                    socket::start(*store, feed, requests, exclusions, terms, counts, metrics);
                let layer = layer.map_err(start("the socket layer"))?;
                Ok(Self {
                    layers: [Some(layer), packets].into_iter().flatten().collect(),
                    sockets: Some((cgroup, ended)),
                    former: None,
                })
            }
        }
    }
}
