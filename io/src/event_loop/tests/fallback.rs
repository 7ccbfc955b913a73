//! What happens where the kernel refuses io_uring, as containers have it do.
#![expect(unsafe_code, reason = "installs a system call filter")]

use super::*;
use std::thread;

/// Has io_uring_setup fail with EPERM on the calling thread, for good.
fn forbid_io_uring() {
    let code = |op: u32| op as u16;
    let statement = |op, k| libc::sock_filter { code: code(op), jt: 0, jf: 0, k };
    let mut program = [
        // The system call's number is the first word of the data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K),
            jt: 0,
            jf: 1,
            k: libc::SYS_io_uring_setup as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: takes no memory.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the filter and its program live until the kernel has copied them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    assert_eq!(set, 0);
}

#[test]
fn a_loop_that_may_not_use_io_uring_uses_threads_and_says_why() {
    let refused = thread::spawn(|| {
        forbid_io_uring();
        let insist = LoopConfig { engine: EngineChoice::Ring, ..LoopConfig::default() };
        let error = EventLoop::new(insist).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let mut event_loop = new_loop(LoopConfig::default());
        let handle = event_loop.handle();
        assert_eq!(handle.engine_name(), "threads");
        assert!(handle.engine_reason().is_some());
        let file = Arc::new(tempfile::tempfile().unwrap().into());
        let sync = event_loop.local().fsync(file, true);
        assert_eq!(event_loop.block_on(sync), 0);
    });
    assert!(refused.join().is_ok());
}
