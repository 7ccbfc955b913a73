//! Which files a backing chain is made of, so that no file comes twice and no chain is endless.
//!
//! An image may name itself, or a file further up, under any other name: by a symbolic or hard
//! link, with `./` in front, through another directory. Names therefore say nothing; the identity
//! of the opened file does.

use std::{fmt, os::fd::AsFd};

use rustix::fs::{FileType, fstat};

/// How many images may lie below the top one.
pub const MAX_CHAIN_DEPTH: usize = 200;

/// What an open file is, whatever it is called. Two descriptors have the same identity exactly if
/// they reach the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIdentity {
    /// The device the file lies on; for a block device node, the device it stands for.
    pub dev: u64,
    /// The inode; 0, which no file has, for a block device, as many nodes may stand for one device.
    pub ino: u64,
}

impl FileIdentity {
    /// The identity of what `fd` has open.
    ///
    /// # Errors
    ///
    /// What `fstat` reports.
    pub fn of(fd: impl AsFd) -> std::io::Result<Self> {
        let stat = fstat(fd)?;
        Ok(if FileType::from_raw_mode(stat.st_mode).is_block_device() {
            Self { dev: stat.st_rdev, ino: 0 }
        } else {
            Self { dev: stat.st_dev, ino: stat.st_ino }
        })
    }
}

/// Why a file may not join a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// The same file is already part of the chain.
    Repeated,
    /// The chain is longer than [`MAX_CHAIN_DEPTH`].
    TooDeep,
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Repeated => f.write_str("the same file is already part of this image's chain"),
            Self::TooDeep => write!(f, "the chain has more than {MAX_CHAIN_DEPTH} backing images"),
        }
    }
}

impl std::error::Error for ChainError {}

/// The files of one chain as it is being opened, from the top image down.
///
/// Clone it where a chain forks (the children of a quorum): each branch goes on with its own.
#[derive(Clone, Debug, Default)]
pub struct ChainGuard {
    /// At most a few hundred, so a linear search is the simplest that is fast enough.
    files: Vec<FileIdentity>,
    images: usize,
}

impl ChainGuard {
    /// A chain with no file in it yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next image of the chain, the top one first.
    ///
    /// # Errors
    ///
    /// It is already there, or it would be more than [`MAX_CHAIN_DEPTH`] below the top. Nothing is
    /// added then.
    pub fn descend(&mut self, image: FileIdentity) -> Result<(), ChainError> {
        if self.images > MAX_CHAIN_DEPTH {
            return Err(ChainError::TooDeep);
        }
        self.claim(image)?;
        self.images += 1;
        Ok(())
    }

    /// Adds a file that belongs to the image added last, such as its external data file. It does
    /// not make the chain longer.
    ///
    /// # Errors
    ///
    /// It is already there.
    pub fn claim(&mut self, file: FileIdentity) -> Result<(), ChainError> {
        if self.files.contains(&file) {
            return Err(ChainError::Repeated);
        }
        self.files.push(file);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn links_and_detours_do_not_hide_a_repeated_file() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        File::create(at("image")).unwrap();
        File::create(at("other")).unwrap();
        std::fs::hard_link(at("image"), at("hard")).unwrap();
        std::os::unix::fs::symlink("image", at("soft")).unwrap();
        let identity = |name: &str| FileIdentity::of(File::open(at(name)).unwrap()).unwrap();

        let mut chain = ChainGuard::new();
        assert_eq!(chain.descend(identity("image")), Ok(()));
        for name in ["image", "hard", "soft", "./image"] {
            let error = Err(ChainError::Repeated);
            assert_eq!(chain.descend(identity(name)), error, "{name}");
            assert_eq!(chain.claim(identity(name)), error, "{name}");
        }
        assert_eq!(chain.descend(identity("other")), Ok(()));
    }

    #[test]
    fn two_hundred_backing_images_fit_and_no_more() {
        let mut chain = ChainGuard::new();
        let image = |ino| FileIdentity { dev: 1, ino };
        for ino in 0..=200 {
            assert_eq!(chain.descend(image(ino)), Ok(()), "{ino}");
            assert_eq!(chain.claim(image(1000 + ino)), Ok(()), "{ino}");
        }
        assert_eq!(chain.descend(image(201)), Err(ChainError::TooDeep));
    }
}
