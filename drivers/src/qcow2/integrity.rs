//! What must be done before the first write, and what is done when an image turns out damaged.
//!
//! I1. Nothing is written to the file before the autoclear bits that this driver does not maintain
//!     (all but those of a raw data file and of the bitmaps) are cleared in the header (H24), and
//!     the stored bitmaps are marked as in use, durably.
//! I2. When metadata turns out corrupt, the image is marked so once, and every later write is
//!     refused. An image that is open read-only is never written to.
//! I3. When it is not known what a change of metadata left in the file, the image is given up: nothing
//!     is written any more, and whoever wants to make something durable hears of it, its close too.

use super::Qcow2;
use super::format_error::{FormatError, FormatErrorKind};
use super::header::{Version, feature};
use super::layers::Layers;
use super::lookup::Fault;
use super::notice;
use blockplex_graph::{Child, Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The header fields of the feature bits: incompatible, compatible, autoclear.
const FEATURES_OFFSET: u64 = 72;

/// See the page.
#[derive(Default)]
pub(super) struct Integrity {
    /// I1 is done, and whether bitmaps record: a [`Way`].
    way: AtomicU8,
    /// I2 has happened.
    broken: AtomicBool,
    /// That an image which is open for reading is corrupt has been said.
    told: AtomicBool,
    /// I3 has happened.
    given_up: AtomicBool,
}

/// Gives the image up when it goes away unsettled (I3): with a change that failed, or that was torn
/// down with its loop and may still reach the file.
#[must_use = "a doubt that is not settled gives the image up"]
pub(super) struct Doubt<'a> {
    image: &'a Qcow2,
    settled: bool,
}

impl Doubt<'_> {
    /// It is known what the file holds.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.image.give_up();
        }
    }
}

/// How a write may go its short way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Way {
    /// Not at all: something is to be prepared, or is broken.
    Closed = 0,
    /// As it is.
    Open = 1,
    /// Bitmaps want to know of it.
    Marked = 2,
}

impl Qcow2 {
    /// How a write may go its short way.
    pub(super) fn way(&self) -> Way {
        // Acquire: partner of the Releases in `choose_way`; the header was written before.
        match self.integrity.way.load(Ordering::Acquire) {
            _ if self.is_broken() => Way::Closed,
            1 => Way::Open,
            2 => Way::Marked,
            _ => Way::Closed,
        }
    }

    /// Whether everything is prepared for writing, and nothing broken.
    pub(super) fn may_write_now(&self) -> bool {
        self.way() != Way::Closed
    }

    /// After a change of which bitmaps record, of an image that is prepared.
    pub(super) fn choose_way(&self) {
        let way = if self.bitmaps.is_recording() { Way::Marked } else { Way::Open };
        // Release: partner of the Acquires.
        self.integrity.way.store(way as u8, Ordering::Release);
    }

    /// Whether I1 is done.
    pub(super) fn is_prepared(&self) -> bool {
        // Acquire: as in `way`.
        self.integrity.way.load(Ordering::Acquire) != Way::Closed as u8
    }

    /// Whether the image was found to be corrupt.
    pub(super) fn is_broken(&self) -> bool {
        // Relaxed: whoever misses it by a moment came before it.
        self.integrity.broken.load(Ordering::Relaxed)
    }

    /// Makes sure that the image may be written to (I1, I2). First of every change.
    pub(super) async fn prepare_for_writing(&self, file: &Child) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open read-only"));
        }
        if self.is_broken() {
            let text = "the image was found to be corrupt: it must be repaired before writing";
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        if self.may_write_now() {
            return Ok(());
        }
        let mut header = self.header.lock().await;
        // Somebody else may have come first; twice does no harm, but what bitmaps hold must not be
        // said to be out of date after it was stored.
        if self.may_write_now() {
            return Ok(());
        }
        let mut kept = header.autoclear_features & feature::KNOWN_AUTOCLEAR;
        if header.consistent_bitmaps().is_none() {
            kept &= !feature::BITMAPS;
        }
        if header.autoclear_features != kept {
            let before = std::mem::replace(&mut header.autoclear_features, kept);
            let cleared = match write_features(file, &header).await {
                Ok(()) => file.flush().await,
                failed => failed,
            };
            if cleared.is_err() {
                // Whoever comes next must try again.
                header.autoclear_features = before;
            }
            cleared?;
        }
        self.mark_bitmaps_in_use(file, &header).await?;
        self.choose_way();
        Ok(())
    }

    /// The error of a request that met a damaged entry; marks the image if that is called for.
    pub(super) async fn fail_at(&self, layers: &Layers, guest: u64, fault: Fault) -> Error {
        if fault.is_corruption() {
            self.mark_corrupt(&layers.file, &self.words_for(guest, fault, false)).await;
        }
        fault.at(guest)
    }

    /// The same for a request that would have written there.
    pub(super) async fn fail_write(&self, layers: &Layers, guest: u64, fault: Fault) -> Error {
        if fault.is_corruption() {
            self.mark_corrupt(&layers.file, &self.words_for(guest, fault, true)).await;
        }
        fault.at(guest)
    }

    /// The same for an image that is open for reading: nothing is to be marked.
    pub(super) fn fail_reading(&self, guest: u64, fault: Fault) -> Error {
        if fault.is_corruption() {
            self.tell_reader(&self.words_for(guest, fault, false));
        }
        fault.at(guest)
    }

    /// Says that an image that is open for reading is corrupt, once.
    fn tell_reader(&self, words: &str) {
        // Relaxed: only to say it once.
        if !self.integrity.told.swap(true, Ordering::Relaxed) {
            tracing::error!(
                target: notice::CORRUPT,
                error = %words,
                fatal = false,
                "the qcow2 image is corrupt"
            );
        }
    }

    /// Passes a result on; marks the image when it says that metadata is corrupt.
    pub(super) async fn judge<T>(&self, file: &Child, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
        {
            self.mark_corrupt(file, error.message()).await;
        }
        result
    }

    /// What goes on from here is not known before it is settled (I3).
    pub(super) fn doubt(&self) -> Doubt<'_> {
        Doubt { image: self, settled: false }
    }

    /// I3. Refuses all later writes: what is in memory may not be what is on the disk any more.
    pub(super) fn give_up(&self) {
        tracing::error!("the metadata of a qcow2 image is in doubt: no more writes");
        // Relaxed: as in `is_broken`.
        self.integrity.given_up.store(true, Ordering::Relaxed);
        self.integrity.broken.store(true, Ordering::Relaxed);
    }

    /// Fails when the image was given up (I3).
    pub(super) fn check_known(&self) -> Result<()> {
        // Relaxed: as in `is_broken`.
        if !self.integrity.given_up.load(Ordering::Relaxed) {
            return Ok(());
        }
        let text = "a change of the image's metadata failed half-way: it must be opened anew";
        Err(Error::new(ErrorKind::Io, text))
    }

    /// I2. Best effort: the request fails in any case.
    async fn mark_corrupt(&self, file: &Child, words: &str) {
        if self.read_only {
            return self.tell_reader(words);
        }
        // Relaxed: the first one marks, the order does not matter.
        if self.integrity.broken.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::error!(
            target: notice::CORRUPT,
            error = %words,
            fatal = true,
            "the qcow2 image is corrupt: no more writes"
        );
        if self.version < Version::V3 {
            return;
        }
        let mut header = self.header.lock().await;
        header.incompatible_features |= feature::CORRUPT;
        let written = match write_features(file, &header).await {
            Ok(()) => file.flush().await,
            failed => failed,
        };
        if let Err(error) = written {
            tracing::error!(%error, "the qcow2 image could not be marked corrupt");
        }
    }
}

/// Writes the feature bits, and nothing else of the header.
pub(super) async fn write_features(file: &Child, header: &super::header::Header) -> Result<()> {
    let words =
        [header.incompatible_features, header.compatible_features, header.autoclear_features];
    let bytes = words.map(u64::to_be_bytes);
    let vector = IoBuffer::from_slice(bytes.as_flattened());
    file.write(FEATURES_OFFSET, vector, RequestFlags::default()).await
}

impl From<FormatError> for Error {
    fn from(error: FormatError) -> Error {
        let kind = match error.kind {
            FormatErrorKind::OtherFormat | FormatErrorKind::InvalidOption => {
                ErrorKind::InvalidArgument
            }
            FormatErrorKind::Malformed | FormatErrorKind::MarkedCorrupt => ErrorKind::Corrupt,
            FormatErrorKind::Unsupported => ErrorKind::NotSupported,
            FormatErrorKind::NoSpace => ErrorKind::NoSpace,
        };
        Error::new(kind, error.to_string())
    }
}
