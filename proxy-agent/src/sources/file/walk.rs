//! Lists the manifests below a folder.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::content::Format;

/// Tells whether a file changed since it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Also moves with the permissions.
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What is below a folder.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    /// Folders that could not be listed, and what could not be looked at.
    pub(super) unlisted: Vec<(PathBuf, io::Error)>,
}

/// The manifests below `root`, links followed. What begins with a dot is left out: editors' files, and the folders behind
/// a ConfigMap volume, whose files are there a second time as links. Calls `enter` with each folder before listing it.
///
/// # Errors
/// `root` itself cannot be listed.
pub(super) fn walk(root: &Path, enter: &mut dyn FnMut(&Path)) -> io::Result<Found> {
    let mut found = Found::default();
    list(
        root,
        &mut vec![identity(&fs::metadata(root)?)],
        enter,
        &mut found,
    )?;
    Ok(found)
}

/// `above` holds the folders on the way here: a link to one of them would never end.
fn list(
    dir: &Path,
    above: &mut Vec<(u64, u64)>,
    enter: &mut dyn FnMut(&Path),
    found: &mut Found,
) -> io::Result<()> {
    enter(dir);
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if is_hidden(&path) {
            continue;
        }
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            // A file may go away meanwhile, and a link may lead nowhere.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                found.unlisted.push((path, error));
                continue;
            }
        };
        if metadata.is_dir() {
            let identity = identity(&metadata);
            if above.contains(&identity) {
                continue;
            }
            above.push(identity);
            if let Err(error) = list(&path, above, enter, found)
                && error.kind() != io::ErrorKind::NotFound
            {
                found.unlisted.push((path, error));
            }
            above.pop();
        } else if format(&path).is_some() {
            found.files.insert(path, Stamp::of(&metadata));
        }
    }
    Ok(())
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Whether `walk` would look at it.
pub(super) fn is_visible(path: &Path) -> bool {
    !is_hidden(path)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name()
        .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// How a manifest is encoded, by its name; nothing if it is none.
pub(super) fn format(path: &Path) -> Option<Format> {
    if is_hidden(path) {
        return None;
    }
    match path.extension()?.to_str()? {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}
