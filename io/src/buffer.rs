//! Memory that the kernel may read or write while a request runs.
//!
//! * [`IoBuffer`]: an aligned allocation with one owner; dereferences to bytes.
//! * [`IoVector`]: a scatter list with whatever keeps its memory alive. Cheap to clone and to
//!   slice. It offers copies, never `&[u8]`: a device, a guest or another request may be writing.
//! * [`BufferPool`]: recycles aligned allocations between requests.
//!
//! There is no borrowed slice anywhere: a future that owns an `IoVector` may be dropped while the
//! kernel still writes, because the operation's slot holds a clone until its completion (P8, C01).
//!
//! B1. The memory of a vector is valid for reads and writes as long as any clone or slice lives.
//! B2. Only [`IoBuffer`] hands out references, and only while it is the sole owner.

mod block;
mod pool;
mod vector;

pub use block::IoBuffer;
pub use pool::BufferPool;
pub use vector::{IoVector, StableMemory};
