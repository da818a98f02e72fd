//! What Sanderling's server and workers must agree on, and nothing else.
//!
//! Identifiers, the parameter layout, seeded initialisation, sparse vectors with their selection and codec, the
//! wire format, the run configuration, the corpus, token files and the checkpoint format. There is no network, no clock and no
//! global randomness in here; `server` and `worker` depend on this crate and never on each other.

pub mod beside;
pub mod binary;
pub mod capacity;
pub mod checkpoint;
pub mod config;
pub mod corpus;
pub mod folder_lock;
pub mod ids;
pub mod init;
pub mod join;
pub mod layout;
pub mod mapped;
pub mod method;
pub mod model_config;
pub mod origin;
pub mod report;
pub mod schedule;
pub mod sparse;
#[cfg(feature = "tokenizers")]
pub mod tokenizer;
pub mod tokens;
pub mod upcycle;
pub mod wire;
