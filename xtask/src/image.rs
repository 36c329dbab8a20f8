//! The container image, without Docker: an OCI layout with the agent and the tools that it runs; and the images of the tests.
//!
//! Reproducible: the same binaries give the same bytes. The tools are this machine's, with the libraries that they load.

mod oci;
mod tree;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use tar::Archive;

use self::{
    oci::{Image, Layer},
    tree::{Entry, Tree, libraries},
};
use crate::{
    build::{self, Abi},
    needs::Purpose,
    process::Workspace,
    remedy,
};

/// Programs beside the agent: rules of both variants, address sets, and the link of a former ipvs mode.
const TOOLS: [&str; 4] = ["xtables-nft-multi", "xtables-legacy-multi", "ipset", "ip"];
/// Programs in the pods of the tests: a shell, a server, and clients.
const POD: [&str; 5] = ["dash", "busybox", "sleep", "curl", "dig"];
/// Mounted over, or filled at run time.
const MOUNTED: [&str; 6] = ["dev", "etc", "proc", "run", "sys", "tmp"];
const AGENT: &str = "/usr/local/bin/proxy-agent";

/// `cargo xtask image`: prints where the image is, its name, and its size.
///
/// # Errors
/// A tool is missing, or the image cannot be written.
pub fn run(workspace: &Workspace, name: Option<&str>) -> Result<()> {
    // The tools are those of the scenarios.
    remedy::ensure(workspace, &[Purpose::Build, Purpose::Scenarios])?;
    let agents = build::agents(workspace, &[Abi::Current], true)?;
    let agent = agents.first().context("no agent was built")?;
    let layers = vec![
        Layer::pack("tools", &tools()?, Compression::best())?,
        Layer::pack("agent", &own(agent), Compression::best())?,
    ];
    let default = default_name(env!("CARGO_PKG_VERSION"));
    let image = Image::new(name.unwrap_or(&default), &[AGENT], layers);
    let folder = workspace.target("image");
    let (layout, tar) = (folder.join("oci"), folder.join("proxy-agent.tar"));
    image.write_folder(&layout)?;
    image.write_tar(&tar)?;
    println!("{}\n{}\n{image}", layout.display(), tar.display());
    Ok(())
}

fn default_name(tag: &str) -> String {
    format!("localhost/proxy-agent:{tag}")
}

/// Unpacks what the image with this agent would hold, for tests; says where.
///
/// # Errors
/// A tool is missing, or the folder cannot be written.
pub fn unpack(workspace: &Workspace, agent: &Path) -> Result<PathBuf> {
    let folder = workspace.target("image/rootfs");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    for tree in [tools()?, own(agent)] {
        Archive::new(tree.pack()?.as_slice()).unpack(&folder)?;
    }
    Ok(folder)
}

/// Writes the images that a container runtime of the tests needs, as files for it to import; says in which folder they are.
///
/// They are the agents', the first by the name that `deploy/` has, one for pods, one for what holds a pod's namespaces, and
/// CoreDNS and kube-proxy out of the folder of Kubernetes' components.
///
/// # Errors
/// A program is missing, or the folder cannot be written.
pub fn for_tests(workspace: &Workspace, agents: &[PathBuf], components: &Path) -> Result<PathBuf> {
    let folder = workspace.target("image/tests");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let layer = |what, tree: &Tree| Layer::pack(what, tree, Compression::fast());
    let tools = layer("tools", &tools()?)?;
    let pod = layer("pod", &pod()?)?;
    let dns = layer("dns", &component(components, "coredns")?)?;
    let proxy = layer("proxy", &component(components, "kube-proxy")?)?;
    let others: [(&str, &[&str], Vec<Layer>); 4] = [
        (
            "localhost/proxy-tests/pod:1",
            &["/usr/sbin/dash"],
            vec![pod.clone()],
        ),
        (
            "localhost/proxy-tests/coredns:1",
            &["/usr/local/bin/coredns"],
            vec![dns],
        ),
        // As manifests call them, kubeadm's and those of our clean-up.
        (
            "registry.k8s.io/pause:3.10",
            &["/usr/sbin/sleep", "infinity"],
            vec![pod],
        ),
        (
            "registry.k8s.io/kube-proxy:v1.36.3",
            &["/usr/local/bin/kube-proxy"],
            vec![tools.clone(), proxy],
        ),
    ];
    let mut images = Vec::new();
    for (agent, tag) in agents.iter().zip([env!("CARGO_PKG_VERSION"), "next"]) {
        let layers = vec![tools.clone(), layer("agent", &own(agent))?];
        images.push(Image::new(&default_name(tag), &[AGENT], layers));
    }
    for (name, entrypoint, layers) in others {
        images.push(Image::new(name, entrypoint, layers));
    }
    for (number, image) in images.iter().enumerate() {
        image.write_tar(&folder.join(format!("{number}.tar")))?;
    }
    Ok(folder)
}

/// A component of Kubernetes and what it loads.
fn component(folder: &Path, name: &str) -> Result<Tree> {
    let binary = folder.join(name);
    let mut tree = Tree::default();
    tree.add_libraries(&BTreeSet::from([binary.clone()]))?;
    tree.add(&format!("usr/local/bin/{name}"), Entry::File(binary));
    Ok(tree)
}

/// What pods of the tests find.
fn pod() -> Result<Tree> {
    let mut tree = Tree::default();
    let binaries = tree.add_programs(&POD)?;
    tree.add_libraries(&binaries)?;
    tree.add("usr/bin/sh", Entry::Link("/usr/sbin/dash".into()));
    for folder in MOUNTED {
        tree.add(folder, Entry::Folder);
    }
    Ok(tree)
}

/// The agent under its own name and kube-proxy's, whose DaemonSet runs it.
fn own(agent: &Path) -> Tree {
    let mut tree = Tree::default();
    let agent = Entry::File(agent.to_owned());
    tree.add("usr/local/bin/proxy-agent", agent);
    let link = Entry::Link("proxy-agent".into());
    tree.add("usr/local/bin/kube-proxy", link);
    tree
}

/// The tools, their libraries and extensions, and the names that they go by.
fn tools() -> Result<Tree> {
    let mut tree = Tree::default();
    let mut binaries = tree.add_programs(&TOOLS)?;
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let mut link = |name: String, target: String| {
                tree.add(&format!("usr/sbin/{name}"), Entry::Link(target.into()));
            };
            for variant in ["nft", "legacy"] {
                let tool = format!("xtables-{variant}-multi");
                link(format!("{family}-{variant}{verb}"), tool);
            }
            // For who looks for it without a variant; the agent finds out which one the node uses.
            link(format!("{family}{verb}"), format!("{family}-nft{verb}"));
        }
    }
    for extension in extensions(&binaries)? {
        tree.add_in_place(&extension);
        binaries.insert(extension);
    }
    tree.add_libraries(&binaries)?;
    for folder in MOUNTED.iter().chain(&["var/lib/kube-proxy"]) {
        tree.add(folder, Entry::Folder);
    }
    Ok(tree)
}

/// The matches and targets of iptables, which it loads by name.
fn extensions(binaries: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    let libraries = libraries(binaries)?;
    let folders = libraries.iter().filter_map(|library| library.parent());
    let folders: BTreeSet<PathBuf> = folders.map(|folder| folder.join("xtables")).collect();
    let mut found = BTreeSet::new();
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            // Some are links to others, and keep their names.
            if path.extension().is_some_and(|end| end == "so") {
                found.insert(path);
            }
        }
    }
    ensure!(
        !found.is_empty(),
        "iptables has no extensions in {folders:?}: is it complete?"
    );
    Ok(found)
}
