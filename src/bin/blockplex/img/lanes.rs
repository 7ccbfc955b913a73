//! Lanes: tasks that work through one image side by side, spread over as many I/O threads as the
//! machine has processors.
//!
//! A lane is an `async` function on one thread's loop; it opens its own queues there. The calling
//! thread, which owns no loop, waits until all lanes have ended.

use std::future::Future;
use std::num::NonZero;
use std::thread::available_parallelism;

use blockplex::{
    Error, ErrorKind, IoBuffer, IoThread, Local, LoopConfig, Queue, Request, block_on,
};

/// Runs `count` lanes to their end; the error of the first lane, by number, that has one.
///
/// # Errors
/// What a lane says, or what keeps threads from being started.
pub fn run<E, M, F>(count: usize, make: M) -> Result<(), E>
where
    E: From<Error> + Send + 'static,
    M: Fn(Local) -> F + Clone + Send + 'static,
    F: Future<Output = Result<(), E>> + 'static,
{
    let processors = available_parallelism().map_or(1, NonZero::get);
    let threads = (0..processors.min(count).max(1))
        .map(|index| {
            // Threads for blocking work do little but compress and decompress.
            let threads_max = processors.clamp(4, 16);
            let name = format!("lane{index}");
            let config = LoopConfig { name, threads_max, ..LoopConfig::default() };
            IoThread::spawn(config)
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::from)?;
    let mut tasks = Vec::with_capacity(count);
    for thread in threads.iter().cycle().take(count) {
        tasks.push(thread.handle().spawn_with(make.clone()).map_err(|_| ended())?);
    }
    let mut result = Ok(());
    for task in tasks {
        let lane = match block_on(task) {
            Ok(Ok(lane)) => lane,
            _ => Err(ended().into()),
        };
        result = result.and(lane);
    }
    result
}

/// Reads `length` bytes at `offset` of the disk into the buffer, from position `at` on. The buffer
/// comes back in any case.
pub async fn read(
    queue: &Queue,
    offset: u64,
    buffer: IoBuffer,
    at: usize,
    length: usize,
) -> (IoBuffer, Result<(), Error>) {
    let whole = buffer.into_vector();
    let completion = queue.request(Request::read(offset, whole.slice(at, length))).await;
    let result = completion.result.map(drop);
    drop(completion.vector);
    (whole_again(whole), result)
}

/// The buffer under a vector; a copy when somebody still shares it.
pub fn whole_again(vector: blockplex::IoVector) -> IoBuffer {
    vector.into_buffer().unwrap_or_else(|shared| IoBuffer::from_slice(&shared.to_vec()))
}

/// Runs a request that gives nothing but success.
///
/// # Errors
/// The request's own.
pub async fn perform(queue: &Queue, request: Request) -> Result<(), Error> {
    queue.request(request).await.result.map(drop)
}

fn ended() -> Error {
    Error::new(ErrorKind::Gone, "an I/O thread has ended early")
}
