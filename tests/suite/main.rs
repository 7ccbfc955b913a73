//! The scenario suite: one file per subject, one test per scenario. `../README.md` has the table.

mod align;
mod backend;
mod blkdebug;
mod block_status;
mod discard_zero;
mod drain;
mod drain_change;
mod drain_order;
mod graph_change;
mod image_lock;
mod internal_snapshot;
mod limits;
mod locality;
mod permission;
mod probing;
mod qcow2_discard;
mod request;
mod snapshot;
mod stress;
