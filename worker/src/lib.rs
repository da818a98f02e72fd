//! Sanderling's worker: computes gradients of a mixture-of-experts language model on its own data and exchanges them,
//! sparsely, for differences of the server's model.
//!
//! [`core`] holds the exchange and the compression methods, without IO; [`model`] the decoder, written once over the
//! trait of [`kernels`]; [`device`] a worker's vectors in the memory of one; [`data`] the batches; [`site`] puts both where they compute; [`net`] the driver that joins a server and works for it, [`storage`] what it
//! can keep on disk meanwhile.

pub mod core;
pub mod data;
pub mod device;
pub mod engine;
pub mod kernels;
pub mod model;
pub mod net;
pub mod site;
pub mod storage;
