//! Maps as typed tables: arrays through their mapping, hashes through system calls.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use proxy_ebpf::abi::Plain;

pub use self::array::Array;
use super::{refused::refused, sys};
use crate::backends::Error;

mod array;

const WORD: usize = size_of::<u64>();

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

fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word.copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}
