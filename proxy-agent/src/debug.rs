//! Answers from the kernel's state: `dump`, `explain`, `check`, `plan`, `cleanup`. Only the last one changes anything.

use std::{collections::BTreeSet, io, net::IpAddr, path::Path, process::ExitCode, time::Duration};

use proxy_ebpf::{
    abi::{Addr, MemberWord},
    lb::Tables as _,
};

use crate::{
    backends::{
        self,
        ebpf::{
            links::{self, Hook},
            probe::{cgroup_root, probe},
            view::PinnedMaps,
        },
        iptables::host::{self, Host, affinity::AffinityRoom},
        own_addresses,
    },
    cli, daemon,
    sources::Origin,
};

pub mod check;
mod cleanup;
pub mod client;
pub mod contents;
pub mod desired;
pub mod dump;
pub mod explain;
#[cfg(test)]
mod fixture;
pub mod left;
pub mod packets;
pub mod plan;
pub mod print;
pub mod processes;
pub mod read;
pub mod rehearse;
pub mod routes;
pub mod rules;

pub use cleanup::{cleanup, cleanup_everything};
use client::{Client, Presence};
use contents::Contents;
use explain::Explanation;
use print::{Report, print, render};
use processes::Standing;
use routes::{Whereabouts, whereabouts};

/// Why a question could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's state cannot be read.
    #[error(transparent)]
    Kernel(#[from] backends::Error),
    /// A source cannot be read.
    #[error(transparent)]
    Source(#[from] daemon::Error),
    /// A source does not say what there is.
    #[error("the {origin} has not said within {patience:?} what there is{problems}")]
    Silent {
        /// Which one.
        origin: Origin,
        /// How long that was.
        patience: Duration,
        /// What it said.
        problems: String,
    },
    /// There are no pinned maps.
    #[error(
        "{0}; in --mode iptables there are none: `proxy-agent dump rules` prints what serves the node then"
    )]
    NoMaps(backends::Error),
    /// The client is unknown.
    #[error("{0}")]
    Client(String),
    /// Standard output.
    #[error("cannot write the answer")]
    Output(#[source] io::Error),
}

fn show(report: &impl Report, output: cli::Output) -> Result<(), Error> {
    print(&render(report, output)).map_err(Error::Output)
}

fn open_maps(global: &cli::Global) -> Result<PinnedMaps, Error> {
    PinnedMaps::open(&global.bpf_dir).map_err(|error| match error {
        backends::Error::Unusable(_) => Error::NoMaps(error),
        backends::Error::Kernel { ref cause, .. } if cause.kind() == io::ErrorKind::NotFound => {
            Error::NoMaps(error)
        }
        error => Error::Kernel(error),
    })
}

/// `dump`.
///
/// # Errors
/// There are no maps, or they or the rules cannot be read.
pub fn dump(global: &cli::Global, args: &cli::Dump) -> Result<ExitCode, Error> {
    let now_ns = monotonic_ns();
    let output = args.output;
    let open = || -> Result<(PinnedMaps, Contents), Error> {
        let maps = open_maps(global)?;
        let contents = read::read(&maps)?;
        Ok((maps, contents))
    };
    match args.what {
        cli::Table::Services => show(&dump::services(&open()?.1), output)?,
        cli::Table::Backends => show(&dump::backends(&open()?.1), output)?,
        cli::Table::Sockets => {
            let (maps, mut contents) = open()?;
            contents.sockets = read::sockets(&maps)?;
            contents.peers = maps.pins.peers()?;
            show(&dump::sockets(&contents, now_ns), output)?;
        }
        cli::Table::Affinity => show(&dump::affinity(&open()?.1, now_ns), output)?,
        cli::Table::Maps => show(&dump::maps(&open()?.1), output)?,
        cli::Table::Status => {
            let (maps, contents) = open()?;
            let hooks = maps
                .pins
                .hooks()?
                .into_iter()
                .map(|hook| (hook.hook, hook.program))
                .collect();
            show(&dump::status(&contents, hooks, now_ns), output)?;
        }
        cli::Table::Rules => show(&rules::read()?, output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `explain`.
///
/// # Errors
/// The maps or the rules cannot be read, or there is no such client.
pub fn explain(global: &cli::Global, args: &cli::Explain) -> Result<ExitCode, Error> {
    let maps = match open_maps(global) {
        Ok(maps) => Some(maps),
        Err(Error::NoMaps(_)) => None,
        Err(error) => return Err(error),
    };
    let (client, answer) = match &maps {
        Some(maps) => by_maps(global, maps, args)?,
        None => {
            let own: BTreeSet<IpAddr> = own_addresses().into_iter().flatten().collect();
            let cookie = daemon::namespaces::own_cookie().unwrap_or_default();
            let client = client::find(
                &args.client,
                cookie,
                |address| own.contains(&IpAddr::from(*address)),
                |address| whereabouts(address, &own),
                |_| Presence::Unseen,
            );
            let answer = Explanation::left("there is no socket layer on this node");
            (client.map_err(Error::Client)?, answer)
        }
    };
    let answer = match answer.layer {
        "packet" => match packets::follow(&client, args.destination) {
            Ok(followed) => answer.with(followed),
            Err(Error::Kernel(error)) if maps.is_some() => {
                answer.but(&format!("the rules cannot be read: {error}"))
            }
            Err(error) => return Err(error),
        },
        // Nobody's, but rules may drop what is sent there.
        "none" if answer.frontend.is_none() && !args.destination.address.ip().is_loopback() => {
            match packets::follow(&client, args.destination) {
                Ok(followed) if followed.verdict() != "pass" => Explanation {
                    layer: "packet",
                    ..answer.with(followed)
                },
                _ => answer,
            }
        }
        _ => answer,
    };
    show(&answer, args.output)?;
    Ok(ExitCode::SUCCESS)
}

/// What the socket layer makes of a client's connection.
fn by_maps(
    global: &cli::Global,
    maps: &PinnedMaps,
    args: &cli::Explain,
) -> Result<(Client, Explanation), Error> {
    let (mount, served) = (cgroup_root()?, daemon::place::cgroup(global)?);
    let excluded = maps.pins.opt_out()?;
    let own = own_addresses().into_iter().flatten().collect();
    let standing = |namespace: &Path| processes::standing(namespace, &mount, &served, &excluded);
    let client = client::find(
        &args.client,
        maps.meta().netns_cookie,
        |address| maps.node_address(address).is_some(),
        |address| of_endpoint(maps, address).unwrap_or_else(|| whereabouts(address, &own)),
        |namespace| match standing(namespace) {
            Standing::Elsewhere => Presence::Elsewhere,
            Standing::Unseen => Presence::Unseen,
            Standing::Served | Standing::Excluded | Standing::PartlyExcluded => Presence::Here,
        },
    );
    let client = client.map_err(Error::Client)?;
    let namespace = client.namespace.as_deref();
    let standing = namespace.map_or(Standing::Served, standing);
    let now_ns = monotonic_ns();
    let hooks: BTreeSet<_> = maps
        .pins
        .hooks()?
        .into_iter()
        .map(|hook| hook.hook)
        .collect();
    let is_attached = links::TRANSLATING
        .iter()
        .all(|hook| hooks.contains(hook.name()));
    let name = |index| contents::service_name(index, maps.name(index).as_ref());
    let mut answer = explain::explain(maps, name, &client, args.destination, now_ns);
    if let Some(why) = left::why(&maps.meta(), now_ns, is_attached, &client, standing) {
        let frontend = answer.frontend;
        answer = Explanation {
            frontend,
            ..Explanation::left(why)
        };
    } else if standing == Standing::PartlyExcluded {
        answer = answer.but("its processes in excluded cgroups are left to the packet layer");
    }
    Ok((client, answer))
}

/// Where an address is that endpoints have, if any has it.
fn of_endpoint(maps: &PinnedMaps, address: IpAddr) -> Option<Whereabouts> {
    let address = Addr::from(address);
    let members = (0..maps.capacity().members).filter_map(|index| maps.member(index));
    let mut bits = members
        .filter(|member| member.addr == address)
        .map(|member| member.word.bits())
        .filter(|bits| *bits != 0);
    let first = bits.next()?;
    let is_here = |bits| bits & MemberWord::ON_THIS_NODE != 0;
    Some(match is_here(first) || bits.any(is_here) {
        true => Whereabouts::Inside,
        false => Whereabouts::Outside,
    })
}

/// `check`.
///
/// # Errors
/// The answer cannot be written, or a source cannot be read.
pub fn check(global: &cli::Global, args: &cli::Check) -> Result<ExitCode, Error> {
    let mode = args.layers.mode();
    let probed = probe(&global.bpf_dir, global.cgroup.as_deref());
    let has_sockets = rehearse::has_sockets(mode, || probed.is_usable());
    let mut findings = check::node(&probed, mode != cli::Mode::Iptables);
    let choice = host::variant::choose();
    findings.extend(check::packets(&choice, !has_sockets));
    // Without root there is no namespace to try it in; that is told above.
    if let Ok(host) = Host::for_planning() {
        findings.push(check::affinity(AffinityRoom::of(host.features())));
        findings.extend(check::families(host.lacks()));
    }
    let mut maps = None;
    if mode != cli::Mode::Iptables {
        match PinnedMaps::open(&global.bpf_dir) {
            Ok(opened) => {
                findings.extend(check_maps(&opened)?);
                maps = Some(opened);
            }
            Err(error) => {
                let note = check::State::Note;
                findings.push(check::Finding::new("maps", note, error.to_string()));
            }
        }
    }
    if let Ok(origin) = daemon::place::origin(&args.sources) {
        match desired::read(global, &args.sources, &args.layers, &origin) {
            Ok(desired) => {
                findings.extend(check::sources(&desired));
                if has_sockets {
                    findings.push(check::drift(&rehearse::sockets(maps.as_ref(), &desired)?));
                }
                if choice.is_ok() {
                    let packets =
                        rehearse::packets(&args.sources, &args.layers, has_sockets, &desired)?;
                    findings.push(check::drift(&packets));
                }
            }
            // What was found of the node is worth printing all the same.
            Err(silent @ Error::Silent { .. }) => {
                let missing = check::State::Missing;
                findings.push(check::Finding::new("source", missing, silent.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    let findings = check::Findings(findings);
    show(&findings, args.output)?;
    Ok(match findings.worst() {
        check::State::Ok | check::State::Note => ExitCode::SUCCESS,
        check::State::Differs => ExitCode::from(cli::DIFFERENCES),
        check::State::Missing => ExitCode::from(cli::FAILURE),
    })
}

fn check_maps(maps: &PinnedMaps) -> Result<Vec<check::Finding>, Error> {
    let mut findings = check::maps(&maps.meta(), monotonic_ns());
    let needed = Hook::ALL.iter().filter(|hook| !hook.is_optional());
    let needed: Vec<_> = needed.map(|hook| hook.name()).collect();
    let attached = maps.pins.hooks()?.into_iter();
    let attached = attached.map(|hook| (hook.hook, hook.program)).collect();
    findings.push(check::hooks(&attached, &needed));
    Ok(findings)
}

/// `plan`.
///
/// # Errors
/// There is no source, or a source, the maps or the rules cannot be read.
pub fn plan(global: &cli::Global, args: &cli::Plan) -> Result<ExitCode, Error> {
    let origin = daemon::place::origin(&args.sources)?;
    let desired = desired::read(global, &args.sources, &args.layers, &origin)?;
    if !desired.is_complete {
        tracing::warn!(
            "until the source is mended, `run` adds what is missing and leaves the rest as it finds it"
        );
    }
    let is_usable = || probe(&global.bpf_dir, global.cgroup.as_deref()).is_usable();
    let has_sockets = rehearse::has_sockets(args.layers.mode(), is_usable);
    let mut changes = Vec::new();
    if has_sockets {
        let maps = match global.bpf_dir.exists() {
            true => Some(PinnedMaps::open(&global.bpf_dir)?),
            false => None,
        };
        changes.extend(rehearse::sockets(maps.as_ref(), &desired)?.changes);
    }
    match rehearse::packets(&args.sources, &args.layers, has_sockets, &desired) {
        Ok(packets) => changes.extend(packets.changes),
        // As `run` does without the tools.
        Err(Error::Kernel(error @ backends::Error::Unusable(_))) if has_sockets => {
            tracing::warn!(%error, "no packet layer");
        }
        Err(error) => return Err(error),
    }
    let changes = plan::Changes(changes);
    show(&changes, args.output)?;
    Ok(if changes.0.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(cli::DIFFERENCES)
    })
}

/// CLOCK_MONOTONIC, the clock of the programs.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has CLOCK_MONOTONIC");
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}
