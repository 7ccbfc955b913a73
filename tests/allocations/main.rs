//! The hot path allocates nothing (R5): 10,000 requests at depth 32 through the completion door,
//! counted by an allocator of this program's own. Counted on the loop's thread alone.
#![expect(unsafe_code, reason = "an allocator that counts")]

use blockplex::{
    Blockplex, Completion, IoBuffer, IoThread, LoopConfig, OpenOptions, Queue, Request,
};
use blockplex_tests::patience;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // Fails only while the thread ends, when nobody counts.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator as it is; counting allocates nothing
// (the counter is constant-initialised and has no destructor).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: u64 = 32;
const BLOCK: usize = 4096;

/// Runs `requests` requests, each into the memory of one that has ended; gives the memory back.
async fn run(
    queue: &Queue,
    requests: u64,
    ready: &mut Vec<Completion>,
    make: impl Fn(u64, blockplex::IoVector) -> Request,
) {
    let mut left = requests;
    let mut submitted = 0;
    while left > 0 {
        while let Some(completion) = ready.pop() {
            completion.result.expect("a request succeeds");
            queue.submit(make(submitted, completion.vector), submitted);
            submitted += 1;
        }
        queue.ready().await;
        left = left.saturating_sub(queue.reap(ready, DEPTH as usize) as u64);
    }
    while ready.len() < DEPTH as usize {
        queue.ready().await;
        queue.reap(ready, DEPTH as usize);
    }
}

/// How many allocations 10,000 requests take on the disk of `options`, once it is warm.
fn allocations(options: &str, make: fn(u64, blockplex::IoVector) -> Request) -> u64 {
    let layer = Blockplex::new().expect("a layer");
    let options = OpenOptions::parse(options).expect("options");
    let disk = patience::wait("opening", layer.open("disk", options)).expect("a disk");
    let thread = IoThread::spawn(LoopConfig::default()).expect("a loop");
    let user = disk.clone();
    let task = thread.handle().spawn_with(move |_| async move {
        let queue = user.queue("counted").expect("we are on a loop");
        let mut ready = Vec::with_capacity(2 * DEPTH as usize);
        for cookie in 0..DEPTH {
            queue.submit(make(cookie, IoBuffer::zeroed(BLOCK).into()), cookie);
        }
        run(&queue, 1000, &mut ready, make).await; // warms up
        let before = ALLOCATIONS.get();
        run(&queue, 10_000, &mut ready, make).await;
        ALLOCATIONS.get() - before
    });
    let count =
        patience::wait("the requests", task.expect("the loop runs")).expect("not cancelled");
    patience::wait("closing", disk.close()).expect("closed");
    count
}

fn read(number: u64, vector: blockplex::IoVector) -> Request {
    Request::read(number % 200 * BLOCK as u64, vector)
}

fn write(number: u64, vector: blockplex::IoVector) -> Request {
    Request::write(number % 200 * BLOCK as u64, vector)
}

#[test]
fn requests_to_a_null_disk_allocate_nothing() {
    assert_eq!(allocations("driver=null-co,size=1M", read), 0);
    assert_eq!(allocations("driver=raw,file.driver=null-co,file.size=1M", write), 0);
}

#[test]
fn requests_to_a_warm_memory_disk_allocate_nothing() {
    assert_eq!(allocations("driver=raw,file.driver=memory,file.size=1M", read), 0);
    assert_eq!(allocations("driver=raw,file.driver=memory,file.size=1M", write), 0);
}

#[test]
fn requests_to_a_raw_file_allocate_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    for direct in ["off", "on"] {
        let options = format!(
            "driver=raw,cache.direct={direct},file.driver=file,file.filename={}",
            path.display()
        );
        assert_eq!(allocations(&options, read), 0, "reads, direct={direct}");
        assert_eq!(allocations(&options, write), 0, "writes, direct={direct}");
    }
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.get();
    drop(Box::new(7));
    assert!(ALLOCATIONS.get() > before);
}
