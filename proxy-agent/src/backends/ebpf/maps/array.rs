//! Arrays through their mapping.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_info};
use proxy_ebpf::abi::Plain;

use super::{WORD, sys, word_of};

/// Entries of a part: so many of any size are whole pages, also where a page has 64 KiB.
const PART: u32 = 8192;

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
        Self::part(fd, &info, 0..info.max_entries, writable)
    }

    /// Looks at an array in parts, each mapped for reading and only while it is looked at.
    ///
    /// # Errors
    /// As [`Array::new`].
    pub fn in_parts(fd: &OwnedFd, mut look: impl FnMut(&Self)) -> io::Result<()> {
        let info = sys::map_info(fd)?;
        for start in (0..info.max_entries).step_by(PART as usize) {
            let end = info.max_entries.min(start + PART);
            look(&Self::part(fd.try_clone()?, &info, start..end, false)?);
        }
        Ok(())
    }

    /// Maps the entries of a range that begins at a multiple of [`PART`].
    fn part(
        fd: OwnedFd,
        info: &bpf_map_info,
        range: Range<u32>,
        writable: bool,
    ) -> io::Result<Self> {
        let entries = range.end - range.start;
        if info.map_flags & BPF_F_MMAPABLE == 0 || entries == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // The kernel's layout: each value rounded up to eight bytes, one after the other (v5.5, fc9702273e2e).
        let words_per_entry = (info.value_size as usize).div_ceil(WORD);
        let bytes_of = |entries: u32| words_per_entry * WORD * entries as usize;
        let bytes = bytes_of(entries);
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
                bytes_of(range.start) as libc::off_t,
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
            entries,
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

    /// Whether the entry at `index` is all zero.
    pub fn is_zero(&self, index: u32) -> bool {
        let words = self.words(index);
        words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
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
