//! Maps as typed tables: arrays through their mapping, hashes through system calls.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use proxy_ebpf::abi::Plain;

use super::{refused::refused, sys};
use crate::backends::Error;

const WORD: usize = size_of::<u64>();

/// A BPF_F_MMAPABLE array, mapped. All access is by whole words, each atomic.
///
/// Values of another ABI may be longer or shorter than the type they are read as: they share their first bytes.
pub struct Array {
    fd: OwnedFd,
    base: NonNull<AtomicU64>,
    bytes: usize,
    words_per_entry: usize,
    entries: u32,
}

// SAFETY: the mapping belongs to this value alone, lives as long as it, and is accessed by atomics only.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

impl Array {
    /// Maps an array, for writing if `writable`.
    ///
    /// # Errors
    /// It is no mappable array, or the kernel refuses.
    pub fn new(fd: OwnedFd, writable: bool) -> io::Result<Self> {
        let info = sys::map_info(&fd)?;
        if info.map_flags & aya_obj::generated::BPF_F_MMAPABLE == 0 || info.max_entries == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // The kernel's layout: each value rounded up to eight bytes, one after the other (v5.5, fc9702273e2e).
        let words_per_entry = (info.value_size as usize).div_ceil(WORD);
        let bytes = words_per_entry * WORD * info.max_entries as usize;
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice; the kernel checks length and protection.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        let base = NonNull::new(base.cast())
            .filter(|base: &NonNull<AtomicU64>| base.as_ptr().cast() != libc::MAP_FAILED)
            .ok_or_else(io::Error::last_os_error)?;
        Ok(Self {
            fd,
            base,
            bytes,
            words_per_entry,
            entries: info.max_entries,
        })
    }

    /// Number of entries.
    pub fn len(&self) -> u32 {
        self.entries
    }

    /// Whether there is none; never so.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Bytes of the mapping.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn words(&self, index: u32) -> &[AtomicU64] {
        assert!(
            index < self.entries,
            "index {index} of an array of {} entries",
            self.entries
        );
        // SAFETY: the mapping holds `entries * words_per_entry` words and `index` is below `entries`; page-aligned, so
        // each word is aligned.
        unsafe {
            std::slice::from_raw_parts(
                self.base
                    .as_ptr()
                    .add(index as usize * self.words_per_entry),
                self.words_per_entry,
            )
        }
    }

    /// The entry at `index`; what the map's values lack is zero.
    pub fn read<T: Plain>(&self, index: u32) -> T {
        let mut bytes = [0_u8; 256];
        let words = self.words(index);
        let count = words.len().min(bytes.len() / WORD);
        for (word, into) in words.iter().zip(bytes.chunks_exact_mut(WORD)) {
            into.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        sys::from_prefix(&bytes[..count * WORD])
    }

    /// Writes the entry at `index`, the first word last and with release order.
    pub fn write<T: Plain>(&self, index: u32, value: &T) {
        let words = self.words(index);
        let bytes = sys::bytes_of(value);
        assert_eq!(
            bytes.len(),
            words.len() * WORD,
            "a map of another ABI is written"
        );
        for (word, from) in words.iter().zip(bytes.chunks_exact(WORD)).skip(1) {
            word.store(word_of(from), Ordering::Relaxed);
        }
        words[0].store(word_of(&bytes[..WORD]), Ordering::Release);
    }

    fn word(&self, index: u32, offset: usize) -> &AtomicU64 {
        &self.words(index)[offset / WORD]
    }

    /// Stores the word at byte `offset`, a multiple of eight, with release order.
    pub fn store_word(&self, index: u32, offset: usize, value: u64) {
        self.word(index, offset).store(value, Ordering::Release);
    }

    /// Adds to the counter at byte `offset`, which the programs add to at the same time.
    pub fn add(&self, index: u32, offset: usize, value: u64) {
        self.word(index, offset).fetch_add(value, Ordering::Relaxed);
    }

    /// Stores the half word at byte `offset`, a multiple of four, with release order. The agent is the only writer of
    /// such words.
    pub fn store_half(&self, index: u32, offset: usize, half: u32) {
        let word = self.word(index, offset);
        let mut bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        let at = offset % WORD;
        bytes[at..at + 4].copy_from_slice(&half.to_ne_bytes());
        word.store(u64::from_ne_bytes(bytes), Ordering::Release);
    }

    /// Entries that are not all zero.
    pub fn used(&self) -> u32 {
        let is_used = |index: &u32| {
            self.words(*index)
                .iter()
                .any(|word| word.load(Ordering::Relaxed) != 0)
        };
        (0..self.entries).filter(is_used).count() as u32
    }

    /// Copies every entry of `old` as far as both reach: entries and bytes.
    pub fn copy_from(&self, old: &Self) {
        for index in 0..self.entries.min(old.entries) {
            for (to, from) in self.words(index).iter().zip(old.words(index)) {
                let value = from.load(Ordering::Relaxed);
                // New maps are zero: pages of zeros need not be made.
                if value != 0 {
                    to.store(value, Ordering::Relaxed);
                }
            }
        }
        std::sync::atomic::fence(Ordering::Release);
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word.copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}

impl Drop for Array {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping; no reference into it can outlive the value.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl AsFd for Array {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Elements per batch: enough to make the system call cheap, small enough to stay in the cache.
const BATCH: usize = 4096;

/// A hash map.
pub struct Hash<K, V> {
    fd: OwnedFd,
    name: String,
    value_size: usize,
    types: PhantomData<(K, V)>,
}

impl<K: Plain, V: Plain> Hash<K, V> {
    /// Takes a map whose keys are `K`; values may be longer or shorter than `V`.
    ///
    /// # Errors
    /// Its keys have another size.
    pub fn new(fd: OwnedFd, name: &str) -> io::Result<Self> {
        let info = sys::map_info(&fd)?;
        if info.key_size as usize != size_of::<K>() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok(Self {
            fd,
            name: name.to_owned(),
            value_size: info.value_size as usize,
            types: PhantomData,
        })
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// The kernel could not be read.
    pub fn find(&self, key: &K) -> Result<Option<V>, Error> {
        let mut value = vec![0; self.value_size];
        let found = sys::map_lookup(&self.fd, sys::bytes_of(key), &mut value)
            .map_err(|error| self.refused("read", error))?;
        Ok(found.then(|| sys::from_prefix(&value)))
    }

    /// All entries, in no order.
    ///
    /// # Errors
    /// The kernel could not be read.
    pub fn entries(&self) -> Result<Vec<(K, V)>, Error> {
        match self.entries_batched() {
            Err(error) if is_unsupported(&error) => self.entries_one_by_one(),
            result => result,
        }
        .map_err(|error| self.refused("read", error))
    }

    fn entries_batched(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut batch = BATCH;
        let mut cursor = None;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        loop {
            keys.resize(batch * size_of::<K>(), 0);
            values.resize(batch * self.value_size, 0);
            let read =
                sys::map_lookup_batch(&self.fd, &mut cursor, &mut keys, &mut values, batch as u32);
            let (count, end) = match read {
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    batch *= 2;
                    continue;
                }
                other => other?,
            };
            let pairs = keys
                .chunks_exact(size_of::<K>())
                .zip(values.chunks_exact(self.value_size));
            entries.extend(
                pairs
                    .take(count as usize)
                    .map(|(k, v)| (sys::from_prefix(k), sys::from_prefix(v))),
            );
            if end {
                return Ok(entries);
            }
        }
    }

    fn entries_one_by_one(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0; size_of::<K>()];
        let mut value = vec![0; self.value_size];
        while sys::map_next_key(&self.fd, key.as_deref(), &mut next)? {
            if sys::map_lookup(&self.fd, &next, &mut value)? {
                entries.push((sys::from_prefix(&next), sys::from_prefix(&value)));
            }
            key = Some(next.clone());
        }
        Ok(entries)
    }

    /// Inserts or replaces.
    ///
    /// # Errors
    /// The kernel refused; those before it went in.
    pub fn upsert(&self, entries: &[(K, V)]) -> Result<(), Error> {
        for chunk in entries.chunks(BATCH) {
            let keys: Vec<K> = chunk.iter().map(|(key, _)| *key).collect();
            let values: Vec<V> = chunk.iter().map(|(_, value)| *value).collect();
            let (_, result) = sys::map_update_batch(
                &self.fd,
                sys::bytes_of_slice(&keys),
                sys::bytes_of_slice(&values),
                chunk.len() as u32,
            );
            match result {
                Err(error) if is_unsupported(&error) => self.upsert_one_by_one(chunk),
                result => result,
            }
            .map_err(|error| self.refused("update", error))?;
        }
        Ok(())
    }

    fn upsert_one_by_one(&self, entries: &[(K, V)]) -> io::Result<()> {
        entries
            .iter()
            .try_for_each(|(k, v)| sys::map_update(&self.fd, sys::bytes_of(k), sys::bytes_of(v)))
    }

    /// Deletes; a missing entry is no error.
    ///
    /// # Errors
    /// The kernel refused; those before it are gone.
    pub fn delete(&self, keys: &[K]) -> Result<(), Error> {
        for chunk in keys.chunks(BATCH) {
            self.delete_chunk(chunk)
                .map_err(|error| self.refused("delete from", error))?;
        }
        Ok(())
    }

    fn delete_chunk(&self, mut keys: &[K]) -> io::Result<()> {
        while !keys.is_empty() {
            let (done, result) =
                sys::map_delete_batch(&self.fd, sys::bytes_of_slice(keys), keys.len() as u32);
            match result {
                Ok(()) => return Ok(()),
                // Stopped at a missing key: go on behind it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    keys = &keys[(done as usize + 1).min(keys.len())..];
                }
                Err(error) if is_unsupported(&error) => {
                    return keys.iter().try_for_each(|key| {
                        sys::map_delete(&self.fd, sys::bytes_of(key)).map(drop)
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn refused(&self, action: &'static str, error: io::Error) -> Error {
        refused(action, format_args!("map {}", self.name), error)
    }
}

impl<K, V> AsFd for Hash<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Batches came with v5.6; an older kernel does not know the command.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | sys::ENOTSUPP))
}

/// The counters of a PERCPU_ARRAY of u64, each summed over the CPUs.
///
/// # Errors
/// The kernel could not be read.
pub fn per_cpu_totals(map: impl AsFd) -> io::Result<Vec<u64>> {
    let info = sys::map_info(map.as_fd())?;
    let mut values = vec![0_u8; sys::possible_cpus()? * WORD];
    let mut totals = Vec::with_capacity(info.max_entries as usize);
    for index in 0..info.max_entries {
        sys::map_lookup(map.as_fd(), &index.to_ne_bytes(), &mut values)?;
        totals.push(
            values
                .chunks_exact(WORD)
                .map(word_of)
                .fold(0, u64::wrapping_add),
        );
    }
    Ok(totals)
}
