//! The driver as a whole, against the peer.

mod amend;
mod basics;
mod bitmaps;
mod check;
mod compressed;
mod concurrency;
mod crash;
mod creation;
mod data_file;
mod data_file_crash;
mod departed;
mod doubt;
mod encryption;
mod faults;
mod fuzz;
mod options;
mod order;
mod overlap;
mod resizing;
mod snapshot_work;
mod snapshots;
mod stalls;
mod subclusters;
