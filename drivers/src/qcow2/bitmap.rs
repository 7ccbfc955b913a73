//! The dirty bitmaps of a qcow2 node: those that are stored in the image, and others.
//!
//! The driver marks what requests write, at its door: in `map` for what goes its short way, in
//! `serve` for the rest. Without a bitmap that records, that costs nothing: the short way has one
//! word to look at that says both that the image may be written to and whether anybody wants to
//! know. Which bitmaps record changes only under a drain, so the marks of a request that has ended
//! are all there.
//!
//! - **P1** Before the first write to a file that has bitmaps, they are marked as in use in its
//!   directory, durably. Whoever finds the mark knows that a writer did not get to store them.
//! - **P2** Bits, tables and directory are written to new places and are durable before the header
//!   names the directory, in one write; then the old ones are given back. So after a crash the
//!   bitmaps are those of before, marked as in use, or the new ones, whole.
//! - **P3** A bitmap that was in use when the image was opened cannot be relied on: it is shown, it
//!   is kept as it is, and can only be removed.

mod load;
mod store;

pub(super) use load::{Source, read_directory};

use super::Qcow2;
use super::bitmap_directory::{BitmapEntry, MAX_BITMAP_BYTES, MAX_BITMAP_NAME_BYTES, entry_length};
use super::entry::Version;
use super::extension::{MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};
use super::layers::Layers;
use super::locks::Held;
use crate::dirty_bitmap::DirtyBitmap;
use crate::open_gate::escape_bytes;
use arc_swap::ArcSwap;
use blockplex_graph::{Error, ErrorKind, NodeIo, Result};
use blockplex_io::lock::CoMutexGuard;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The bitmaps of an open image.
#[derive(Default)]
pub(super) struct Bitmaps {
    state: Mutex<State>,
    /// Those that record.
    recording: ArcSwap<Vec<Arc<DirtyBitmap>>>,
    /// Whether any does.
    is_recording: AtomicBool,
}

#[derive(Default)]
struct State {
    list: Vec<Bitmap>,
    /// What removed bitmaps have in the file.
    obsolete: Vec<Stored>,
}

/// One bitmap.
#[derive(Clone)]
pub(super) struct Bitmap {
    name: Vec<u8>,
    granularity_bits: u32,
    /// None: it cannot be relied on (P3).
    bits: Option<Arc<DirtyBitmap>>,
    recording: bool,
    persistent: bool,
    /// What the file has of it.
    stored: Option<Stored>,
}

/// What the file has of a bitmap.
#[derive(Clone)]
struct Stored {
    entry: BitmapEntry,
    /// The clusters of its bits, if it was loaded.
    clusters: Option<Vec<u64>>,
}

/// A persistent bitmap as it stood in the file when the image was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInformation {
    /// Its name. Text from the image: escape it before showing it.
    pub name: Vec<u8>,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// The flag `in-use`: a writer has it, or did not get to store it.
    pub in_use: bool,
    /// The flag `auto`: it records writes.
    pub auto: bool,
}

impl From<&BitmapEntry> for BitmapInformation {
    fn from(entry: &BitmapEntry) -> BitmapInformation {
        BitmapInformation {
            name: entry.name.clone(),
            granularity: 1 << entry.granularity_bits,
            in_use: entry.in_use,
            auto: entry.auto,
        }
    }
}

/// A bitmap of an open image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapStatus {
    /// Its name. Text from the image: escape it before showing it.
    pub name: Vec<u8>,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Bytes of the chunks that are dirty; 0 when it cannot be relied on.
    pub dirty_bytes: u64,
    /// It marks what is written.
    pub recording: bool,
    /// It is stored in the image.
    pub persistent: bool,
    /// A writer did not get to store it: it can only be removed.
    pub inconsistent: bool,
}

/// A bitmap to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name, at most 1023 bytes.
    pub name: Vec<u8>,
    /// Bytes that a bit stands for, a power of two from 512 to 2 GiB; by default the cluster size
    /// within 4 KiB and 64 KiB.
    pub granularity: Option<u64>,
    /// It is to be stored in the image.
    pub persistent: bool,
    /// It marks what is written from now on.
    pub recording: bool,
}

impl NewBitmap {
    /// A persistent bitmap that records.
    pub fn persistent(name: impl Into<Vec<u8>>) -> NewBitmap {
        NewBitmap { name: name.into(), granularity: None, persistent: true, recording: true }
    }
}

impl Bitmaps {
    /// The bitmaps that were loaded.
    pub(super) fn new(list: Vec<Bitmap>) -> Bitmaps {
        let bitmaps =
            Bitmaps { state: Mutex::new(State { list, obsolete: Vec::new() }), ..Self::default() };
        bitmaps.publish();
        bitmaps
    }

    /// Whether any bitmap records.
    pub(super) fn is_recording(&self) -> bool {
        // Relaxed: it changes under a drain, which orders it.
        self.is_recording.load(Ordering::Relaxed)
    }

    /// Marks a range in all bitmaps that record.
    pub(super) fn mark(&self, offset: u64, length: u64) {
        if self.is_recording() {
            for bitmap in self.recording.load().iter() {
                bitmap.mark(offset, length);
            }
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.state.lock().list.is_empty()
    }

    /// Refuses a new size of the disk that some bitmap cannot follow.
    pub(super) fn check_size(&self, size: u64) -> Result<()> {
        for bitmap in &self.state.lock().list {
            let Some(bits) = &bitmap.bits else {
                let name = escape_bytes(&bitmap.name);
                let text =
                    format!("the bitmap '{name}' is inconsistent: remove it before resizing");
                return Err(Error::new(ErrorKind::NotSupported, text));
            };
            bits.check_size(size)?;
        }
        Ok(())
    }

    /// The disk has this size now.
    pub(super) fn set_size(&self, size: u64) {
        for bits in self.state.lock().list.iter().filter_map(|bitmap| bitmap.bits.as_ref()) {
            bits.set_size(size);
        }
    }

    /// Makes known which bitmaps record.
    fn publish(&self) {
        let recording: Vec<_> = {
            let state = self.state.lock();
            let recording = state.list.iter().filter(|bitmap| bitmap.recording);
            recording.filter_map(|bitmap| bitmap.bits.clone()).collect()
        };
        // Relaxed: as in `is_recording`.
        self.is_recording.store(!recording.is_empty(), Ordering::Relaxed);
        self.recording.store(Arc::new(recording));
    }
}

impl State {
    fn find(&mut self, name: &[u8]) -> Result<&mut Bitmap> {
        let found = self.list.iter_mut().find(|bitmap| bitmap.name == name);
        found.ok_or_else(|| {
            let text = format!("Dirty bitmap '{}' not found", escape_bytes(name));
            Error::new(ErrorKind::NotFound, text)
        })
    }
}

impl Bitmap {
    fn usable(&self) -> Result<&Arc<DirtyBitmap>> {
        self.bits.as_ref().ok_or_else(|| {
            let name = escape_bytes(&self.name);
            let text =
                format!("Bitmap '{name}' is inconsistent and cannot be used: only remove it");
            Error::new(ErrorKind::InvalidArgument, text)
        })
    }
}

impl Qcow2 {
    /// The bitmaps, in the order in which they came. Any thread.
    pub fn bitmaps(&self) -> Vec<BitmapStatus> {
        let list = self.bitmaps.state.lock().list.clone();
        let status = |bitmap: Bitmap| BitmapStatus {
            granularity: 1 << bitmap.granularity_bits,
            dirty_bytes: bitmap
                .bits
                .as_ref()
                .map_or(0, |bits| bits.dirty_chunks() << bitmap.granularity_bits),
            recording: bitmap.recording,
            persistent: bitmap.persistent,
            inconsistent: bitmap.bits.is_none(),
            name: bitmap.name,
        };
        list.into_iter().map(status).collect()
    }

    /// The bits of a bitmap, for reading. Any thread.
    ///
    /// # Errors
    ///
    /// `NotFound`; `InvalidArgument`: it is inconsistent.
    pub fn bitmap(&self, name: &[u8]) -> Result<Arc<DirtyBitmap>> {
        self.bitmaps.state.lock().find(name)?.usable().cloned()
    }

    /// Adds a bitmap, all clean. Management work. A persistent one is in the file when the image is
    /// closed.
    ///
    /// # Errors
    ///
    /// `Exists`; `InvalidArgument`: the name or the granularity; `NotSupported`: version 2 has no
    /// persistent bitmaps; `LimitExceeded`: there are too many, or it would be too large; and those
    /// of writing.
    pub async fn add_bitmap(&self, io: &NodeIo, new: NewBitmap) -> Result<()> {
        let _turn = self.begin_bitmap_work(io).await?;
        let NewBitmap { name, granularity, persistent, recording } = new;
        let refuse = |kind, text: String| Err(Error::new(kind, text));
        if name.is_empty() {
            return refuse(ErrorKind::InvalidArgument, "Bitmap name cannot be empty".into());
        }
        if name.len() > MAX_BITMAP_NAME_BYTES {
            let text = format!("Bitmap name is longer than {MAX_BITMAP_NAME_BYTES} bytes");
            return refuse(ErrorKind::InvalidArgument, text);
        }
        if self.bitmaps.state.lock().find(&name).is_ok() {
            let text = format!("Bitmap already exists: {}", escape_bytes(&name));
            return refuse(ErrorKind::Exists, text);
        }
        let default = self.geometry.cluster_size().clamp(4096, 65536);
        let bits = DirtyBitmap::new(self.disk_size(), granularity.unwrap_or(default))?;
        let granularity_bits = bits.granularity().trailing_zeros();
        let bits = Some(Arc::new(bits));
        let bitmap = Bitmap { name, granularity_bits, bits, recording, persistent, stored: None };
        if persistent {
            self.check_room(&bitmap)?;
        }
        self.bitmaps.state.lock().list.push(bitmap);
        self.recording_changed();
        Ok(())
    }

    /// Removes a bitmap. Management work. From the file it is gone when the image is closed.
    ///
    /// # Errors
    ///
    /// `NotFound`; and those of writing.
    pub async fn remove_bitmap(&self, io: &NodeIo, name: &[u8]) -> Result<()> {
        let _turn = self.begin_bitmap_work(io).await?;
        let mut state = self.bitmaps.state.lock();
        let stored = state.find(name)?.stored.clone();
        state.obsolete.extend(stored);
        state.list.retain(|bitmap| bitmap.name != name);
        drop(state);
        self.recording_changed();
        Ok(())
    }

    /// Makes all of a bitmap clean. Management work.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::bitmap`] says; and those of writing.
    pub async fn clear_bitmap(&self, io: &NodeIo, name: &[u8]) -> Result<()> {
        let _turn = self.begin_bitmap_work(io).await?;
        self.bitmap(name)?.clear(0, u64::MAX);
        Ok(())
    }

    /// Lets a bitmap record what is written, or not. Management work.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::bitmap`] says; and those of writing.
    pub async fn set_bitmap_recording(
        &self,
        io: &NodeIo,
        name: &[u8],
        recording: bool,
    ) -> Result<()> {
        let _turn = self.begin_bitmap_work(io).await?;
        let mut state = self.bitmaps.state.lock();
        let bitmap = state.find(name)?;
        bitmap.usable()?;
        bitmap.recording = recording;
        drop(state);
        self.recording_changed();
        Ok(())
    }

    /// Marks in a bitmap all that is dirty in `source`, which may be another node's and have
    /// another granularity. Management work.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::bitmap`] and [`DirtyBitmap::merge`] say; and those of writing.
    pub async fn merge_bitmap(&self, io: &NodeIo, name: &[u8], source: &DirtyBitmap) -> Result<()> {
        let _turn = self.begin_bitmap_work(io).await?;
        self.bitmap(name)?.merge(source)
    }

    /// What changing bitmaps begins with: those in the file are out of date from now on.
    async fn begin_bitmap_work(&self, io: &NodeIo) -> Result<Held<CoMutexGuard<'_, ()>>> {
        self.prepare_for_writing(&Layers::of(io)?.file).await?;
        Ok(self.resizing.lock().await)
    }

    fn recording_changed(&self) {
        self.bitmaps.publish();
        self.choose_way();
    }

    /// Whether one more persistent bitmap can be stored.
    fn check_room(&self, new: &Bitmap) -> Result<()> {
        let refuse = |kind, text: &str| Err(Error::new(kind, text.to_owned()));
        if self.version < Version::V3 {
            let text = "Cannot store dirty bitmaps in qcow2 v2 files";
            return refuse(ErrorKind::NotSupported, text);
        }
        let chunks = self.disk_size().div_ceil(1 << new.granularity_bits);
        if chunks.div_ceil(8).next_multiple_of(self.geometry.cluster_size()) > MAX_BITMAP_BYTES {
            let text = "Too much space will be occupied by the bitmap. Use larger granularity";
            return refuse(ErrorKind::LimitExceeded, text);
        }
        let state = self.bitmaps.state.lock();
        let length = |bitmap: &Bitmap| entry_length(&bitmap.name);
        let others = state.list.iter().filter(|bitmap| bitmap.persistent);
        if others.clone().count() as u64 >= u64::from(MAX_BITMAPS) {
            return refuse(
                ErrorKind::LimitExceeded,
                "Maximum number of persistent bitmaps is already reached",
            );
        }
        if others.map(length).sum::<u64>() + length(new) > MAX_BITMAP_DIRECTORY_BYTES {
            return refuse(ErrorKind::LimitExceeded, "Not enough space in the bitmap directory");
        }
        Ok(())
    }
}
