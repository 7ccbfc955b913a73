//! The rules between header fields, and between a header and its file.
//!
//! Rows of the malformed-image catalogue are named where they are decided. A rule that protects
//! only what a writer would destroy adds a read-only reason instead of failing: the data can
//! still be rescued.

use super::{Header, MAX_SNAPSHOTS, MIN_SNAPSHOT_ENTRY_BYTES, Purpose, encryption, feature};
use crate::qcow2::format_error::{FormatError, FormatErrorKind, Place};
use crate::qcow2::geometry::{HOST_OFFSET_LIMIT, MAX_L1_BYTES, TABLE_ENTRY_BYTES};

/// A structure of the header and the bytes of the file that it claims.
struct Claim {
    field: &'static str,
    byte: u64,
    start: u64,
    end: u64,
}

impl Header {
    pub(super) fn check_rules(
        &mut self,
        purpose: Purpose,
        file_length: u64,
    ) -> Result<(), FormatError> {
        self.check_encryption(file_length)?;
        self.check_data_file()?;
        self.check_l1_table(file_length)?;
        self.check_refcount_table(purpose, file_length)?;
        self.check_snapshot_table(purpose, file_length)?;
        self.check_bitmaps(file_length)?;
        self.check_overlaps();
        if self.is_marked_corrupt() {
            let value = self.incompatible_features;
            let rule = "mark the image as corrupt (bit 1): it must be repaired before writing";
            let place = Place::Header(72);
            let reason = FormatError::hex("incompatible features", value, place, rule)
                .of_kind(FormatErrorKind::MarkedCorrupt);
            self.read_only_reasons.push(reason);
        }
        Ok(())
    }

    /// H17, E08, K03 to K05.
    fn check_encryption(&self, file_length: u64) -> Result<(), FormatError> {
        let method = self.crypt_method;
        let refuse = |rule| {
            let place = Place::Header(32);
            Err(FormatError::number("encryption method", method.into(), place, rule))
        };
        if method > encryption::LUKS {
            return refuse("is not 0 (none), 1 (AES) or 2 (LUKS)");
        }
        match self.extensions.crypto_header {
            None if method == encryption::LUKS => refuse("(LUKS) needs a crypto header extension"),
            None => Ok(()),
            Some(_) if method != encryption::LUKS => {
                refuse("does not go with a crypto header extension, which is for 2 (LUKS)")
            }
            Some(crypto) => {
                let end = crypto.offset.checked_add(crypto.length);
                let inside = end.is_some_and(|end| end <= file_length);
                let aligned = self.geometry.is_aligned(crypto.offset) && crypto.offset != 0;
                if inside && aligned && crypto.length != 0 {
                    return Ok(());
                }
                let rule = format!(
                    "with length {} is not a cluster of the file of {file_length} bytes",
                    crypto.length
                );
                Err(FormatError::hex("crypto header offset", crypto.offset, Place::Elsewhere, rule))
            }
        }
    }

    /// H23b, B10f.
    fn check_data_file(&mut self) -> Result<(), FormatError> {
        let used = self.incompatible_features & feature::DATA_FILE != 0;
        let named = self.extensions.data_file_name.is_some();
        if self.autoclear_features & feature::RAW_DATA_FILE != 0 && !used {
            let value = self.autoclear_features;
            let rule = "have bit 1 (raw external data), but there is no external data file";
            return Err(FormatError::hex("autoclear features", value, Place::Header(88), rule));
        }
        if named && !used {
            let value = self.incompatible_features;
            let rule = "lack bit 2 (external data file): the data file that the header names is \
                        ignored";
            let place = Place::Header(72);
            self.warnings.push(FormatError::hex("incompatible features", value, place, rule));
        }
        Ok(())
    }

    /// H06 to H11b.
    fn check_l1_table(&self, file_length: u64) -> Result<(), FormatError> {
        let geometry = &self.geometry;
        let cluster_size = geometry.cluster_size();
        if self.size > geometry.max_guest_size() {
            let rule = format!(
                "exceeds {}, the most that an L1 table of {MAX_L1_BYTES} bytes maps with clusters \
                 of {cluster_size} bytes",
                geometry.max_guest_size()
            );
            return Err(FormatError::number("virtual size", self.size, Place::Header(24), rule));
        }
        let entries = u64::from(self.l1_size);
        let refuse_size = |rule: String| {
            Err(FormatError::number("L1 table size", entries, Place::Header(36), rule))
        };
        if entries > geometry.max_l1_entries() {
            return refuse_size(format!("exceeds {} entries", geometry.max_l1_entries()));
        }
        let needed = geometry.l1_entries_for(self.size);
        if entries < needed {
            return refuse_size(format!(
                "is less than the {needed} entries that a disk of {} bytes needs",
                self.size
            ));
        }
        let offset = self.l1_table_offset;
        self.check_aligned("L1 table offset", offset, 40)?;
        if entries == 0 {
            return Ok(());
        }
        let refuse_offset = |rule: String| {
            Err(FormatError::hex("L1 table offset", offset, Place::Header(40), rule))
        };
        if offset == 0 {
            return refuse_offset("is the header itself".to_owned());
        }
        // The last cluster of the table need not be whole: the peer leaves files that end with
        // the last entry.
        let bytes = entries * TABLE_ENTRY_BYTES;
        if offset.checked_add(bytes).is_none_or(|end| end > file_length) {
            return refuse_offset(past_end(bytes, file_length));
        }
        Ok(())
    }

    /// H12 to H14d.
    fn check_refcount_table(
        &mut self,
        purpose: Purpose,
        file_length: u64,
    ) -> Result<(), FormatError> {
        let clusters = u64::from(self.refcount_table_clusters);
        let size_error = |rule: String| {
            FormatError::number("refcount table size", clusters, Place::Header(56), rule)
        };
        let most = self.geometry.max_refcount_table_clusters();
        if clusters > most {
            return Err(size_error(format!("exceeds {most} clusters")));
        }
        let offset = self.refcount_table_offset;
        self.check_aligned("refcount table offset", offset, 48)?;
        if clusters == 0 {
            let error = size_error("leaves the image without refcounts".to_owned());
            if purpose == Purpose::Open {
                return Err(error);
            }
            self.read_only_reasons.push(error);
            return Ok(());
        }
        // At most 8 MiB.
        let bytes = clusters * self.geometry.cluster_size();
        let offset_error = |rule: String| {
            FormatError::hex("refcount table offset", offset, Place::Header(48), rule)
        };
        let Some(end) = offset.checked_add(bytes).filter(|&end| end <= HOST_OFFSET_LIMIT) else {
            return Err(offset_error("is past 2^56".to_owned()));
        };
        // As for L1, the file may end in the last cluster.
        if self.geometry.align_up(file_length).is_some_and(|length| end > length) {
            self.read_only_reasons.push(offset_error(past_end(bytes, file_length)));
        }
        Ok(())
    }

    /// H15 to H15d. A misplaced offset is refused without snapshots, too, as by the peer. A check
    /// looks at the table itself.
    fn check_snapshot_table(
        &mut self,
        purpose: Purpose,
        file_length: u64,
    ) -> Result<(), FormatError> {
        let result = self.judge_snapshot_table(file_length);
        match result {
            Err(error) if purpose == Purpose::Check && self.snapshot_count > 0 => {
                self.read_only_reasons.push(error);
                Ok(())
            }
            result => result,
        }
    }

    fn judge_snapshot_table(&self, file_length: u64) -> Result<(), FormatError> {
        let count = self.snapshot_count;
        if count > MAX_SNAPSHOTS {
            let rule = format!("exceeds {MAX_SNAPSHOTS}");
            let place = Place::Header(60);
            return Err(FormatError::number("snapshot count", count.into(), place, rule));
        }
        let offset = self.snapshots_offset;
        self.check_aligned("snapshot table offset", offset, 64)?;
        let bytes = u64::from(count) * MIN_SNAPSHOT_ENTRY_BYTES;
        if count > 0 && offset.checked_add(bytes).is_none_or(|end| end > file_length) {
            let rule = past_end(bytes, file_length);
            let place = Place::Header(64);
            return Err(FormatError::hex("snapshot table offset", offset, place, rule));
        }
        Ok(())
    }

    /// E06 and M12. Stale bitmaps (E06i) are not looked at.
    fn check_bitmaps(&mut self, file_length: u64) -> Result<(), FormatError> {
        if self.extensions.bitmaps.is_none() {
            return Ok(());
        }
        let Some(bitmaps) = self.consistent_bitmaps() else {
            let value = self.autoclear_features;
            let rule = "lack bit 0 (bitmaps): the persistent bitmaps are stale and ignored";
            let place = Place::Header(88);
            self.warnings.push(FormatError::hex("autoclear features", value, place, rule));
            return Ok(());
        };
        bitmaps.check()?;
        let (offset, bytes) = (bitmaps.directory_offset, bitmaps.directory_size);
        let refuse = |rule: String| {
            Err(FormatError::hex("bitmap directory offset", offset, Place::Elsewhere, rule))
        };
        if offset == 0 || !self.geometry.is_aligned(offset) {
            let size = self.geometry.cluster_size();
            return refuse(format!("is not a positive multiple of the cluster size {size}"));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > file_length) {
            return refuse(past_end(bytes, file_length));
        }
        Ok(())
    }

    /// H11c, H14e: structures on top of each other. Any one of them could be the right one, so
    /// this alone does not forbid to read.
    fn check_overlaps(&mut self) {
        let claims = self.claims();
        for (number, claim) in claims.iter().enumerate() {
            for other in claims.iter().take(number) {
                if claim.start < other.end && other.start < claim.end {
                    let place = Place::Header(claim.byte);
                    let rule = format!("overlaps the {} at {:#x}", other.field, other.start);
                    let reason = FormatError::hex(claim.field, claim.start, place, rule);
                    self.read_only_reasons.push(reason);
                }
            }
        }
    }

    /// What the header places in the file, in whole clusters.
    fn claims(&self) -> Vec<Claim> {
        let refcount_table_bytes =
            u64::from(self.refcount_table_clusters) * self.geometry.cluster_size();
        let bitmaps = self.consistent_bitmaps();
        let directory = bitmaps.map_or((0, 0), |b| (b.directory_offset, b.directory_size));
        let crypto = self.extensions.crypto_header.map_or((0, 0), |c| (c.offset, c.length));
        let rows = [
            ("header", 0, 0, self.geometry.cluster_size()),
            ("L1 table", 40, self.l1_table_offset, u64::from(self.l1_size) * TABLE_ENTRY_BYTES),
            ("refcount table", 48, self.refcount_table_offset, refcount_table_bytes),
            (
                "snapshot table",
                64,
                self.snapshots_offset,
                u64::from(self.snapshot_count) * MIN_SNAPSHOT_ENTRY_BYTES,
            ),
            ("bitmap directory", 0, directory.0, directory.1),
            ("encryption header", 0, crypto.0, crypto.1),
        ];
        let placed = rows.into_iter().filter(|&(_, _, _, bytes)| bytes > 0);
        placed
            .map(|(field, byte, start, bytes)| {
                let end = start.saturating_add(bytes);
                Claim { field, byte, start, end: self.geometry.align_up(end).unwrap_or(u64::MAX) }
            })
            .collect()
    }

    fn check_aligned(
        &self,
        field: &'static str,
        offset: u64,
        byte: u64,
    ) -> Result<(), FormatError> {
        if self.geometry.is_aligned(offset) {
            return Ok(());
        }
        let size = self.geometry.cluster_size();
        let rule = format!("is not a multiple of the cluster size {size}");
        Err(FormatError::hex(field, offset, Place::Header(byte), rule))
    }
}

fn past_end(bytes: u64, file_length: u64) -> String {
    format!("with {bytes} bytes there reaches past the end of the file at {file_length:#x}")
}
