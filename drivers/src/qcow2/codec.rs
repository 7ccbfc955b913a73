//! Compressed clusters: one cluster in, at most one cluster out, whatever the bytes are.
//!
//! - Deflate: a raw stream without header or checksum, window of 2^12 bytes.
//! - Zstandard: one frame.
//!
//! The entry that points at compressed data gives only an upper bound of its length, in sectors,
//! so what follows the stream in its last sector is not looked at: it may be another cluster's
//! beginning. More than that is refused, for then the entry is wrong.
//!
//! A decoder's memory (at most a few hundred KiB, and for Zstandard a window of at most two
//! clusters) is allocated once, with the [`Decompressor`]; keep one for each worker.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::header::CompressionType;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::fmt;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

/// The deflate window of the format, as a power of two.
const WINDOW_BITS: u8 = 12;
/// Less than this many bytes may follow a stream.
const SECTOR: usize = 512;
/// The first bytes of a Zstandard frame. A skippable frame begins otherwise, and is refused.
const ZSTD_MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// Why a cluster could not be decompressed or compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecError {
    /// The bytes are not a stream of this compression type, or its window exceeds the limit.
    Garbage,
    /// The stream ends before it has given a whole cluster, or is cut off.
    Short,
    /// The stream goes on after it has given a whole cluster.
    Long,
    /// A sector or more follows the stream.
    Trailing,
    /// The compression library refused to start (memory).
    Setup,
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Garbage => "compressed data is not a valid stream",
            Self::Short => "compressed data gives less than a cluster",
            Self::Long => "compressed data gives more than a cluster",
            Self::Trailing => "compressed data is followed by other sectors",
            Self::Setup => "compression could not be set up",
        })
    }
}

impl std::error::Error for CodecError {}

/// Decompresses clusters, one after the other, of images of one compression type.
///
/// Any thread may use it, one at a time. A call runs to its end; it takes up to some
/// milliseconds for a large cluster, so it does not belong on an event loop.
pub struct Decompressor(Inner);

enum Inner {
    Deflate(Decompress),
    Zstd(DCtx<'static>),
}

impl Decompressor {
    /// A decompressor for images with clusters of 2^`cluster_bits` bytes.
    ///
    /// # Errors
    ///
    /// [`CodecError::Setup`] when the library has no memory or refuses the cluster size.
    pub fn new(kind: CompressionType, cluster_bits: u32) -> Result<Self, CodecError> {
        Ok(Decompressor(match kind {
            CompressionType::Deflate => {
                Inner::Deflate(Decompress::new_with_window_bits(false, WINDOW_BITS))
            }
            CompressionType::Zstd => {
                let mut context = DCtx::try_create().ok_or(CodecError::Setup)?;
                // No writer needs a window beyond the cluster; the limit bounds the memory.
                context
                    .set_parameter(DParameter::WindowLogMax(cluster_bits.saturating_add(1)))
                    .map_err(|_| CodecError::Setup)?;
                Inner::Zstd(context)
            }
        }))
    }

    /// Decompresses `compressed` into `cluster`, which it fills exactly. On error `cluster`
    /// holds anything.
    ///
    /// # Errors
    ///
    /// The stream is damaged, gives less than `cluster` takes (Zstandard: or more), or is
    /// followed by a whole sector. The decompressor can be used again.
    pub fn decompress(&mut self, compressed: &[u8], cluster: &mut [u8]) -> Result<(), CodecError> {
        let used = match &mut self.0 {
            Inner::Deflate(state) => inflate(state, compressed, cluster)?,
            Inner::Zstd(context) => unzstd(context, compressed, cluster)?,
        };
        match compressed.len().checked_sub(used) {
            Some(rest) if rest < SECTOR => Ok(()),
            _ => Err(CodecError::Trailing),
        }
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Inner::Deflate(_) => "Decompressor(Deflate)",
            Inner::Zstd(_) => "Decompressor(Zstd)",
        })
    }
}

/// The bytes of `compressed` used up.
fn inflate(
    state: &mut Decompress,
    compressed: &[u8],
    cluster: &mut [u8],
) -> Result<usize, CodecError> {
    state.reset(false);
    let status = state
        .decompress(compressed, cluster, FlushDecompress::Finish)
        .map_err(|_| CodecError::Garbage)?;
    let full = state.total_out() == cluster.len() as u64;
    match status {
        // A stream may go on after a whole cluster: the format says to stop there.
        Status::StreamEnd | Status::BufError | Status::Ok if full => Ok(state.total_in() as usize),
        _ => Err(CodecError::Short),
    }
}

/// The bytes of `compressed` used up.
fn unzstd(
    context: &mut DCtx<'static>,
    compressed: &[u8],
    cluster: &mut [u8],
) -> Result<usize, CodecError> {
    if !compressed.starts_with(&ZSTD_MAGIC) {
        return Err(CodecError::Garbage);
    }
    context.reset(ResetDirective::SessionOnly).map_err(|_| CodecError::Setup)?;
    let size = cluster.len();
    let mut input = InBuffer::around(compressed);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos(), output.pos());
        let wanted =
            context.decompress_stream(&mut output, &mut input).map_err(|_| CodecError::Garbage)?;
        if wanted == 0 {
            // The frame is complete. Only one is read, so a full output is the only good end.
            let full = output.pos() == size;
            return if full { Ok(input.pos()) } else { Err(CodecError::Short) };
        }
        if before == (input.pos(), output.pos()) {
            let full = output.pos() == size && input.pos() < compressed.len();
            return Err(if full { CodecError::Long } else { CodecError::Short });
        }
    }
}

/// Compresses clusters, one after the other, for images of one compression type.
///
/// Any thread may use it, one at a time. A call takes up to some ten milliseconds for a large
/// cluster, so it does not belong on an event loop.
pub struct Compressor(Outer);

enum Outer {
    Deflate(Compress),
    Zstd(CCtx<'static>),
}

impl Compressor {
    /// A compressor; its memory (some hundred KiB to a few MiB) is kept with it.
    ///
    /// # Errors
    ///
    /// [`CodecError::Setup`] when the library has no memory.
    pub fn new(kind: CompressionType) -> Result<Self, CodecError> {
        Ok(Compressor(match kind {
            CompressionType::Deflate => Outer::Deflate(new_deflate()),
            CompressionType::Zstd => {
                let mut context = CCtx::try_create().ok_or(CodecError::Setup)?;
                // The library writes no larger window than the cluster, whose size it sees; the
                // frame says its content size, so that a reader can decode it in one pass.
                context
                    .set_parameter(CParameter::ContentSizeFlag(true))
                    .map_err(|_| CodecError::Setup)?;
                Outer::Zstd(context)
            }
        }))
    }

    /// Compresses one cluster. `None` when that saves nothing: the cluster is better stored as it
    /// is.
    pub fn compress(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        // One byte less than the cluster: what does not fit is not worth it.
        let mut compressed = vec![0; cluster.len().saturating_sub(1)];
        let length = match &mut self.0 {
            Outer::Deflate(state) => deflate(state, cluster, &mut compressed)?,
            // The only failure left is an output that is too small.
            Outer::Zstd(context) => context.compress2(&mut compressed[..], cluster).ok()?,
        };
        compressed.truncate(length);
        Some(compressed)
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Outer::Deflate(_) => "Compressor(Deflate)",
            Outer::Zstd(_) => "Compressor(Zstd)",
        })
    }
}

fn deflate(state: &mut Compress, cluster: &[u8], compressed: &mut [u8]) -> Option<usize> {
    state.reset();
    match state.compress(cluster, compressed, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => Some(state.total_out() as usize),
        // The output is full. An error would be no better: the cluster is stored as it is. What
        // zlib-rs has not put out survives a reset, and the next stream runs into it.
        _ => {
            *state = new_deflate();
            None
        }
    }
}

fn new_deflate() -> Compress {
    Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS)
}

#[cfg(test)]
mod tests;
