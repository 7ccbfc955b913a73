//! The VM state: bytes that lie past the end of the disk, in L1 entries of their own, so that a
//! snapshot takes them along.
//!
//! It is written before the snapshot that is to have it, which then owns it alone; a node that
//! reads a snapshot, and a disk that went back to one, have its VM state.

use crate::qcow2::Qcow2;
use crate::qcow2::layers::Layers;
use blockplex_graph::{DebugEvent, Error, ErrorKind, NodeIo, Result};
use blockplex_io::buffer::IoVector;

impl Qcow2 {
    /// The guest offset where the VM state begins, in bytes: that of the first L1 entry that maps
    /// nothing of the disk.
    pub fn vm_state_start(&self) -> u64 {
        // Both factors come from a size that was checked.
        self.geometry.l1_entries_for(self.disk_size()) * self.geometry.bytes_per_l1_entry()
    }

    /// Writes `vector` at byte `offset` of the VM state. Management work.
    ///
    /// # Errors
    ///
    /// `LimitExceeded`: the L1 table cannot reach so far; and those of writing.
    pub async fn write_vm_state(&self, io: &NodeIo, offset: u64, vector: &IoVector) -> Result<()> {
        let layers = Layers { backing: None, ..Layers::of(io)? };
        layers.file.announce(DebugEvent::VmstateSave).await;
        let start = self.place_in_vm_state(offset, vector)?;
        let turn = self.begin_snapshot_work(&layers).await?;
        let last = (start + vector.len() as u64).div_ceil(self.geometry.bytes_per_l1_entry());
        let mut words = self.disk_l1();
        if (words.len() as u64) < last {
            words.resize(last as usize, 0);
            self.switch_disk(&layers, &words, self.disk_size())
                .await
                .map_err(|(error, _)| error)?;
        }
        drop(turn);
        self.write(&layers, start, vector).await
    }

    /// Fills `vector` from byte `offset` of the VM state; what was not written reads as zeros.
    /// Management work.
    ///
    /// # Errors
    ///
    /// As for any read.
    pub async fn read_vm_state(&self, io: &NodeIo, offset: u64, vector: &IoVector) -> Result<()> {
        let layers = Layers { backing: None, ..Layers::of(io)? };
        layers.file.announce(DebugEvent::VmstateLoad).await;
        let start = self.place_in_vm_state(offset, vector)?;
        self.read(&layers, start, vector).await
    }

    fn place_in_vm_state(&self, offset: u64, vector: &IoVector) -> Result<u64> {
        let most = self.geometry.max_guest_size();
        let start = self.vm_state_start().checked_add(offset);
        let end = start.and_then(|start| start.checked_add(vector.len() as u64));
        match (start, end) {
            (Some(start), Some(end)) if end <= most => Ok(start),
            _ => {
                let text =
                    format!("VM state at {offset} reaches past {most}, the most that is mapped");
                Err(Error::new(ErrorKind::LimitExceeded, text))
            }
        }
    }

    /// Takes the VM state off the disk, after the snapshot has it. What fails leaves it there.
    pub(super) async fn drop_vm_state(&self, layers: &Layers) -> Result<()> {
        let first = self.geometry.l1_entries_for(self.disk_size());
        let words = self.disk_l1();
        let state: Vec<u64> = words.iter().skip(first as usize).copied().collect();
        if state.iter().all(|word| *word == 0) {
            return Ok(());
        }
        for (index, word) in (first..).zip(&state) {
            if *word != 0 {
                self.l1.set(index, 0);
            }
        }
        self.flush(layers).await?;
        self.slices.clear();
        self.drop_references(layers, &state).await
    }
}
