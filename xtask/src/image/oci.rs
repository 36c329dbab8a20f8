//! Images as the Open Container Initiative lays them out (image-spec 1.0).

use std::{collections::BTreeMap, fmt, fs, io::Write, path::Path};

use anyhow::{Context, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::Builder;

use super::tree::{Tree, append};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A file of the layout, named by what is in it.
#[derive(Debug, Clone)]
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

/// A part of an image.
#[derive(Debug, Clone)]
pub struct Layer {
    what: &'static str,
    blob: Blob,
    /// Of what is in it.
    diff_id: String,
    /// Bytes, unpacked.
    size: usize,
}

impl Layer {
    /// Packs a tree; `what` is for people.
    ///
    /// # Errors
    /// A file of it cannot be read.
    pub fn pack(what: &'static str, tree: &Tree, compression: Compression) -> Result<Self> {
        let tar = tree.pack()?;
        let mut gzip = GzEncoder::new(Vec::new(), compression);
        gzip.write_all(&tar)?;
        Ok(Self {
            what,
            blob: Blob::new(gzip.finish()?),
            diff_id: digest(&tar),
            size: tar.len(),
        })
    }
}

/// A name, what runs, and the layers that it finds.
#[derive(Debug)]
pub struct Image {
    name: String,
    layers: Vec<Layer>,
    config: Blob,
    manifest: Blob,
}

impl Image {
    /// An image called `name`, with a tag, that runs `entrypoint`.
    pub fn new(name: &str, entrypoint: &[&str], layers: Vec<Layer>) -> Self {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let path = name.rsplit_once(':').map_or(name, |(path, _)| path);
        let title = path.rsplit('/').next();
        let config = Blob::of(&json!({
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Entrypoint": entrypoint,
                "Env": [format!("PATH={PATH}")],
                "Labels": {
                    "org.opencontainers.image.title": title,
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
        Self {
            name: name.to_owned(),
            layers,
            config,
            manifest,
        }
    }

    /// Writes the layout as a folder.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write_folder(&self, folder: &Path) -> Result<()> {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        for (path, bytes) in self.files() {
            let file = folder.join(path);
            let parent = file.parent().context("a file has a folder")?;
            fs::create_dir_all(parent)?;
            fs::write(&file, bytes)?;
        }
        Ok(())
    }

    /// Writes the layout as the one file that `ctr images import` and `podman load` read.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_tar(&self, file: &Path) -> Result<()> {
        let mut tar = Builder::new(Vec::new());
        for (path, bytes) in self.files() {
            append(&mut tar, Path::new(&path), 0o644, &bytes)?;
        }
        fs::write(file, tar.into_inner()?)
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// The files of the layout, by their paths.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
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
        files
    }
}

impl fmt::Display for Image {
    /// Its name and digest, and the sizes of its layers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, manifest, .. } = self;
        write!(f, "{name} {}", manifest.digest)?;
        for layer in &self.layers {
            let (packed, whole) = (mebibytes(layer.blob.bytes.len()), mebibytes(layer.size));
            let what = layer.what;
            write!(
                f,
                "\n{what:<6} {packed:.1} MiB packed, {whole:.1} MiB unpacked"
            )?;
        }
        Ok(())
    }
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tree::Entry;

    #[test]
    fn the_same_files_make_the_same_layer_and_others_another_one() {
        let folder = std::env::temp_dir().join(format!("image-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let agent = folder.join("agent");
        let layer = |text: &str| {
            fs::write(&agent, text).unwrap();
            let mut tree = Tree::default();
            tree.add("usr/bin/agent", Entry::File(agent.clone()));
            Layer::pack("agent", &tree, Compression::best()).unwrap()
        };
        let (first, again, other) = (layer("a"), layer("a"), layer("b"));
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(first.blob.digest, again.blob.digest);
        assert_ne!(first.diff_id, other.diff_id);
        assert_eq!(first.diff_id.len(), "sha256:".len() + 64);
    }
}
