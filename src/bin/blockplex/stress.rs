//! `blockplex stress`: writes, reads back and verifies from many iothreads
//! while another thread changes the graph under them.
//!
//! Every sector written is a `block_pattern` that says what it is. A `layout`
//! gives each iothread sectors of its own, between those of the others, so that
//! neighbours in one cluster belong to different threads while each sector has
//! one writer. A `plan` draws each thread's operations from the seed,
//! `mutation` those of the graph. `verify` holds what a thread's sectors may
//! contain (one `history` for each sector with something going on) and judges
//! every read. `report` counts.
//!
//! The range used is to be zero when the run starts.

mod block_pattern;
mod history;
mod layout;
mod mutation;
mod plan;
mod report;
pub mod run;
mod verify;
