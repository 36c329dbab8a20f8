//! What is in a layer: files of this machine under other paths, with the libraries that they load.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use tar::{Builder, EntryType, Header};

/// Where programs are looked for: not every PATH has the folders of the administrator.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// One path of an image.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// An empty one, or one that has entries of its own.
    Folder,
    /// A file of this machine; it runs, or is loaded.
    File(PathBuf),
    /// A symbolic link to this.
    Link(PathBuf),
}

/// Entries by their paths, without the leading slash.
#[derive(Debug, Default)]
pub struct Tree(BTreeMap<PathBuf, Entry>);

impl Tree {
    /// Adds an entry, and the folders that it is in.
    pub fn add(&mut self, path: &str, entry: Entry) {
        let path = PathBuf::from(path);
        let mut folders: Vec<_> = path.ancestors().skip(1).collect();
        // The root itself.
        folders.pop();
        for folder in folders {
            self.0.entry(folder.to_owned()).or_insert(Entry::Folder);
        }
        self.0.insert(path, entry);
    }

    /// Adds programs of this machine by their usual names, in `usr/sbin`; says where they are here.
    ///
    /// # Errors
    /// One is missing.
    pub fn add_programs(&mut self, names: &[&str]) -> Result<BTreeSet<PathBuf>> {
        let mut binaries = BTreeSet::new();
        for name in names {
            let candidates = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
            let found = candidates.map(fs::canonicalize).find_map(Result::ok);
            let found = found.with_context(|| format!("no {name} in {}", FOLDERS.join(", ")))?;
            // By its usual path: what it leads to has a name of its own in some distributions.
            self.add(&format!("usr/sbin/{name}"), Entry::File(found.clone()));
            binaries.insert(found);
        }
        Ok(binaries)
    }

    /// Adds what these load, and the names that their distribution gives its folders.
    ///
    /// # Errors
    /// A library is missing.
    pub fn add_libraries(&mut self, binaries: &BTreeSet<PathBuf>) -> Result<()> {
        for library in libraries(binaries)? {
            self.add_in_place(&library);
        }
        // Where the distribution has merged them, programs and their loader say /lib.
        for name in ["bin", "sbin", "lib", "lib64"] {
            if let Ok(target) = fs::read_link(Path::new("/").join(name)) {
                self.add(name, Entry::Link(target));
            }
        }
        Ok(())
    }

    /// Adds a file at its own path.
    pub fn add_in_place(&mut self, file: &Path) {
        let path = file.strip_prefix("/").unwrap_or(file);
        self.add(&path.display().to_string(), Entry::File(file.to_owned()));
    }

    /// Its tar: sorted, of root, from 1970.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn pack(&self) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
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
                    let bytes = fs::read(from)
                        .with_context(|| format!("cannot read {}", from.display()))?;
                    append(&mut tar, path, 0o755, &bytes)?;
                }
            }
        }
        Ok(tar.into_inner()?)
    }
}

/// Every library that these load at their start, by its path without links in its folders, and the loader.
pub fn libraries(binaries: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
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

pub fn append(tar: &mut Builder<Vec<u8>>, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
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
    fn entries_come_after_their_folders_and_links_are_kept() {
        let mut tree = Tree::default();
        let agent = Entry::File("/agent".into());
        tree.add("usr/bin/agent", agent);
        tree.add("usr/bin/kube-proxy", Entry::Link("agent".into()));
        let paths: Vec<_> = tree
            .0
            .keys()
            .map(|path| path.display().to_string())
            .collect();
        let expected = ["usr", "usr/bin", "usr/bin/agent", "usr/bin/kube-proxy"];
        assert_eq!(paths, expected);
        let link = &tree.0[Path::new("usr/bin/kube-proxy")];
        assert_eq!(link, &Entry::Link("agent".into()));
    }

    #[test]
    fn a_path_outside_the_image_is_refused() {
        let mut tree = Tree::default();
        tree.add("../x", Entry::Folder);
        assert!(tree.pack().is_err());
    }
}
