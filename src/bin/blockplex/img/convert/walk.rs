//! The walk over the sources: which part of the disk comes next, and what is to be done with it.
//!
//! The sources lie one after the other on one disk, each rounded up to whole sectors. Lanes take
//! chunks from the walk in order, one lane at a time.

use blockplex::BlockStatus;

use super::copy::{Copy, CopyError, Doing, Source, reason};
use crate::img::disk::{OpenDisk, SECTOR};

/// The longest chunk of zeros, or of what is left alone.
const LONGEST: u64 = 1 << 30;

/// What a part of the disk is to the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To be read and written.
    Data,
    /// It reads as zeros.
    Zero,
    /// The target's backing file shows it already.
    Backed,
}

/// A part of the disk that one lane copies.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    pub offset: u64,
    pub length: u64,
    pub kind: Kind,
}

/// How far the walk has come.
pub struct Walk {
    position: u64,
    /// Up to where `kind` is known to hold.
    known_until: u64,
    kind: Kind,
    /// The bytes so far that cost time: they are what progress counts.
    pub cost: u64,
}

impl Walk {
    /// A walk from the disk's start.
    pub fn new() -> Walk {
        Walk { position: 0, known_until: 0, kind: Kind::Data, cost: 0 }
    }

    /// The next chunk; none at the end.
    pub async fn next(
        &mut self,
        copy: &Copy,
        disks: &[OpenDisk],
    ) -> Result<Option<Chunk>, CopyError> {
        let offset = self.position;
        let left = copy.total() - offset;
        if left == 0 {
            return Ok(None);
        }
        if self.known_until <= offset {
            let (kind, length) = look(copy, disks, offset).await?;
            (self.kind, self.known_until) = (kind, offset.saturating_add(length));
        }
        let (mut kind, mut length) = (self.kind, (self.known_until - offset).min(left));
        let how = copy.how();
        let is_written = |kind| kind == Kind::Data || kind == Kind::Zero && how.sparse.is_none();
        length = length.min(if is_written(kind) { how.buffer_bytes } else { LONGEST });
        if let (Some(granule), Kind::Zero) = (how.granule, kind) {
            let into = offset % granule;
            if into != 0 || length < granule {
                (kind, length) = (Kind::Data, length.min(granule - into));
            } else {
                length -= length % granule;
            }
        }
        if let Some(cluster) = how.compressed_cluster {
            // Clusters are compressed as a whole: what is not a whole one of some other kind is
            // data.
            if length < cluster {
                (kind, length) = (Kind::Data, cluster.min(left));
            } else {
                length -= length % cluster;
            }
        }
        self.position += length;
        if is_written(kind) {
            self.cost += length;
        }
        Ok(Some(Chunk { offset, length, kind }))
    }
}

/// What is at `offset`, and how far.
async fn look(copy: &Copy, disks: &[OpenDisk], offset: u64) -> Result<(Kind, u64), CopyError> {
    let (index, source) = copy.source_at(offset);
    let mut length = source.end() - offset;
    let backing_end = copy.how().target_backing.and_then(|backing| backing.length);
    let beyond_backing = backing_end.is_some_and(|end| offset >= end);
    if let Some(end) = backing_end.filter(|_| !beyond_backing) {
        length = length.min(end - offset);
    }
    let inside = offset - source.start;
    let status = loop {
        match disks[index].status(inside, length).await {
            Ok(status) => break status,
            Err(error) if copy.how().salvage => {
                if length <= SECTOR {
                    copy.warn(format_args!(
                        "error while reading block status at offset {offset}: {}",
                        reason(&error)
                    ));
                    break BlockStatus { length, data: true, ..BlockStatus::default() };
                }
                // Whatever cannot be asked about at once may be in smaller parts.
                length = (length / 4).next_multiple_of(SECTOR);
            }
            Err(error) => return Err(CopyError { doing: Doing::Status, offset, error }),
        }
    };
    let kind = kind_of(copy, source, inside, &status);
    let kind = if beyond_backing && kind == Kind::Zero { Kind::Backed } else { kind };
    Ok((kind, status.length))
}

fn kind_of(copy: &Copy, source: &Source, inside: u64, status: &BlockStatus) -> Kind {
    let below = copy.how().target_backing.is_some() && !status.allocated;
    if below && inside < source.backing_length {
        return Kind::Backed;
    }
    if status.zero { Kind::Zero } else { Kind::Data }
}
