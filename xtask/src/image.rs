//! The container image, without Docker: an OCI layout with the agent and the tools that it runs.
//!
//! Reproducible: the same binaries give the same bytes. The tools are this machine's, with the libraries that they load.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Archive, Builder, EntryType, Header};

use crate::{
    build::{self, Abi},
    needs::Purpose,
    process::Workspace,
    remedy,
};

/// Programs beside the agent: rules of both variants, address sets, and the link of a former ipvs mode.
const TOOLS: [&str; 4] = ["xtables-nft-multi", "xtables-legacy-multi", "ipset", "ip"];
/// Where programs are looked for: not every PATH has the folders of the administrator.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is in the image.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Folder,
    /// A file of this machine; it runs, or is loaded.
    File(PathBuf),
    Link(PathBuf),
}

/// Entries by their paths, without the leading slash.
type Tree = BTreeMap<PathBuf, Entry>;

/// `cargo xtask image`: prints where the image is, its name, and its size.
///
/// # Errors
/// A tool is missing, or the image cannot be written.
pub fn run(workspace: &Workspace, name: Option<&str>) -> Result<()> {
    // The tools are those of the scenarios.
    remedy::ensure(workspace, &[Purpose::Build, Purpose::Scenarios])?;
    let agents = build::agents(workspace, &[Abi::Current], true)?;
    let agent = agents.first().context("no agent was built")?;
    let default = format!("localhost/proxy-agent:{}", env!("CARGO_PKG_VERSION"));
    let image = Image::build(agent, name.unwrap_or(&default))?;
    let folder = workspace.target("image");
    image.write(&folder)?;
    println!("{}", folder.join("oci").display());
    println!("{}", folder.join("proxy-agent.tar").display());
    println!("{} {}", image.name, image.manifest.digest);
    for layer in &image.layers {
        let (packed, whole) = (mebibytes(layer.blob.bytes.len()), mebibytes(layer.size));
        println!(
            "{:<6} {packed} MiB packed, {whole} MiB unpacked",
            layer.what
        );
    }
    Ok(())
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
        Archive::new(pack(&tree)?.as_slice()).unpack(&folder)?;
    }
    Ok(folder)
}

fn mebibytes(bytes: usize) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// A file of the layout, named by what is in it.
#[derive(Debug)]
struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let digest = digest(&bytes);
        Self { digest, bytes }
    }

    fn of(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn descriptor(&self, kind: &str) -> Value {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": self.digest,
            "size": self.bytes.len(),
        })
    }
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[derive(Debug)]
struct Layer {
    what: &'static str,
    blob: Blob,
    /// Of what is in it.
    diff_id: String,
    size: usize,
}

impl Layer {
    fn pack(what: &'static str, tree: &Tree) -> Result<Self> {
        let tar = pack(tree)?;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(&tar)?;
        Ok(Self {
            what,
            blob: Blob::new(gzip.finish()?),
            diff_id: digest(&tar),
            size: tar.len(),
        })
    }
}

#[derive(Debug)]
struct Image {
    name: String,
    layers: Vec<Layer>,
    config: Blob,
    manifest: Blob,
}

impl Image {
    fn build(agent: &Path, name: &str) -> Result<Self> {
        let layers = vec![
            Layer::pack("tools", &tools()?)?,
            Layer::pack("agent", &own(agent))?,
        ];
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = Blob::of(&json!({
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Entrypoint": ["/usr/local/bin/proxy-agent"],
                "Env": [format!("PATH={PATH}")],
                "Labels": {
                    "org.opencontainers.image.title": "proxy-agent",
                    "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }));
        let of_layers = layers.iter();
        let of_layers = of_layers.map(|layer| layer.blob.descriptor("layer.v1.tar+gzip"));
        let manifest = Blob::of(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor("config.v1+json"),
            "layers": of_layers.collect::<Vec<_>>(),
        }));
        Ok(Self {
            name: name.to_owned(),
            layers,
            config,
            manifest,
        })
    }

    /// As a folder, and as the one file that `ctr images import` and `podman load` read.
    fn write(&self, folder: &Path) -> Result<()> {
        let layout = folder.join("oci");
        if layout.exists() {
            fs::remove_dir_all(&layout)?;
        }
        let mut index = self.manifest.descriptor("manifest.v1+json");
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        index["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({"schemaVersion": 2, "manifests": [index]});
        let layers = self.layers.iter().map(|layer| &layer.blob);
        let blobs = layers.chain([&self.config, &self.manifest]);
        let blobs = blobs.map(|blob| {
            let path = format!("blobs/{}", blob.digest.replace(':', "/"));
            (path, blob.bytes.clone())
        });
        let mut files: BTreeMap<String, Vec<u8>> = blobs.collect();
        files.insert("index.json".to_owned(), index.to_string().into_bytes());
        let version = json!({"imageLayoutVersion": "1.0.0"});
        files.insert("oci-layout".to_owned(), version.to_string().into_bytes());
        let mut tar = Builder::new(Vec::new());
        for (path, bytes) in &files {
            let file = layout.join(path);
            let parent = file.parent().context("a file has a folder")?;
            fs::create_dir_all(parent)?;
            fs::write(&file, bytes)?;
            append(&mut tar, Path::new(path), 0o644, bytes)?;
        }
        let file = folder.join("proxy-agent.tar");
        fs::write(&file, tar.into_inner()?)
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The agent under its own name and kube-proxy's, whose DaemonSet runs it.
fn own(agent: &Path) -> Tree {
    let mut tree = Tree::new();
    let agent = Entry::File(agent.to_owned());
    add(&mut tree, "usr/local/bin/proxy-agent", agent);
    add(
        &mut tree,
        "usr/local/bin/kube-proxy",
        Entry::Link("proxy-agent".into()),
    );
    tree
}

/// The tools, their libraries and extensions, and the names that they go by.
fn tools() -> Result<Tree> {
    let mut tree = Tree::new();
    let mut binaries = BTreeSet::new();
    for name in TOOLS {
        let candidates = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
        let found = candidates.map(fs::canonicalize).find_map(Result::ok);
        let found = found.with_context(|| format!("no {name} in {}", FOLDERS.join(", ")))?;
        // By its usual path: what it leads to has a name of its own in some distributions.
        let file = Entry::File(found.clone());
        add(&mut tree, &format!("usr/sbin/{name}"), file);
        binaries.insert(found);
    }
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let mut link = |name: String, target: String| {
                add(
                    &mut tree,
                    &format!("usr/sbin/{name}"),
                    Entry::Link(target.into()),
                );
            };
            for variant in ["nft", "legacy"] {
                let tool = format!("xtables-{variant}-multi");
                link(format!("{family}-{variant}{verb}"), tool);
            }
            // For who looks for it without a variant; the agent finds out which one the node uses.
            link(format!("{family}{verb}"), format!("{family}-nft{verb}"));
        }
    }
    let extensions = extensions(&binaries)?;
    binaries.extend(extensions.iter().cloned());
    for library in extensions.iter().cloned().chain(libraries(&binaries)?) {
        let path = library.strip_prefix("/").unwrap_or(&library).to_owned();
        add(&mut tree, &path.display().to_string(), Entry::File(library));
    }
    // Where the distribution has merged them, programs and their loader say /lib.
    for name in ["bin", "sbin", "lib", "lib64"] {
        if let Ok(target) = fs::read_link(Path::new("/").join(name)) {
            add(&mut tree, name, Entry::Link(target));
        }
    }
    // Mounted over, or made at run time.
    for folder in [
        "dev",
        "etc",
        "proc",
        "run",
        "sys",
        "tmp",
        "var/lib/kube-proxy",
    ] {
        add(&mut tree, folder, Entry::Folder);
    }
    Ok(tree)
}

/// Adds an entry, and the folders that it is in.
fn add(tree: &mut Tree, path: &str, entry: Entry) {
    let path = PathBuf::from(path);
    let mut folders: Vec<_> = path.ancestors().skip(1).collect();
    // The root itself.
    folders.pop();
    for folder in folders {
        tree.entry(folder.to_owned()).or_insert(Entry::Folder);
    }
    tree.insert(path, entry);
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

/// Every library that these load at their start, by its path without links in its folders, and the loader.
fn libraries(binaries: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for binary in binaries {
        let output = Command::new("ldd")
            .arg(binary)
            .output()
            .context("cannot run ldd")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "ldd {}: {}",
            binary.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        for line in text.lines() {
            if line.contains("=> not found") {
                bail!("{}: {}", binary.display(), line.trim());
            }
            let words = line.split_whitespace();
            let Some(path) = words.into_iter().find(|word| word.starts_with('/')) else {
                continue;
            };
            let path = Path::new(path);
            let folder = path.parent().context("a library has a folder")?;
            let name = path.file_name().context("a library has a name")?;
            found.insert(fs::canonicalize(folder)?.join(name));
        }
    }
    Ok(found)
}

/// The tar of a tree: sorted, of root, from 1970.
fn pack(tree: &Tree) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for (path, entry) in tree {
        ensure!(
            path.components()
                .all(|part| matches!(part, Component::Normal(_))),
            "{} is no path inside the image",
            path.display()
        );
        match entry {
            Entry::Folder => {
                let mode = if path == Path::new("tmp") {
                    0o1777
                } else {
                    0o755
                };
                let mut header = header(EntryType::Directory, mode);
                tar.append_data(&mut header, path, std::io::empty())?;
            }
            Entry::Link(target) => {
                let mut header = header(EntryType::Symlink, 0o777);
                tar.append_link(&mut header, path, target)?;
            }
            Entry::File(from) => {
                let bytes =
                    fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
                append(&mut tar, path, 0o755, &bytes)?;
            }
        }
    }
    Ok(tar.into_inner()?)
}

fn append(tar: &mut Builder<Vec<u8>>, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, mode);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes)?;
    Ok(())
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_layer_and_others_another_one() {
        let folder = std::env::temp_dir().join(format!("image-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let agent = folder.join("agent");
        let layer = |text: &str| {
            fs::write(&agent, text).unwrap();
            Layer::pack("agent", &own(&agent)).unwrap()
        };
        let (first, again, other) = (layer("a"), layer("a"), layer("b"));
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(first.blob.digest, again.blob.digest);
        assert_ne!(first.diff_id, other.diff_id);
        assert_eq!(first.diff_id.len(), "sha256:".len() + 64);
    }

    #[test]
    fn entries_come_after_their_folders_and_links_are_kept() {
        let tree = own(Path::new("/agent"));
        let paths: Vec<_> = tree.keys().map(|path| path.display().to_string()).collect();
        assert_eq!(
            paths,
            [
                "usr",
                "usr/local",
                "usr/local/bin",
                "usr/local/bin/kube-proxy",
                "usr/local/bin/proxy-agent"
            ]
        );
        assert_eq!(
            tree[Path::new("usr/local/bin/kube-proxy")],
            Entry::Link("proxy-agent".into())
        );
        let outside = Tree::from([(PathBuf::from("../x"), Entry::Folder)]);
        assert!(pack(&outside).is_err());
    }
}
