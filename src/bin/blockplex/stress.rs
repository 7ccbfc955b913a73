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
//! None of these knows an engine. `run` is where they meet one: a `worker` in
//! each iothread, the `mutator` on a thread without a loop, `watch` on the main
//! thread, and `control` between them. `run` makes the range used zero first,
//! as the model takes it to be.

mod block_pattern;
mod control;
mod history;
mod layout;
mod mutation;
mod mutator;
mod plan;
mod report;
pub mod run;
mod verify;
mod watch;
mod worker;
