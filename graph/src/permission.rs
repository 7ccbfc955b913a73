//! Permissions on edges: what a parent needs of its child, and what it lets others do.
//!
//! Two parents of one node conflict when one needs what the other does not share (QEMU's rule):
//! P1. for any two edges `a`, `b` to one node, `a.needed` is within `b.shared`.

use std::fmt;
use std::ops::{BitAnd, BitOr, Not};

/// A set of permissions. The bits are QEMU's, since the file locks carry them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Permissions = Permissions(0);
    /// Reads see a consistent state of the data.
    pub const CONSISTENT_READ: Permissions = Permissions(1);
    /// Writes.
    pub const WRITE: Permissions = Permissions(2);
    /// Writes that do not change what is read.
    pub const WRITE_UNCHANGED: Permissions = Permissions(4);
    /// Changes of the length.
    pub const RESIZE: Permissions = Permissions(8);
    /// Everything.
    pub const ALL: Permissions = Permissions(15);

    /// The names, in the order of the bits.
    const NAMES: [(Permissions, &'static str); 4] = [
        (Permissions::CONSISTENT_READ, "consistent read"),
        (Permissions::WRITE, "write"),
        (Permissions::WRITE_UNCHANGED, "write unchanged"),
        (Permissions::RESIZE, "resize"),
    ];

    /// Whether every permission of `other` is in this set.
    pub fn contains(self, other: Permissions) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set as QEMU's bits.
    pub fn bits(self) -> u64 {
        u64::from(self.0)
    }
}

impl BitOr for Permissions {
    type Output = Permissions;
    fn bitor(self, other: Permissions) -> Permissions {
        Permissions(self.0 | other.0)
    }
}

impl BitAnd for Permissions {
    type Output = Permissions;
    fn bitand(self, other: Permissions) -> Permissions {
        Permissions(self.0 & other.0)
    }
}

impl Not for Permissions {
    type Output = Permissions;
    fn not(self) -> Permissions {
        Permissions(!self.0 & Permissions::ALL.0)
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (permission, name) in Permissions::NAMES {
            if self.contains(permission) {
                write!(f, "{separator}{name}")?;
                separator = ", ";
            }
        }
        if self.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

/// What one edge, or all parents of a node together, need and share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it needs.
    pub needed: Permissions,
    /// What others may have at the same time.
    pub shared: Permissions,
}

impl Access {
    /// Needs nothing and shares everything: a node without parents.
    pub const IDLE: Access = Access { needed: Permissions::NONE, shared: Permissions::ALL };

    /// A reader that shares everything.
    pub const READER: Access =
        Access { needed: Permissions::CONSISTENT_READ, shared: Permissions::ALL };

    /// An exclusive writer, as a disk's frontend is: others may read, but not write or resize.
    pub const WRITER: Access = Access { needed: Permissions(1 | 2), shared: Permissions(1 | 4) };

    /// Both together: the union of the needs, the intersection of what is shared.
    #[must_use]
    pub fn and(self, other: Access) -> Access {
        Access { needed: self.needed | other.needed, shared: self.shared & other.shared }
    }

    /// The permissions over which the two conflict (P1); empty when they get on.
    pub fn conflict(self, other: Access) -> Permissions {
        (self.needed & !other.shared) | (other.needed & !self.shared)
    }

    /// What a format driver asks of the file that holds its data and metadata: a consistent
    /// read, and when the image is open for writing, writes and growth; nobody else may change
    /// or resize the file under the metadata, whatever the parents would share.
    #[must_use]
    pub fn through_format_file(self, writable: bool) -> Access {
        let writes = Permissions::WRITE | Permissions::RESIZE;
        let needed = if writable { writes } else { Permissions::NONE };
        Access { needed: needed | Permissions::CONSISTENT_READ, shared: self.shared & !writes }
    }

    /// What an overlay asks of its backing node: a consistent read, and that nobody changes it.
    #[must_use]
    pub fn through_backing() -> Access {
        Access {
            needed: Permissions::CONSISTENT_READ,
            shared: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_excludes_a_second_writer_but_not_a_reader() {
        assert_eq!(Access::WRITER.conflict(Access::WRITER), Permissions::WRITE);
        assert!(Access::WRITER.conflict(Access::READER).is_empty());
        assert_eq!(Access::through_backing().conflict(Access::WRITER), Permissions::WRITE);
    }

    #[test]
    fn nobody_may_change_the_file_under_a_format() {
        let reader = Access::READER.through_format_file(false);
        assert_eq!(reader.needed, Permissions::CONSISTENT_READ);
        assert_eq!(reader.conflict(Access::WRITER), Permissions::WRITE);
        assert!(reader.conflict(reader).is_empty());
        let writer = Access::WRITER.through_format_file(true);
        assert!(writer.needed.contains(Permissions::WRITE | Permissions::RESIZE));
    }
}
