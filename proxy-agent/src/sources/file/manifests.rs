//! The state of a folder of manifests: which file holds which object, and what a new reading changes.
//!
//! Reads files, knows nothing of watching. A file that cannot be read or parsed keeps its last good content, an impossible
//! object its last good version. Of the same object in two files, that of the first path counts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    content::{self, Fault, Key, Parsed, Value},
    walk::{self, Stamp},
};
use crate::{
    model::{Effect, NodeName, Objects},
    sources::Problem,
};

/// A folder of manifests as it was read last.
#[derive(Debug)]
pub struct Manifests {
    root: PathBuf,
    here: NodeName,
    files: BTreeMap<Arc<Path>, File>,
    /// The files that hold an object, sorted.
    holders: HashMap<Key, Vec<Arc<Path>>>,
    /// Objects in more than one file.
    contested: BTreeSet<Key>,
    /// What is wrong in a file.
    faults: BTreeMap<Arc<Path>, Vec<Fault>>,
    /// What could not be listed.
    unlisted: Vec<Problem>,
    complete: bool,
}

/// One file.
#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    /// Sorted; the last good version of each object.
    objects: Box<[(Key, Value)]>,
    /// Something in it may have a version in the kernel that we do not know.
    is_unknown: bool,
}

impl File {
    fn value(&self, key: &Key) -> Option<&Value> {
        let at = self.objects.binary_search_by(|(other, _)| other.cmp(key));
        at.ok().map(|at| &self.objects[at].1)
    }
}

/// The versions of objects before a change, by key.
type Before = BTreeMap<Key, Option<Value>>;

impl Manifests {
    /// A folder, not read yet.
    pub fn new(root: &Path, here: NodeName) -> Self {
        Self {
            root: root.to_owned(),
            here,
            files: BTreeMap::new(),
            holders: HashMap::new(),
            contested: BTreeSet::new(),
            faults: BTreeMap::new(),
            unlisted: Vec::new(),
            complete: false,
        }
    }

    /// Reads the whole folder, leaving alone what did not change and what is in `writing`. Calls `enter` with each folder
    /// before listing it.
    ///
    /// # Errors
    /// The folder itself cannot be listed; nothing changed.
    pub fn scan(
        &mut self,
        writing: &BTreeSet<PathBuf>,
        enter: &mut dyn FnMut(&Path),
    ) -> io::Result<Objects> {
        let found = walk::walk(&self.root, enter)?;
        let mut before = Before::new();
        let is_hidden = |path: &Path| found.unlisted.iter().any(|(dir, _)| path.starts_with(dir));
        let gone = self
            .files
            .keys()
            .filter(|path| !found.files.contains_key(&***path));
        let gone: Vec<_> = gone.filter(|path| !is_hidden(path)).cloned().collect();
        for path in gone {
            self.remove(&path, &mut before);
        }
        for (path, stamp) in &found.files {
            let known = self.files.get(&**path).and_then(|file| file.stamp);
            if known != Some(*stamp) && !writing.contains(path) {
                self.read(path, &mut before);
            }
        }
        let unlisted = found.unlisted.into_iter();
        self.unlisted = unlisted
            .map(|(path, error)| Problem {
                place: path.display().to_string(),
                line: None,
                what: format!(
                    "cannot be listed: {error}; its files' last good content stays in use"
                ),
            })
            .collect();
        Ok(self.changes(before))
    }

    /// Reads these files again, or finds them gone.
    pub fn reload<'a>(&mut self, paths: impl IntoIterator<Item = &'a PathBuf>) -> Objects {
        let mut before = Before::new();
        for path in paths {
            self.read(path, &mut before);
        }
        self.changes(before)
    }

    /// Number of files that hold manifests.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// All that is wrong now, sorted.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = self.unlisted.clone();
        for (path, faults) in &self.faults {
            found.extend(faults.iter().map(|Fault { line, what }| Problem {
                place: path.display().to_string(),
                line: *line,
                what: what.clone(),
            }));
        }
        for key in &self.contested {
            let Some((first, others)) = self.holders.get(key).and_then(|paths| paths.split_first())
            else {
                continue;
            };
            found.extend(others.iter().map(|path| Problem {
                place: path.display().to_string(),
                line: None,
                what: format!(
                    "{key} is in {} too, which comes first; this one is ignored",
                    first.display()
                ),
            }));
        }
        found.sort();
        found
    }

    fn read(&mut self, path: &Path, before: &mut Before) {
        let Some(format) = walk::format(path) else {
            return;
        };
        let (stamp, text) = match load(path) {
            Ok(loaded) => loaded,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.remove(path, before);
            }
            Err(error) => {
                // Without a stamp: the next scan tries again.
                let what =
                    format!("cannot read the file: {error}; its last good content stays in use");
                return self.keep(path, None, Fault { line: None, what });
            }
        };
        match content::parse(&text, format, &self.here) {
            Ok(parsed) => self.replace(path, stamp, parsed, before),
            Err(fault) => self.keep(path, Some(stamp), fault),
        }
    }

    /// A broken file keeps its last good content.
    fn keep(&mut self, path: &Path, stamp: Option<Stamp>, fault: Fault) {
        let file = self.files.entry(path.into()).or_insert_with(|| File {
            is_unknown: true,
            ..File::default()
        });
        file.stamp = stamp;
        self.faults.insert(path.into(), vec![fault]);
    }

    fn replace(&mut self, path: &Path, stamp: Stamp, parsed: Parsed, before: &mut Before) {
        let Parsed {
            objects,
            faults,
            has_nameless,
            others,
        } = parsed;
        for kind in others {
            tracing::debug!(path = %path.display(), kind, "object of a kind that is not used");
        }
        let old = self.files.remove(path).unwrap_or_default();
        let path: Arc<Path> = path.into();
        let mut is_unknown = has_nameless;
        let mut kept = Vec::with_capacity(objects.len());
        for (key, value) in objects {
            match value {
                Ok(value) => kept.push((key, value)),
                Err(effect) => match old.value(&key).cloned() {
                    Some(last_good) => kept.push((key, last_good)),
                    None => is_unknown |= effect == Effect::Refused,
                },
            }
        }
        // Every key is noted with the old file still among its holders.
        let file = File {
            stamp: Some(stamp),
            objects: kept.into(),
            is_unknown,
        };
        let gone: Vec<Key> = {
            let keys = old.objects.iter().map(|(key, _)| key);
            keys.filter(|key| file.value(key).is_none())
                .cloned()
                .collect()
        };
        let keys: Vec<Key> = file.objects.iter().map(|(key, _)| key.clone()).collect();
        self.files.insert(Arc::clone(&path), old);
        for key in gone.iter().chain(&keys) {
            self.note(key, before);
        }
        self.files.insert(Arc::clone(&path), file);
        if faults.is_empty() {
            self.faults.remove(&path);
        } else {
            self.faults.insert(Arc::clone(&path), faults);
        }
        for key in gone {
            self.drop_holder(&key, &path);
        }
        for key in keys {
            self.add_holder(key, &path);
        }
    }

    fn remove(&mut self, path: &Path, before: &mut Before) {
        let Some(keys) = self
            .files
            .get(path)
            .map(|file| file.objects.iter().map(|(key, _)| key.clone()))
        else {
            return;
        };
        let keys: Vec<Key> = keys.collect();
        for key in &keys {
            self.note(key, before);
        }
        self.files.remove(path);
        self.faults.remove(path);
        for key in keys {
            self.drop_holder(&key, path);
        }
    }

    /// Remembers the version that counted before the change.
    fn note(&self, key: &Key, before: &mut Before) {
        if let Entry::Vacant(entry) = before.entry(key.clone()) {
            entry.insert(self.value(key).cloned());
        }
    }

    /// The version that counts.
    fn value(&self, key: &Key) -> Option<&Value> {
        let first = self.holders.get(key)?.first()?;
        self.files.get(first)?.value(key)
    }

    fn add_holder(&mut self, key: Key, path: &Arc<Path>) {
        let paths = self.holders.entry(key.clone()).or_default();
        if let Err(at) = paths.binary_search(path) {
            paths.reserve_exact(1);
            paths.insert(at, Arc::clone(path));
        }
        if paths.len() > 1 {
            self.contested.insert(key);
        }
    }

    fn drop_holder(&mut self, key: &Key, path: &Path) {
        let Some(paths) = self.holders.get_mut(key) else {
            return;
        };
        paths.retain(|other| &**other != path);
        if paths.len() < 2 {
            self.contested.remove(key);
        }
        if paths.is_empty() {
            self.holders.remove(key);
        }
    }

    fn changes(&mut self, before: Before) -> Objects {
        // Once everything was known, a file that breaks keeps what we know of it.
        if !self.complete {
            let is_unknown = self.files.values().any(|file| file.is_unknown);
            self.complete = self.unlisted.is_empty() && !is_unknown;
        }
        let mut objects = Objects {
            complete: self.complete,
            ..Objects::default()
        };
        for (key, before) in before {
            let now = self.value(&key);
            if now == before.as_ref() {
                continue;
            }
            match key {
                Key::Service(name) => {
                    let service = now.and_then(Value::service);
                    objects.services.push((name, service));
                }
                Key::Slice(name) => {
                    let slice = now.and_then(Value::slice);
                    objects.slices.push((name, slice));
                }
                Key::Node => {
                    objects.node = Some(now.and_then(Value::node));
                }
                Key::ServiceCidr(name) => {
                    let cidr = now.and_then(Value::service_cidr);
                    objects.service_cidrs.push((name, cidr));
                }
            }
        }
        objects
    }
}

fn load(path: &Path) -> io::Result<(Stamp, String)> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let stamp = Stamp::of(&metadata);
    Ok((stamp, fs::read_to_string(path)?))
}

#[cfg(test)]
mod tests;
