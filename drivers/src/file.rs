//! Files and block devices of the host: the system calls and locks their driver stands on.

pub mod lock;
pub mod sys;
