//! The folder of a run: its resolved configuration, its curve, its summary and its checkpoint.
//!
//! | file | content |
//! | --- | --- |
//! | `run.toml` | the resolved configuration; `--config` takes it |
//! | `metrics.jsonl` | one [`Evaluation`] per line, in the order in which they came back; `steps` says of what |
//! | `summary.json` | the [`Summary`] |
//! | `checkpoint/` | the best model by validation, a Hugging Face directory |

mod folder;
mod summary;

pub use folder::{ResultsError, RunFolder};
pub use summary::{Evaluation, Subject, Summary, Traffic};
