//! Encrypted reads and writes of a child.
//!
//! A request's memory belongs to somebody else, who may look at it or change it at any time: data is
//! decrypted and encrypted in memory of our own, and copied. What is small is done on the loop; what
//! is large, in pieces side by side on the thread pool (K3).

use super::SECTOR;
use super::sectors::SectorCipher;
use crate::join::join_all;
use blockplex_graph::driver::LocalFuture;
use blockplex_graph::{Child, RequestFlags, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};
use std::sync::Arc;

/// Up to so many bytes are worked on by the loop itself.
const INLINE: usize = 16 << 10;
/// Bytes that one thread works on; a multiple of a sector.
const PIECE: usize = 64 << 10;
/// Pieces that are worked on side by side; bounds the memory of a request.
const PARALLEL: usize = 32;

/// Fills `vector` with what the bytes of `child` from `offset` on mean. Sectors are numbered by
/// `number`, a byte that is as far into its sector as `offset`. What is not whole sectors is
/// widened.
///
/// # Errors
///
/// Those of the child.
pub async fn read(
    child: &Child,
    cipher: &Arc<SectorCipher>,
    (offset, number): (u64, u64),
    vector: &IoVector,
) -> Result<()> {
    let (place, skip) = sector_of(offset, number);
    if skip == 0 && vector.len().is_multiple_of(SECTOR) {
        return read_sectors(child, cipher, place, vector).await;
    }
    let whole = IoVector::zeroed((skip + vector.len()).next_multiple_of(SECTOR));
    read_sectors(child, cipher, place, &whole).await?;
    vector.copy_from_vector(0, &whole, skip, vector.len());
    Ok(())
}

/// The place where a sector starts, its number, and how far `offset` is from there.
fn sector_of(offset: u64, number: u64) -> ((u64, u64), usize) {
    let sector = SECTOR as u64;
    debug_assert_eq!(offset % sector, number % sector, "a sector is a sector to both");
    let skip = offset % sector;
    ((offset - skip, number / sector), skip as usize)
}

async fn read_sectors(
    child: &Child,
    cipher: &Arc<SectorCipher>,
    (offset, sector): (u64, u64),
    vector: &IoVector,
) -> Result<()> {
    let mut pieces: Vec<LocalFuture<'_, Result<()>>> = Vec::new();
    for (start, length) in pieces_of(vector.len()) {
        let place = (offset + start as u64, sector + (start / SECTOR) as u64);
        pieces.push(Box::pin(read_piece(child, cipher, place, vector.slice(start, length))));
        if pieces.len() == PARALLEL {
            join_all(std::mem::take(&mut pieces)).await?;
        }
    }
    join_all(pieces).await
}

async fn read_piece(
    child: &Child,
    cipher: &Arc<SectorCipher>,
    (offset, sector): (u64, u64),
    vector: IoVector,
) -> Result<()> {
    let memory = IoVector::zeroed(vector.len());
    child.read(offset, memory.clone()).await?;
    let mut buffer = memory.into_buffer().unwrap_or_else(|shared| {
        // Whoever still holds the memory only reads it no more: a copy is as good.
        IoBuffer::from_slice(&shared.to_vec())
    });
    if buffer.len() <= INLINE {
        cipher.decrypt(sector, &mut buffer);
    } else {
        let cipher = cipher.clone();
        let work = move || {
            cipher.decrypt(sector, &mut buffer);
            buffer
        };
        buffer = child.local().blocking(work).await;
    }
    vector.copy_from_slice(0, &buffer);
    Ok(())
}

/// Writes `vector`, encrypted, to `child` from `offset` on. Sectors are numbered as for [`read`].
/// What is not whole sectors is read before; who writes so sees to it that nobody else writes the
/// same sectors.
///
/// # Errors
///
/// Those of the child.
pub async fn write(
    child: &Child,
    cipher: &Arc<SectorCipher>,
    (offset, number): (u64, u64),
    vector: &IoVector,
    flags: RequestFlags,
) -> Result<()> {
    let (place, skip) = sector_of(offset, number);
    if skip == 0 && vector.len().is_multiple_of(SECTOR) {
        return write_sectors(child, cipher, place, vector, flags).await;
    }
    let whole = IoVector::zeroed((skip + vector.len()).next_multiple_of(SECTOR));
    read_sectors(child, cipher, place, &whole).await?;
    whole.copy_from_vector(skip, vector, 0, vector.len());
    write_sectors(child, cipher, place, &whole, flags).await
}

async fn write_sectors(
    child: &Child,
    cipher: &Arc<SectorCipher>,
    (offset, sector): (u64, u64),
    vector: &IoVector,
    flags: RequestFlags,
) -> Result<()> {
    let mut start = 0;
    while start < vector.len() {
        let length = (vector.len() - start).min(PIECE * PARALLEL);
        let first = sector + (start / SECTOR) as u64;
        let part = encrypted(child, cipher, first, &vector.slice(start, length)).await?;
        child.write(offset + start as u64, part, flags).await?;
        start += length;
    }
    Ok(())
}

/// What `vector` is on disk.
async fn encrypted(
    child: &Child,
    cipher: &Arc<SectorCipher>,
    sector: u64,
    vector: &IoVector,
) -> Result<IoVector> {
    let pieces: Vec<_> = pieces_of(vector.len()).collect();
    let mut parts: Vec<IoVector> = pieces.iter().map(|_| IoVector::empty()).collect();
    let mut work: Vec<LocalFuture<'_, Result<()>>> = Vec::new();
    for ((start, length), part) in pieces.into_iter().zip(&mut parts) {
        let mut buffer = IoBuffer::zeroed(length);
        vector.copy_to_slice(start, &mut buffer);
        let first = sector + (start / SECTOR) as u64;
        if vector.len() <= INLINE {
            cipher.encrypt(first, &mut buffer);
            *part = buffer.into();
            continue;
        }
        let cipher = cipher.clone();
        work.push(Box::pin(async move {
            let encrypt = move || {
                cipher.encrypt(first, &mut buffer);
                buffer
            };
            *part = child.local().blocking(encrypt).await.into();
            Ok(())
        }));
    }
    join_all(work).await?;
    Ok(IoVector::concatenate(&parts))
}

/// Start and length of the pieces of a transfer.
fn pieces_of(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length).step_by(PIECE).map(move |start| (start, PIECE.min(length - start)))
}
