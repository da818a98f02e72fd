//! What a run reports, while it goes on and at its end.

/// Bytes exchanged with all workers so far, and what dense exchange would have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Traffic {
    /// UDP payload bytes received from workers, by the QUIC implementation's counters: pushes, requests,
    /// acknowledgements, handshakes.
    pub bytes_up: u64,
    /// UDP payload bytes sent to workers, base models and snapshots included.
    pub bytes_down: u64,
    /// 4 · parameters · steps: every push a dense float32 gradient.
    pub dense_bytes_up: u64,
    /// 4 · parameters · steps: every answer a dense float32 model.
    pub dense_bytes_down: u64,
}

/// What is trained, how and by how many; the same in every line of a run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Subject {
    /// The compression method.
    pub method: String,
    /// Workers that the run was configured for.
    pub workers: u32,
    /// Parameters of the model.
    pub parameters: u64,
    /// Parameters a token passes through.
    pub active_parameters: u64,
}

/// A line of `metrics.jsonl`: the model at one step. What a summary has too means the same here, up to this step.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// What is trained.
    #[serde(flatten)]
    pub subject: Subject,
    /// Updates applied to the evaluated model.
    pub steps: u64,
    /// Training tokens behind it.
    pub tokens: u64,
    /// Mean cross-entropy over the validation split, nats per token.
    pub val_loss: f64,
    /// The lowest of them in this line and those before it.
    pub best_val_loss: f64,
    /// Mean training loss of the pushes since the step that was evaluated before this one; none when there was no push.
    pub train_loss: Option<f64>,
    /// Mean share of the choices of experts that were dropped by the same pushes; none when there was no push.
    pub dropped_share: Option<f64>,
    /// Bytes up to this step.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Mean staleness of the updates so far.
    pub staleness_mean: f64,
    /// The largest staleness so far.
    pub staleness_max: u64,
    /// Wall time from the start of the server to this step.
    pub seconds: f64,
    /// Training tokens per second since the first push.
    pub tokens_per_second: f64,
    /// Per layer, the share of routed token slots of each expert on the validation split.
    pub expert_share: Vec<Vec<f32>>,
    /// Per layer, the mean entropy of the router's softmax over all experts, nats.
    pub router_entropy: Vec<f32>,
}

/// `summary.json`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// The run's name.
    pub name: String,
    /// What is trained.
    #[serde(flatten)]
    pub subject: Subject,
    /// Sessions opened; more than `workers` when some came back after their lease had expired.
    pub sessions: u32,
    /// Seed of the run.
    pub seed: u64,
    /// Whether every batch was done, as opposed to an early stop.
    pub completed: bool,
    /// Updates applied.
    pub steps: u64,
    /// Batches whose gradient was not finite and was left out.
    pub skipped: u64,
    /// Updates that this server refused because they were malformed, out of range or out of all proportion.
    pub refused: u64,
    /// Training tokens behind the applied updates.
    pub tokens: u64,
    /// Validation loss of the last model; none if it was not evaluated.
    pub val_loss: Option<f64>,
    /// The lowest validation loss of the run.
    pub best_val_loss: Option<f64>,
    /// The step of that model, which is the one in `checkpoint/`.
    pub best_step: u64,
    /// Test loss of that model.
    pub test_loss: Option<f64>,
    /// Validation loss at the first evaluation at or after 1.536 M tokens (2 000 batches of 12 × 64, the length of
    /// nanoGPT's CPU example); none for shorter runs and for other texts than the bundled one.
    pub val_loss_at_1_54m: Option<f64>,
    /// The capacity factor of the run; 0: nothing is dropped.
    pub capacity_factor: f64,
    /// Mean share of the choices of experts that were dropped by the applied updates' batches.
    pub dropped_share: f64,
    /// Bytes of the whole run.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Mean staleness of all updates.
    pub staleness_mean: f64,
    /// The largest staleness. A worker that evaluates takes its next gradient at the model it had before, so this is
    /// about the number of steps that the others make during an evaluation.
    pub staleness_max: u64,
    /// Wall time from the start of the server to the end of the last evaluation.
    pub seconds: f64,
    /// The part of it from the first push to the last, in which evaluations fall as well.
    pub training_seconds: f64,
    /// Training tokens per second of `training_seconds`.
    pub tokens_per_second: f64,
}

impl Summary {
    /// Whether it was written after everything that `last` tells of was decided.
    pub fn is_of_the_end(&self, last: &Self) -> bool {
        let decided =
            |of: &Self| (of.completed, of.steps, of.skipped, of.val_loss, of.best_step, of.test_loss);
        decided(self) == decided(last)
    }
}
