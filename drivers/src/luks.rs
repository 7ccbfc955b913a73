//! `luks`: a disk as ciphertext behind a LUKS header.
//!
//! Sectors are numbered from the start of the payload. There is nothing between the disk and the file
//! but the cipher: what was never written reads as noise, and so does what the file was made longer by
//! behind the driver's back.

use crate::crypto::luks::{
    DEFAULT_MAX_ITERATIONS, LuksCreateOptions, LuksHeader, MasterKey, Place, SlotChange,
    change_slots, create as create_header, header_bytes,
};
use crate::crypto::sectors::SectorCipher;
use crate::crypto::{SECTOR, Secret, transfer};
use blockplex_graph::driver::{AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, Role};
use blockplex_graph::{
    Access, BlockStatus, Child, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome, Preallocation,
    Request, RequestFlags, RequestKind, Result,
};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_io::lock::CoMutex;
use std::sync::Arc;

/// The index of the only child.
const FILE: usize = 0;
/// Zeros that are encrypted and written at once.
const ZEROS: u64 = 1 << 20;

/// How a LUKS disk is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LuksOptions {
    /// The secret that `key-secret` names.
    pub key: Option<Secret>,
    /// `max-iterations`: the most iterations of a key derivation; default:
    /// [`DEFAULT_MAX_ITERATIONS`].
    pub max_iterations: Option<u32>,
    /// It may be opened without a key, to look at its header. Its data cannot be read or written
    /// then.
    pub metadata_only: bool,
}

/// The `luks` driver. Its only child is the file.
#[derive(Debug)]
pub struct Luks {
    information: LuksHeader,
    header: CoMutex<LuksHeader>,
    payload: u64,
    key: Option<MasterKey>,
    cipher: Option<Arc<SectorCipher>>,
    max_iterations: u32,
    read_only: bool,
}

fn no_key() -> Error {
    let text = "Parameter 'key-secret' is required for cipher";
    Error::new(ErrorKind::InvalidArgument, text)
}

impl Luks {
    /// Opens the disk in `file`. On a loop; writes nothing.
    ///
    /// # Errors
    ///
    /// No LUKS header, or one that breaks a rule; no key, or the wrong one; those of the file.
    pub async fn open(file: &Child, options: LuksOptions, read_only: bool) -> Result<Luks> {
        let length = file.length();
        let place = Place { file, offset: 0, length };
        let header = LuksHeader::read(place).await?;
        let payload = header.payload_offset();
        if payload == 0 || payload > length {
            let text = format!(
                "LUKS header: the payload at byte {payload} does not lie between the header and the \
                 end of the file at {length}"
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let max_iterations = options.max_iterations.unwrap_or(DEFAULT_MAX_ITERATIONS);
        let key = match &options.key {
            Some(password) => Some(header.unlock(place, password, max_iterations).await?),
            None if options.metadata_only => None,
            None => return Err(no_key()),
        };
        let cipher = key.as_ref().map(|key| key.cipher(&header.suite)).transpose()?;
        Ok(Luks {
            information: header.clone(),
            header: CoMutex::new(header),
            payload,
            key,
            cipher: cipher.map(Arc::new),
            max_iterations,
            read_only,
        })
    }

    /// The header, as it was when the disk was opened.
    pub fn information(&self) -> &LuksHeader {
        &self.information
    }

    /// Changes the key slots; durable on return. `file` is the child. With `force`, also what loses
    /// the data for ever.
    ///
    /// # Errors
    ///
    /// A disk that was opened without its key; a change that cannot be; those of the file.
    pub async fn change_key_slots(
        &self,
        file: &Child,
        change: &SlotChange,
        force: bool,
    ) -> Result<()> {
        let key = self.key.as_ref().ok_or_else(no_key)?;
        let place = Place { file, offset: 0, length: self.payload };
        let mut header = self.header.lock().await;
        change_slots(&mut header, place, key, change, (force, self.max_iterations)).await
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        self.cipher.as_ref().ok_or_else(no_key)
    }

    fn length_in(&self, file: u64) -> u64 {
        file.saturating_sub(self.payload)
    }

    async fn write(
        &self,
        file: &Child,
        offset: u64,
        vector: &IoVector,
        flags: RequestFlags,
    ) -> Result<()> {
        transfer::write(file, self.cipher()?, (self.payload + offset, offset), vector, flags).await
    }

    /// Sets the length; new space becomes zeros, which takes writing them.
    async fn resize(&self, file: &Child, length: u64, mode: Preallocation) -> Result<()> {
        let old = self.length_in(file.length());
        let end = self.payload.checked_add(length).filter(|end| *end <= Limits::MAX_LENGTH);
        let end = end.ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format!("{length} bytes are too many"))
        })?;
        if length > old {
            self.cipher()?;
        }
        file.truncate_with(end, mode).await?;
        let mut at = old;
        while at < length {
            let count = ZEROS.min(length - at);
            let zeros = IoVector::zeroed(count as usize);
            self.write(file, at, &zeros, RequestFlags::default()).await?;
            at += count;
        }
        Ok(())
    }

    async fn serve_request(&self, io: &NodeIo, request: Request) -> Result<Outcome> {
        let file = io.child(FILE)?;
        let Request { kind, flags, offset, length, vector } = request;
        match kind {
            RequestKind::Read => {
                let place = (self.payload + offset, offset);
                transfer::read(&file, self.cipher()?, place, &vector).await?;
            }
            RequestKind::Write => {
                let flags = RequestFlags { fua: flags.fua, ..RequestFlags::default() };
                self.write(&file, offset, &vector, flags).await?;
            }
            RequestKind::Flush => file.flush().await?,
            // A hint; a hole would read as noise, and tell where nothing is.
            RequestKind::Discard => {}
            RequestKind::WriteZeroes => {
                let text = "zeros are written to encrypted disks like other data";
                return Err(Error::new(ErrorKind::NotSupported, text));
            }
            RequestKind::BlockStatus => {
                let status =
                    BlockStatus { length, data: true, allocated: true, ..BlockStatus::default() };
                return Ok(status.into());
            }
            RequestKind::Truncate => self.resize(&file, offset, flags.preallocation).await?,
        }
        Ok(Outcome::Done)
    }
}

impl Driver for Luks {
    fn driver_name(&self) -> &'static str {
        "luks"
    }

    fn length(&self, node: &NodeView) -> u64 {
        self.length_in(node.child(FILE).map_or(0, |file| file.length()))
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: SECTOR as u32, ..Limits::UNLIMITED }
    }

    fn child_access(&self, _role: Role, parents: Access) -> Access {
        parents.through_format_file(!self.read_only)
    }

    fn access_changed(&self, _change: AccessChange) -> Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, _node: &NodeView, request: &MapRequest<'_>) -> Map {
        Map::Async { length: request.length }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(self.serve_request(io, request))
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

/// Makes `file` a LUKS disk of `size` bytes; what it held is lost. What the disk holds is not zeros
/// but noise. On a loop; needs write and resize permission. Durable on return; a crash in between
/// leaves a file that is no LUKS disk.
///
/// # Errors
///
/// Options that do not go together, or too many bytes (nothing was written then); those of the file.
pub async fn create(
    file: &Child,
    options: &LuksCreateOptions,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    let payload = header_bytes(&options.suite);
    let end = payload.checked_add(size).filter(|end| *end <= Limits::MAX_LENGTH);
    let end = end.ok_or_else(|| {
        Error::new(ErrorKind::InvalidArgument, format!("a disk of {size} bytes is too large"))
    })?;
    let fresh = create_header(file.local(), options).await?;
    let flags = RequestFlags::default();
    file.truncate(0).await?;
    file.truncate_with(end, preallocation).await?;
    let [header, material] = fresh.writes();
    file.write(material.0, IoBuffer::from_slice(&material.1), flags).await?;
    file.flush().await?;
    file.write(header.0, IoBuffer::from_slice(&header.1), flags).await?;
    file.flush().await
}

#[cfg(test)]
mod tests;
