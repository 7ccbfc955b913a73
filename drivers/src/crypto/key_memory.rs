//! Memory for what must not be found later: wiped when it goes (K1), and as far as the system lets
//! it, never swapped out and left out of core dumps (K4).

use memmap2::{Advice, MmapMut, MmapOptions};
use std::ops::Deref;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a password or key.
pub(super) struct KeyMemory {
    place: Place,
    length: usize,
}

enum Place {
    /// Pages of their own.
    Pages(MmapMut),
    /// Where there are no pages to be had, and for no bytes at all.
    Heap(Zeroizing<Vec<u8>>),
}

impl KeyMemory {
    /// A copy of `bytes`, which the caller wipes.
    pub(super) fn new(bytes: &[u8]) -> KeyMemory {
        let pages = MmapOptions::new().len(bytes.len()).map_anon();
        let place = match pages {
            Ok(mut pages) if !bytes.is_empty() => {
                keep(&mut pages);
                pages.copy_from_slice(bytes);
                Place::Pages(pages)
            }
            _ => Place::Heap(Zeroizing::new(bytes.to_vec())),
        };
        KeyMemory { place, length: bytes.len() }
    }
}

/// Best effort: how much may be locked is limited, and a disk is not refused for that.
fn keep(pages: &mut MmapMut) {
    if let Err(error) = pages.lock() {
        tracing::debug!(%error, "a key cannot be kept out of the swap space");
    }
    if let Err(error) = pages.advise(Advice::DontDump) {
        tracing::debug!(%error, "a key cannot be kept out of core dumps");
    }
}

impl Deref for KeyMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let bytes: &[u8] = match &self.place {
            Place::Pages(pages) => pages,
            Place::Heap(bytes) => bytes,
        };
        &bytes[..self.length]
    }
}

impl Drop for KeyMemory {
    fn drop(&mut self) {
        if let Place::Pages(pages) = &mut self.place {
            pages.zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags that the kernel shows of the memory at this address.
    fn flags_of(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut here = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bound = |text: &str| usize::from_str_radix(text, 16).ok();
            if let Some((start, end)) = range.and_then(|(a, b)| Some((bound(a)?, bound(b)?))) {
                here = (start..end).contains(&address);
            } else if let (true, Some(flags)) = (here, line.strip_prefix("VmFlags:")) {
                return format!("{flags} ");
            }
        }
        panic!("no mapping of {address:#x}");
    }

    #[test]
    fn keys_stay_out_of_swap_and_core_dumps() {
        let key = KeyMemory::new(b"hush");
        assert_eq!(&key[..], b"hush");
        let flags = flags_of(key.as_ptr().addr());
        assert!(flags.contains(" dd "), "{flags}");
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        if limit.is_none_or(|limit| limit >= 1 << 20) {
            assert!(flags.contains(" lo "), "{flags}");
        }
        assert!(KeyMemory::new(b"").is_empty());
    }
}
