//! Malformed images, hostile names and failing storage, through the whole library.
//!
//! The rows of the catalogue of malformed images have ids (H04b, B07n, T18 …); assertions name
//! them. Images are made and judged by the peer (`qemu-img`, `qemu-io`), damaged by [`image`]'s
//! patches, and opened as a user of the library opens them, by [`rows`], which runs the whole
//! oracle for each row; then given to our tools, by [`tools`]:
//!
//! F1. No panic, no hang; a refused open leaves no node behind.
//! F2. Read-only, the file does not change. A refused open does not change it either.
//! F3. What an image makes the library say holds no control characters.
//! F4. After a read-write run that was to succeed, the peer finds no more wrong than before.
//!
//! F5 and F6, on check and repair, are at the head of [`offline`]; F7 to F9, on the tools, of
//! [`tools`].
//!
//! | file | what |
//! |---|---|
//! | [`header`], [`extension`] | rows H and E |
//! | [`name`] | rows B: what an image names, and what the gate lets it have |
//! | [`table`] | rows T: L1, L2, refcounts, compressed clusters |
//! | [`bitmap`] | rows M: persistent bitmaps |
//! | [`overlap`] | the option `overlap-check` |
//! | [`snapshot`] | rows S: the snapshot table |
//! | [`encryption`] | rows K: LUKS headers |
//! | [`plain`] | rows W: raw, formats stated and never guessed, files that shrink |
//! | [`failing`], [`sweep`] | a driver that fails; each lower operation fails once |
//! | [`mutation`], [`tool_mutation`] | images with random damage |
//! | [`kill`] | tools that are killed |
//! | [`witness`] | what was opened meanwhile |
//! | [`interop`] | random operations on images of every shape, against a model and the peer |

use blockplex_tests::image;

mod bitmap;
mod encryption;
mod extension;
mod failing;
mod header;
mod interop;
mod kill;
mod mutation;
mod name;
mod offline;
mod overlap;
mod plain;
mod rows;
mod snapshot;
mod sweep;
mod table;
mod tool_mutation;
mod tools;
mod witness;
