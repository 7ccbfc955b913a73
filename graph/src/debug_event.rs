//! Debug events: what a driver says it is about to do, to a child that wants to know.
//!
//! A format driver announces its steps ("I write an L2 table now") to its file through
//! [`Child::announce`](crate::Child::announce). A driver that injects faults listens: it makes the
//! I/O that follows fail, or keeps the driver waiting inside the announcement. The names are QEMU's.
//!
//! Below every other driver an announcement costs one branch on a flag of the child's view.

use crate::driver::LocalFuture;
use blockplex_io::event_loop::Local;

/// Declares the events with their names.
macro_rules! events {
    ($($(#[$doc:meta])* $event:ident = $name:literal,)*) => {
        /// A step that a driver, or the request path, is about to make.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum DebugEvent {
            $($(#[$doc])* $event,)*
        }

        impl DebugEvent {
            /// All events, in QEMU's order.
            pub const ALL: &'static [DebugEvent] = &[$(DebugEvent::$event,)*];

            /// Its name in options and commands.
            pub fn name(self) -> &'static str {
                match self {
                    $(DebugEvent::$event => $name,)*
                }
            }
        }
    };
}

events! {
    /// A changed part of the L1 table is written.
    L1Update = "l1_update",
    /// Clusters for a larger L1 table are allocated.
    L1GrowAllocTable = "l1_grow_alloc_table",
    /// A larger L1 table is written.
    L1GrowWriteTable = "l1_grow_write_table",
    /// The header is made to name a larger L1 table.
    L1GrowActivateTable = "l1_grow_activate_table",
    /// An L2 table, or a part of one, is read.
    L2Load = "l2_load",
    /// Changed parts of L2 tables are written.
    L2Update = "l2_update",
    /// An L2 entry of a compressed cluster is changed.
    L2UpdateCompressed = "l2_update_compressed",
    /// An L2 table that a snapshot shares is read, to be copied.
    L2AllocCowRead = "l2_alloc_cow_read",
    /// A new L2 table is written.
    L2AllocWrite = "l2_alloc_write",
    /// Data is read from the image's own clusters.
    ReadAio = "read_aio",
    /// Data is read from the backing node.
    ReadBackingAio = "read_backing_aio",
    /// A compressed cluster is read.
    ReadCompressed = "read_compressed",
    /// Data is written.
    WriteAio = "write_aio",
    /// A compressed cluster is written.
    WriteCompressed = "write_compressed",
    /// Virtual machine state is read.
    VmstateLoad = "vmstate_load",
    /// Virtual machine state is written.
    VmstateSave = "vmstate_save",
    /// What a write leaves of a cluster is read, to be copied.
    CowRead = "cow_read",
    /// What a write leaves of a cluster is written to its new place.
    CowWrite = "cow_write",
    /// The refcount table is read.
    ReftableLoad = "reftable_load",
    /// The refcount table grows.
    ReftableGrow = "reftable_grow",
    /// A changed part of the refcount table is written.
    ReftableUpdate = "reftable_update",
    /// A refcount block is read.
    RefblockLoad = "refblock_load",
    /// Refcount blocks are written.
    RefblockUpdate = "refblock_update",
    /// A part of a refcount block is written.
    RefblockUpdatePart = "refblock_update_part",
    /// A refcount block is allocated.
    RefblockAlloc = "refblock_alloc",
    /// The refcount table is made to name a new refcount block.
    RefblockAllocHookup = "refblock_alloc_hookup",
    /// A new refcount block is written.
    RefblockAllocWrite = "refblock_alloc_write",
    /// The blocks of a larger refcount table are written.
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    /// A larger refcount table is written.
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    /// The header is made to name a larger refcount table.
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    /// Clusters are allocated.
    ClusterAlloc = "cluster_alloc",
    /// Bytes for a compressed cluster are allocated.
    ClusterAllocBytes = "cluster_alloc_bytes",
    /// Clusters are freed.
    ClusterFree = "cluster_free",
    /// A flush begins: the driver writes its caches to the child.
    FlushToOs = "flush_to_os",
    /// The child is flushed.
    FlushToDisk = "flush_to_disk",
    /// The block at the head of a misaligned write is read.
    PwritevRmwHead = "pwritev_rmw_head",
    /// It has been read.
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    /// The block at the tail of a misaligned write is read.
    PwritevRmwTail = "pwritev_rmw_tail",
    /// It has been read.
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    /// A write reaches the node.
    Pwritev = "pwritev",
    /// A write-zeroes reaches the node.
    PwritevZero = "pwritev_zero",
    /// One of the two has ended, with or without an error.
    PwritevDone = "pwritev_done",
    /// An image is about to be emptied.
    EmptyImagePrepare = "empty_image_prepare",
    /// The entries past the end of a shorter L1 table are cleared.
    L1ShrinkWriteTable = "l1_shrink_write_table",
    /// The L2 tables that they named are freed.
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    /// What was read from below is written into the top layer.
    CorWrite = "cor_write",
    /// Space for a cluster is allocated.
    ClusterAllocSpace = "cluster_alloc_space",
    /// The listener is opened: what stands here is in force from the start.
    None = "none",
}

impl DebugEvent {
    /// The event with that name.
    pub fn parse(name: &str) -> Option<DebugEvent> {
        DebugEvent::ALL.iter().copied().find(|event| event.name() == name)
    }
}

/// A driver that wants to hear of its parents' steps ([`Driver::debug_listener`]).
///
/// [`Driver::debug_listener`]: crate::Driver::debug_listener
pub trait DebugListener {
    /// The parent is about to make that step; it goes on when the future ends.
    fn announce<'a>(&'a self, local: &'a Local, event: DebugEvent) -> LocalFuture<'a, ()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_qemus_forty_seven_events_and_none_and_each_name_leads_back() {
        assert_eq!(DebugEvent::ALL.len(), 48);
        for event in DebugEvent::ALL {
            assert_eq!(DebugEvent::parse(event.name()), Some(*event));
        }
        assert_eq!(DebugEvent::parse("bogus"), None);
    }
}
