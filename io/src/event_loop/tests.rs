//! What a loop promises, over both engines.

mod bottom_half;
mod embed;
mod end;
mod fallback;
mod file;
mod ready;
mod task;
mod thread_pool;

use super::*;

/// Makes one test of each engine out of each function that takes a configuration.
macro_rules! on_each_engine {
    ($($name:ident)*) => {
        mod ring {
            $(#[test] fn $name() { $crate::event_loop::tests::on(
                $crate::engine::EngineChoice::Ring, super::$name) })*
        }
        mod threads {
            $(#[test] fn $name() { $crate::event_loop::tests::on(
                $crate::engine::EngineChoice::Threads, super::$name) })*
        }
    };
}
pub(super) use on_each_engine;

/// Runs `test` with a configuration for `engine`. Where the kernel refuses io_uring, says so: the
/// ring's tests then show nothing.
pub(super) fn on(engine: EngineChoice, test: fn(LoopConfig)) {
    let config = LoopConfig { engine, name: "test".to_owned(), ..LoopConfig::default() };
    match EventLoop::new(config.clone()) {
        Ok(probe) => drop(probe),
        Err(error) if engine == EngineChoice::Ring => {
            eprintln!("skipped: no io_uring here ({error})");
            return;
        }
        Err(error) => panic!("a loop on threads needs nothing special: {error}"),
    }
    test(config);
}

pub(super) fn new_loop(config: LoopConfig) -> EventLoop {
    EventLoop::new(config).expect("a loop can be made")
}

pub(super) fn io_threads(config: &LoopConfig, count: usize) -> Vec<IoThread> {
    (0..count).map(|_| IoThread::spawn(config.clone()).expect("a thread starts")).collect()
}
