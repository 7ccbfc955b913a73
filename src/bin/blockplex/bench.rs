//! `blockplex bench`: how many requests a second, and how long each takes.
//!
//! Every iothread owns a `workload` (which request comes next) and a
//! `histogram` inside its `report::Tally`, neither of which it shares. The only
//! thing shared while the clock runs is one counter for each iothread in
//! `live`, from which the main thread draws a progress line and keeps the
//! `timeline`. Afterwards `report` sums up, `table` prints it for people (serde
//! for programs), and `plot` draws it.

mod histogram;
pub mod live;
mod plot;
mod report;
pub mod run;
mod table;
mod timeline;
mod workload;
